"""A soft limit reaches the step, whatever call of ours it rings in; alarms and handlers stay with their step."""

from __future__ import annotations

import json
import runpy
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until

POOLS = {"prefork": ("-c", "1"), "threads": ("-P", "threads", "-c", "2"), "asyncio": ("-P", "asyncio", "-c", "2")}

TASKS = """
    import asyncio, signal, time
    from durable import Done, Machine, ScheduleChildren, SoftTimeLimitExceeded, step

    @app.task(name="sink", queue="nobody")
    def sink(n): ...

    CALLS = {
        "delay": lambda ctx: sink.delay(1),
        "signal_many": lambda ctx: app.signal_many([{"target": ctx.id, "name": "x", "payload": {"n": 1}}]),
        "children": lambda ctx: list(ctx.children),
        "cancel": lambda ctx: app.cancel(10**9),
        "status": lambda ctx: app.result(ctx.id).status,
        "encode": lambda ctx: app.codec.encode(list(range(2000)), "list", None),
    }
    ACALLS = {
        "delay": lambda ctx: sink.adelay(1),
        "signal_many": lambda ctx: app.asignal_many([{"target": ctx.id, "name": "x", "payload": {"n": 1}}]),
        "cancel": lambda ctx: app.acancel(10**9),
        "status": lambda ctx: app.result(ctx.id).astatus(),
    }

    def verdict(began, error=None):
        if error is None: return "the limit was never raised"
        if isinstance(error, SoftTimeLimitExceeded): return "soft limit"
        return f"{type(error).__name__}: {error}"

    @app.task(name="calls", bind=True, max_attempts=1, soft_time_limit=0.05)
    def calls(ctx, name):
        began, call = time.monotonic(), CALLS[name]
        try:
            while time.monotonic() - began < 5: call(ctx)
            return verdict(began)
        except BaseException as error: return verdict(began, error)

    @app.task(name="acalls", bind=True, max_attempts=1, soft_time_limit=0.05)
    async def acalls(ctx, name):
        began, call = time.monotonic(), ACALLS[name]
        try:
            while time.monotonic() - began < 5: await call(ctx)
            return verdict(began)
        except BaseException as error: return verdict(began, error)

    @app.task(name="waits", bind=True, max_attempts=1, soft_time_limit=0.2)
    def waits(ctx):
        began = time.monotonic()
        try: sink.delay(1).get(timeout=30, allow_in_step=True)
        except SoftTimeLimitExceeded: return time.monotonic() - began

    @app.task(name="locked", max_attempts=1, soft_time_limit=0.2)
    def locked(key):
        began = time.monotonic()
        try: sink.apply_async((1,), correlation_key=key)
        except SoftTimeLimitExceeded: return [time.monotonic() - began, sink.delay(1).id > 0]

    @app.task(name="alocked", max_attempts=1, soft_time_limit=0.2)
    async def alocked(key):
        began = time.monotonic()
        try: await sink.aapply_async((1,), correlation_key=key)
        except SoftTimeLimitExceeded: return [time.monotonic() - began, (await sink.adelay(1)).id > 0]

    rung = []

    @app.task(name="alarmed", max_attempts=1, soft_time_limit=0.4)
    def alarmed():
        signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try: time.sleep(30)
        except SoftTimeLimitExceeded: return len(rung)

    def leave():
        def handler(number, frame): raise RuntimeError("of another step")
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): signal.signal(number, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.01)

    @app.task(name="leaves", max_attempts=1)
    def leaves(): leave()

    @app.task(name="aleaves", max_attempts=1)
    async def aleaves(): leave()

    @app.machine(name="handles")
    class Handles(Machine):
        @step(initial=True)
        def first(self, ctx): raise ValueError("mine")

        def handle(self, error, ctx):
            leave()
            return Done(None)

    @app.task(name="innocent", max_attempts=1)
    def innocent():
        time.sleep(0.3)
        return [str(signal.getsignal(signal.SIGTERM)), signal.getitimer(signal.ITIMER_REAL)]

    @app.task(name="ainnocent", max_attempts=1)
    async def ainnocent():
        await asyncio.sleep(0.3)
        return [str(signal.getsignal(signal.SIGTERM)), signal.getitimer(signal.ITIMER_REAL)]
"""


class Pool:
    def __init__(self, name: str, command: Command, tasks: dict[str, Any]) -> None:
        self.name = name
        self.command = command
        self._tasks = tasks

    def start(self, name: str, *args: Any) -> Any:
        return self._tasks[name].delay(*args)

    def run(self, name: str, *args: Any) -> Any:
        return self.start(name, *args).get(timeout=20)


@pytest.fixture(params=POOLS)
def pool(
    request: pytest.FixtureRequest,
    app: Any,
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
) -> Iterator[Pool]:
    folder = tasks_module(TASKS)
    tasks = runpy.run_path(str(folder / "tasks.py"))
    yield Pool(request.param, durable_worker("worker", *POOLS[request.param]), tasks)
    tasks["app"].close()


def test_limit_reaches_step_from_any_call(pool: Pool, app: Durable, connection: psycopg.Connection[Any]) -> None:
    names = ["delay"] * 40 + ["signal_many", "children", "cancel", "status", "encode"] * 5
    anames = ["delay"] * 20 + ["signal_many", "cancel", "status"] * 5
    started = [(name, pool.start("calls", name)) for name in names]
    started += [(f"a{name}", pool.start("acalls", name)) for name in anames]
    seen = Counter((name, result.get(timeout=60)) for name, result in started)
    assert {verdict for _, verdict in seen} == {"soft limit"}, json.dumps([str(entry) for entry in seen.items()])
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'durable test'"
    busy = f"{query} AND state <> 'idle'"
    wait_until(lambda: connection.execute(busy).fetchone() == (0,), what="every connection to be free")
    total = connection.execute(query).fetchone()
    assert total is not None
    assert total[0] <= 3 * app.conf.pool_size


def test_limit_interrupts_a_wait_for_a_result(pool: Pool) -> None:
    if pool.name == "prefork":  # a thread is not interrupted while it waits for a lock
        assert pool.run("waits") < 0.9


@pytest.mark.parametrize("name", ["locked", "alocked"])
def test_limit_cuts_a_call_that_waits(pool: Pool, app: Durable, database: str, name: str) -> None:
    if name == "locked" and pool.name != "prefork":
        pytest.skip("a thread is not interrupted while it waits in C")
    with psycopg.connect(database) as holder:
        app.task(name="sink", queue="nobody")(lambda n: None).apply_async((1,), correlation_key="k", connection=holder)
        waited, works = pool.run(name, "k")
        holder.rollback()
    assert 0.9 < waited < 5
    assert works


def test_alarms_of_a_step_ring_beside_its_limit(pool: Pool) -> None:
    if pool.name == "prefork":
        assert 3 <= pool.run("alarmed") <= 9


@pytest.mark.parametrize("name", ["leaves", "aleaves", "Handles"])
def test_leftover_alarm_rings_in_no_other_step(pool: Pool, name: str) -> None:
    if name != "aleaves" and pool.name != "prefork":
        pytest.skip("only the main thread can set a handler")
    other = "ainnocent" if name == "aleaves" else "innocent"
    before = pool.run(other)
    pool.run(name)
    assert pool.run(other) == before
    assert before[1] == [0.0, 0.0]
    assert pool.command.stop(signal.SIGTERM) == 0
