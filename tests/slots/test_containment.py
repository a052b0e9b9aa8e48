"""In each pool: an instance whose user code exits, breaks the loop or leaves things behind harms no other.

One worker process per pool runs all guilty instances among innocent ones; each must be charged once, and the process
must be the same in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import Durable
from tests.slots.conftest import START

TASKS = """
    import asyncio, contextvars, logging, os, signal, sys
    from dataclasses import dataclass
    from pathlib import Path
    from durable import Cancel, Done, Machine, Task, step

    KINDS = {kind.__name__: kind for kind in (
        KeyError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MemoryError, RecursionError)}
    variable = contextvars.ContextVar("variable", default=None)
    kept = []

    class BadFilter(logging.Filter):
        def filter(self, record):
            if "please exit" in record.getMessage(): sys.exit("a filter")
            return True
    logging.getLogger("durable.step").addFilter(BadFilter())

    class Hooked(Task):
        def before_start(self, task_id, args, kwargs):
            if args[0] == "before_start": raise KINDS[args[1]]
        def on_success(self, retval, task_id, args, kwargs):
            if args[0] == "on_success": raise KINDS[args[1]]

    class Evil:
        def __init__(self, kind): self.kind = kind
        def __json__(self): raise self.kind
        def __repr__(self): raise self.kind

    def act(place, kind):
        if place == "step": raise KINDS[kind]
        if place == "result": return Evil(KINDS[kind])
        if place == "reason": raise Cancel(Evil(KINDS[kind]))
        return "fine"

    @app.task(name="sync", base=Hooked, max_attempts=1)
    def sync(place, kind): return act(place, kind)

    @app.task(name="async", base=Hooked, max_attempts=1)
    async def async_(place, kind):
        await asyncio.sleep(0)
        if place == "gathered":
            async def part(): raise KINDS[kind]
            await asyncio.gather(part())
        if place == "stop": asyncio.get_running_loop().stop()
        if place == "later": asyncio.get_running_loop().call_soon(sys.exit, 3)
        if place == "left": kept.append(asyncio.create_task(asyncio.sleep(600)))
        await asyncio.sleep(0.01)
        return act(place, kind)

    @app.task(name="logs", bind=True, max_attempts=1)
    def logs(ctx):
        ctx.log.warning("please exit")
        return "fine"

    @app.task(name="sets", max_attempts=1)
    def sets(): variable.set("leaked")

    @app.task(name="asets", max_attempts=1)
    async def asets(): variable.set("leaked")

    @app.task(name="reads", max_attempts=1)
    def reads(): return [variable.get(), os.getpid()]

    @app.task(name="areads", max_attempts=1)
    async def areads():
        await asyncio.sleep(0.02)
        return [variable.get(), os.getpid()]

    @app.task(name="cancels", max_attempts=1)
    async def cancels():
        for task in asyncio.all_tasks(): task.cancel()
        await asyncio.sleep(0)

    @app.machine(name="built")
    class Built(Machine):
        @dataclass
        class State:
            kind: str
            def __post_init__(self):
                if os.environ.get("BUILDS") == "no": raise KINDS[self.kind]
        @step
        def go(self, ctx): return Done()
"""
KINDS = ["KeyError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "CancelledError", "MemoryError"]
PLACES = ["step", "result", "reason", "before_start", "on_success"]
LOOP = [("stop", ""), ("later", ""), ("left", ""), *(("gathered", kind) for kind in KINDS)]


@pytest.mark.parametrize("pool", ["prefork", "threads", "asyncio"])
def test_no_exit_reaches_a_neighbour(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: START, pool: str
) -> None:
    folder = tasks_module(TASKS)
    namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
    exec(compile((folder / "tasks.py").read_text().split("\n", 2)[2], "tasks.py", "exec", dont_inherit=True), namespace)
    task = {found.name: found for found in app.tasks.values()}
    guilty: dict[tuple[str, str, str], Any] = {}
    innocent: list[Any] = []

    def add(name: str, place: str, kind: str, result: Any) -> None:
        guilty[name, place, kind] = result
        innocent.extend((task["reads"].delay(), task["areads"].delay()))

    for name in ("sync", "async"):
        for place in PLACES:
            for kind in KINDS:
                add(name, place, kind, task[name].delay(place, kind))
    for place, kind in LOOP:
        add("async", place, kind, task["async"].delay(place, kind))
    for kind in KINDS:
        add("machine", "state", kind, namespace["Built"].delay(kind=kind))
    for name in ("sets", "asets", "logs"):
        add(name, "", "", task[name].delay())
    worker = durable_worker("worker", "-P", pool, "-c", "1" if pool == "prefork" else "8", BUILDS="no")
    harmless = {"before_start", "on_success", "stop", "later", "left", ""}
    for (name, place, kind), result in guilty.items():
        result.get(timeout=60, propagate=False)
        case = f"{name} {place} {kind}: {result.status} {result.error}"
        assert result.status == ("done" if place in harmless else "failed"), case
        assert result.attempts == 1, case
        if place in ("step", "gathered"):
            assert result.error.error_type == kind, case
    answers = [result.get(timeout=60) for result in innocent]
    assert {result.attempts for result in innocent} == {1}
    assert {value for value, _ in answers} == {None}, "a context variable leaked"
    assert len({pid for _, pid in answers}) == 1, worker.output()
    assert "exited with" not in worker.output()


@pytest.mark.parametrize("pool", ["threads", "asyncio"])
def test_cancelling_every_task_spares_the_loop(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: START, pool: str
) -> None:
    tasks_module(TASKS)
    cancels, areads = (app.task(name=name)(lambda: None) for name in ("cancels", "areads"))
    worker = durable_worker("worker", "-P", pool, "-c", "4")
    before = areads.delay().get(timeout=30)
    for _ in range(3):
        result = cancels.delay()
        result.get(timeout=30, propagate=False)
        assert (result.status, result.error.error_type) == ("failed", "CancelledError")
    assert areads.delay().get(timeout=30) == before, worker.output()
