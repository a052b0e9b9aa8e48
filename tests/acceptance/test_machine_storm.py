"""Two thousand machines of five steps through a storm: each step is committed in its order, exactly once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from durable import Durable
from tests.acceptance.storm import Storm, blow, lines
from tests.fix_app import Command

COUNT = 2000
STEPS = ["one", "two", "three", "four", "five"]
# Every machine hops inline once; every third waits for a signal, every twentieth for children.
TASKS = """
    import os
    from durable import Await, Done, Machine, Next, ScheduleChildren, step

    @app.task(name="leaf")
    def leaf(n): return n

    def entered(ctx):
        file = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{ctx.id} {ctx.step} {len(ctx.state['log'])}\\n".encode())
        os.close(file)
        return {**ctx.state, "log": [*ctx.state["log"], ctx.step]}

    @app.machine(name="five")
    class Five(Machine):
        @step(initial=True)
        def one(self, ctx): return Next(self.two, entered(ctx), inline=True)

        @step
        def two(self, ctx):
            state = entered(ctx)
            if state["n"] % 3 == 0: return Await("go", then=self.three, state=state, timeout=3600)
            return Next(self.three, state)

        @step
        def three(self, ctx):
            state = entered(ctx)
            if state["n"] % 3 == 0: state["told"] = [signal.payload for signal in ctx.awaited]
            if state["n"] % 20 == 0:
                return ScheduleChildren([(leaf, {"args": (n,)}) for n in (1, 2)], then=self.four, state=state)
            return Next(self.four, state)

        @step
        def four(self, ctx):
            state = entered(ctx)
            if state["n"] % 20 == 0: state["joined"] = sorted(child.result for child in ctx.children)
            return Next(self.five, state)

        @step
        def five(self, ctx): return Done(entered(ctx))
"""


def expected(n: int) -> dict[str, Any]:
    told = {"told": [f"go {n}"]} if n % 3 == 0 else {}
    joined = {"joined": [1, 2]} if n % 20 == 0 else {}
    return {"n": n, "log": STEPS, **told, **joined}


def test_five_step_machines_commit_every_step_in_order_exactly_once_through_a_storm_of_deaths(
    app: Durable,
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    folder = tasks_module(TASKS)
    namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
    body = (folder / "tasks.py").read_text().split("\n", 2)[2]
    exec(compile(body, "tasks.py", "exec", dont_inherit=True), namespace)
    effects = tmp_path / "effects"
    storm = Storm(lambda: durable_worker("worker", "-c", "2", EFFECTS=str(effects)))
    results = app.insert_many([(namespace["Five"], {"state": {"n": n, "log": []}}) for n in range(COUNT)])
    waiting = [n for n in range(COUNT) if n % 3 == 0]

    def tell(part: int, of: int) -> None:
        """Send a part of the signals, each twice: early for some, long after the park for others."""
        messages = [
            {"target": results[n].id, "name": "go", "payload": f"go {n}", "dedup_key": "once"}
            for n in waiting[part::of]
        ]
        assert app.signal_many([*messages, *messages]) == [True] * len(messages) + [False] * len(messages)

    faults: list[Callable[[], None]] = [
        lambda: tell(0, 3),
        lambda: storm.kill_child(0),
        lambda: storm.kill_agent(0),
        lambda: tell(1, 3),
        lambda: storm.kill_child(1),
        lambda: storm.kill_command(0),
        lambda: storm.kill_child(1),
        lambda: tell(2, 3),
        lambda: storm.kill_child(0),
        lambda: storm.kill_agent(1),
        lambda: storm.kill_command(1),
    ]
    # Until the last signals are sent, a third of a third can't go beyond its second step.
    blow(faults, lambda: len(lines(effects)), 5 * COUNT - 3 * len(waiting) // 3)

    assert [result.get(timeout=60) for result in results] == [expected(n) for n in range(COUNT)]
    rows = connection.execute(
        f"SELECT machine, status::text, version, count(*) FROM {app.schema}.instance_view GROUP BY 1, 2, 3 ORDER BY 1"
    ).fetchall()
    assert rows == [("five", "done", 5, COUNT), ("leaf", "done", 1, 2 * len(range(0, COUNT, 20)))]
    assert connection.execute(f"SELECT count(*) FROM {app.schema}.signals").fetchone() == (0,)
    # Each step was entered with what its predecessor had committed: at least once, and never after its successor.
    ran: dict[int, list[int]] = defaultdict(list)
    for line in lines(effects):
        instance, step, done_before = line.split()
        assert STEPS[int(done_before)] == step
        ran[int(instance)].append(int(done_before))
    assert set(ran) == {result.id for result in results}
    for seen in ran.values():
        assert seen == sorted(seen)
        assert set(seen) == set(range(5))
    again = sum(map(len, ran.values())) - 5 * COUNT
    assert again < COUNT, "only what a killed process had entered, or not yet committed, ran again"
