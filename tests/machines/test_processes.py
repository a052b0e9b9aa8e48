"""Machines on real worker processes that are killed: the specification's checkout, and a storm over many steps."""

from __future__ import annotations

import os
import random
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import Durable, Machine
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.machines.driver import View

COUNT = 300
STEPS = ["one", "two", "three", "four", "five"]
TASKS = """
    import os, time
    from dataclasses import dataclass, field
    from durable import Await, Done, Machine, Next, ScheduleChildren, Stop, step

    @app.machine(name="checkout", queue="checkout")
    class Checkout(Machine):
        @dataclass
        class State:
            order: int
            paid: int = 0

        @step(initial=True)
        def start(self, ctx):
            return Await("payment_confirmed", then=self.ship, state=ctx.state, timeout=3600)

        @step
        def ship(self, ctx):
            if not ctx.awaited:
                return Stop("payment never came")
            return Done({"order": ctx.state.order, "paid": ctx.awaited[0].payload["amount"]})

    def enter(ctx):
        line = f"{ctx.id} {ctx.step} {ctx.state.get('n')}\\n".encode()
        file = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line)
        os.close(file)
        time.sleep(0.001)

    class FiveSteps(Machine):
        @step(initial=True)
        def one(self, ctx): return self.go(ctx, self.two)
        @step
        def two(self, ctx): return self.go(ctx, self.three)
        @step
        def three(self, ctx): return self.go(ctx, self.four)
        @step
        def four(self, ctx): return self.go(ctx, self.five)
        @step
        def five(self, ctx):
            enter(ctx)
            return Done({"n": ctx.state["n"] + 1, "log": [*ctx.state["log"], ctx.step]})

        def go(self, ctx, target):
            enter(ctx)
            return Next(target, {"n": ctx.state["n"] + 1, "log": [*ctx.state["log"], ctx.step]})

    @app.machine(name="plain")
    class Plain(FiveSteps): pass

    @app.machine(name="inline", inline=True)
    class Inline(FiveSteps): pass

    @app.task(name="square")
    def square(n): return n * n

    @app.machine(name="squares")
    class Squares(Machine):
        @step(initial=True)
        def start(self, ctx):
            return ScheduleChildren([(square, {"args": (n,)}) for n in range(ctx.state["count"])], then=self.join)

        @step
        def join(self, ctx):
            return Done(sum(child.result for child in ctx.children))
"""


@pytest.fixture
def machines(app: Durable, tasks_module: Callable[[str], Path]) -> dict[str, type[Machine]]:
    """The machines by name, as a producer sees them; tasks.py is written for the workers."""
    folder = tasks_module(TASKS)
    namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
    body = (folder / "tasks.py").read_text().split("\n", 2)[2]
    exec(compile(body, "tasks.py", "exec", dont_inherit=True), namespace)
    return {machine.name: machine.cls for machine in app.machines.values()}


def test_a_checkout_outlives_its_worker_and_ships_when_the_payment_comes(
    app: Durable, machines: dict[str, type[Machine]], durable_worker: Callable[..., Command], view: View
) -> None:
    worker = durable_worker("worker", "-Q", "checkout", "-c", "1")
    result = app.insert(machines["checkout"], kwargs={"order": 42}, correlation_key="order:42")
    wait_until(lambda: result.status == "awaiting_signal", what="the park")
    worker.process.kill()
    worker.process.wait()

    assert app.signal("order:42", "payment_confirmed", {"amount": 100}, dedup_key="evt-7") is True
    assert app.signal("order:42", "payment_confirmed", {"amount": 100}, dedup_key="evt-7") is False
    assert view.of(result.id, "status", "step") == ("runnable", "ship")
    durable_worker("worker", "-Q", "checkout", "-c", "1")
    assert result.get(timeout=20) == {"order": 42, "paid": 100}
    assert view.of(result.id, "version", "crashes") == (2, 0)


def test_a_timeout_fires_with_a_beat_and_without_one(
    app: Durable, machines: dict[str, type[Machine]], durable_worker: Callable[..., Command], connection: Any
) -> None:
    durable_worker("worker", "-Q", "checkout", "-c", "1")
    for number in range(2):
        result = machines["checkout"].delay(order=number)
        wait_until(lambda result=result: result.status == "awaiting_signal", what="the park")
        connection.execute(
            f"UPDATE {app.schema}.instances SET deadline = clock_timestamp() + interval '0.1 s' WHERE id = %s",
            [result.id],
        )
        with pytest.raises(Exception, match="payment never came"):
            result.get(timeout=20)
        if number == 0:
            durable_worker("beat")


def test_children_and_their_parent_wake_workers_that_poll_once_an_hour(
    app: Durable, machines: dict[str, type[Machine]], durable_worker: Callable[..., Command]
) -> None:
    durable_worker("worker", "-Q", "default,checkout", "-c", "2", DURABLE_POLL_INTERVAL="3600")
    result = machines["squares"].delay(count=20)
    assert result.get(timeout=20) == sum(n * n for n in range(20))
    checkout = machines["checkout"].delay(order=1)
    wait_until(lambda: checkout.status == "awaiting_signal", what="the park")
    checkout.signal("payment_confirmed", {"amount": 1})
    assert checkout.get(timeout=20)["paid"] == 1


def test_five_step_machines_survive_kills_with_every_step_committed_in_order_exactly_once(
    app: Durable,
    machines: dict[str, type[Machine]],
    durable_worker: Callable[..., Command],
    tmp_path: Path,
    view: View,
) -> None:
    effects = tmp_path / "effects"
    workers = [durable_worker("worker", "-c", "2", EFFECTS=str(effects)) for _ in range(2)]
    state = {"n": 0, "log": []}
    results = app.insert_many([(machines[("plain", "inline")[n % 2]], {"state": state}) for n in range(COUNT)])
    dice = random.Random(3)
    kills = 8

    def entered() -> int:
        return len(effects.read_bytes().splitlines()) if effects.exists() else 0

    for kill in range(1, kills + 1):
        wait_until(lambda kill=kill: entered() > kill * 5 * COUNT / (kills + 3), 60, f"steps before kill {kill}")
        victim = dice.choice(workers)
        os.kill(dice.choice(wait_until(lambda victim=victim: victim.children("durable:default"))), signal.SIGKILL)  # type: ignore[arg-type]

    expected = {"n": 5, "log": STEPS}
    assert [result.get(timeout=60) for result in results] == [expected] * COUNT
    rows = view.rows("SELECT status, version, state, count(*) FROM {schema}.instance_view GROUP BY 1, 2, 3")
    assert rows == [("done", 5, {"n": 4, "log": STEPS[:4]}, COUNT)]
    # Each step was entered with the state its predecessor committed: at least once, and never after its successor.
    lines: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for line in effects.read_text().splitlines():
        instance, step, n = line.split()
        lines[int(instance)].append((step, int(n)))
    assert set(lines) == {result.id for result in results}
    for seen in lines.values():
        assert all(STEPS[n] == step for step, n in seen)
        assert [n for _, n in seen] == sorted(n for _, n in seen)
        assert {n for _, n in seen} == set(range(5))
    again = sum(map(len, lines.values())) - 5 * COUNT
    assert again < COUNT, "only what a killed process had entered, or not yet committed, ran again"
