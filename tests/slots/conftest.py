"""A tasks.py for workers of many slots, and the tasks as a producer knows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import Durable
from tests.fix_app import Command

START = Callable[..., Command]
WAITS = {"threads": "wait", "asyncio": "await"}
"""The task that waits for a file as is usual in a pool."""
POOLS = list(WAITS)

TASKS = """
    import asyncio, ctypes, hashlib, os, threading, time
    from pathlib import Path
    from durable import Await, Done, Machine, Next, SoftTimeLimitExceeded, Stop, step

    def note(path, text):
        with open(path, "a") as file: file.write(f"{text}\\n")

    @app.task(name="add")
    def add(a, b=1): return a + b

    @app.task(name="aadd")
    async def aadd(a, b=1): return a + b

    @app.task(name="meet")
    def meet(path, n):
        note(path, "here")
        while len(Path(path).read_text().split()) < n: time.sleep(0.01)
        return os.getpid()

    met, all_here = 0, asyncio.Event()

    @app.task(name="ameet")
    async def ameet(n):
        global met
        met += 1
        if met == n: all_here.set()
        await all_here.wait()
        return os.getpid()

    @app.task(name="wait")
    def wait(started, go):
        note(started, os.getpid())
        while not Path(go).exists(): time.sleep(0.01)
        return os.getpid()

    @app.task(name="await")
    async def await_(started, go):
        note(started, os.getpid())
        while not Path(go).exists(): await asyncio.sleep(0.01)
        return os.getpid()

    @app.task(name="soft", soft_time_limit=0.2)
    def soft():
        try:
            while True: time.sleep(0.01)
        except SoftTimeLimitExceeded as limit:
            return f"{limit.seconds} {threading.current_thread().name}"

    @app.task(name="asoft", soft_time_limit=0.2)
    async def asoft():
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded as limit:
            return f"{limit.seconds} {threading.current_thread().name}"

    @app.task(name="stuck", time_limit=0.4)
    def stuck(started, go):
        # In one long call that no exception reaches.
        note(started, os.getpid())
        while not Path(go).exists():
            try:
                time.sleep(0.02)
            except BaseException:
                pass
        note(started, "late")
        return "late"

    @app.task(name="astuck", time_limit=0.4)
    async def astuck(started, go):
        note(started, os.getpid())
        while not Path(go).exists():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                pass
        note(started, "late")
        return "late"

    @app.task(name="slow", time_limit=0.4)
    def slow():
        while True: time.sleep(0.01)

    @app.task(name="aslow", time_limit=0.4)
    async def aslow(): await asyncio.sleep(600)

    @app.task(name="block", time_limit=0.4)
    async def block(path):
        if not Path(path).exists():
            Path(path).touch()
            time.sleep(600)
        return "moved"

    @app.task(name="hold_gil", time_limit=0.4)
    def hold_gil(path):
        if not Path(path).exists():
            Path(path).touch()
            ctypes.PyDLL(None).usleep(int(60e6))
        return "let go"

    @app.machine(name="unmade")
    class Unmade(Machine):
        def __init__(self): raise ConnectionError("no server there")
        @step(initial=True)
        async def start(self, ctx): return Done()

    running, most = 0, 0

    @app.task(name="alone")
    def alone():
        global running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return most

    @app.task(name="aalone")
    async def aalone():
        global running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return most

    @app.task(name="write", bind=True)
    def write(ctx, table, fail=False):
        ctx.connection.execute(f"INSERT INTO {table} VALUES (%s)", [ctx.id])
        time.sleep(0.02)
        if fail and ctx.attempt == 0: raise ctx.retry(countdown=0)
        return os.getpid()

    @app.task(name="awrite", bind=True)
    async def awrite(ctx, table, fail=False):
        connection = ctx.connection
        await connection.execute(f"INSERT INTO {table} VALUES (%s)", [ctx.id])
        await asyncio.sleep(0.02)
        if fail and ctx.attempt == 0: raise ctx.retry(countdown=0)
        return os.getpid()

    @app.task(name="cancelled", bind=True)
    def cancelled(ctx, started):
        note(started, ctx.id)
        while not ctx.cancel_requested: time.sleep(0.01)

    @app.task(name="acancelled", bind=True)
    async def acancelled(ctx, started):
        note(started, ctx.id)
        while not ctx.cancel_requested: await asyncio.sleep(0.01)

    @app.machine(name="m", inline=True)
    class M(Machine):
        @step(initial=True)
        async def first(self, ctx): return Next("second", state={"a": 1})
        @step
        def second(self, ctx): return Next("third", state={**ctx.state, "b": 2})
        @step
        async def third(self, ctx): return Await("go", then="last", timeout=60)
        @step
        async def last(self, ctx): raise ValueError(ctx.awaited[0].payload)
        async def handle(self, error, ctx): return Done({**ctx.state, "error": str(error)})
"""
NAMES = [
    "add",
    "aadd",
    "meet",
    "ameet",
    "wait",
    "await",
    "soft",
    "asoft",
    "stuck",
    "astuck",
    "slow",
    "aslow",
    "block",
    "hold_gil",
    "alone",
    "aalone",
    "write",
    "awrite",
    "cancelled",
    "acancelled",
]


@pytest.fixture
def tasks(app: Durable, tasks_module: Callable[[str], Path]) -> dict[str, Any]:
    """The tasks by name, as a producer knows them; tasks.py is written for the workers."""
    tasks_module(TASKS)
    bound = {"write", "awrite", "cancelled", "acancelled"}
    return {name: app.task(name=name, bind=name in bound)(lambda *args, **kwargs: None) for name in NAMES}


def lines(path: Path) -> list[str]:
    """What has been written into a file so far."""
    return path.read_text().split() if path.exists() else []
