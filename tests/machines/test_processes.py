"""Machines on real worker processes: the specification's checkout, timeouts, children."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import Durable, Machine
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.machines.driver import View

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
