"""A child that a step forks is an ordinary process: it ends with its code, and nobody notices it."""

from __future__ import annotations

import ast
import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from durable import TaskFailed
from tests.fix_app import Command
from tests.fix_db import wait_until

POOLS = {"prefork": ("-c", "1"), "threads": ("-P", "threads", "-c", "2"), "asyncio": ("-P", "asyncio", "-c", "2")}

TASKS = """
    import asyncio, multiprocessing, os, signal, subprocess, sys, time
    from pathlib import Path
    from durable import Done, Machine, Task, step
    from durable.errors import ConnectionUsageError

    def note(text):
        with open("ran.txt", "a") as file: file.write(f"{text}\\n")

    def leave(how):
        note(how)
        if how == "exit": sys.exit(7)
        if how == "text": sys.exit("why")
        if how == "raise": raise ValueError("in the child")
        if how == "interrupt": raise KeyboardInterrupt
        if how == "_exit": os._exit(9)

    def waited(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    @app.task(name="quick", max_attempts=1)
    def quick(n): note(n)

    @app.task(name="forks", max_attempts=1)
    def forks(how):
        pid = os.fork()
        if pid == 0: return leave(how)
        return waited(pid)

    @app.task(name="aforks", max_attempts=1)
    async def aforks(how):
        await asyncio.sleep(0)
        pid = os.fork()
        if pid == 0:
            if how == "await": await asyncio.sleep(0)
            if how == "future": await asyncio.get_event_loop().create_future()
            return leave(how)
        return waited(pid)

    @app.task(name="gathered", max_attempts=1)
    async def gathered(how):
        async def part():
            pid = os.fork()
            if pid == 0: return leave(how)
            return waited(pid)
        return (await asyncio.gather(part()))[0]

    class Hooked(Task):
        def before_start(self, task_id, args, kwargs):
            pid = os.fork()
            if pid == 0: return leave(args[0])
            note(f"child {waited(pid)}")

    @app.task(name="hooked", base=Hooked, max_attempts=1)
    def hooked(how): note("hooked ran")

    @app.machine(name="handles")
    class Handles(Machine):
        @step(initial=True)
        def first(self, ctx): raise ValueError("mine")

        def handle(self, error, ctx):
            pid = os.fork()
            if pid == 0: return leave(ctx.state["how"])
            return Done(waited(pid))

    @app.machine(name="constructed")
    class Constructed(Machine):
        def __init__(self):
            pid = os.fork()
            self.code = waited(pid) if pid else None

        @step(initial=True)
        def first(self, ctx):
            note("step of the machine")
            return Done(self.code)

    @app.task(name="children", max_attempts=1)
    def children():
        codes = []
        for way in ("fork", "forkserver", "spawn"):
            child = multiprocessing.get_context(way).Process(target=time.sleep, args=(30,))
            child.start()
            child.terminate()
            child.join(10)
            codes.append(child.exitcode)
        return codes

    @app.task(name="pool_left", max_attempts=1)
    def pool_left():
        began = time.monotonic()
        with multiprocessing.get_context("fork").Pool(2) as pool: pool.map_async(time.sleep, [60, 60])
        return time.monotonic() - began < 30

    @app.task(name="dispositions", max_attempts=1)
    def dispositions(numbers):
        reader, writer = os.pipe()
        if os.fork() == 0:
            wakeup = signal.set_wakeup_fd(-1)
            found = [str(signal.getsignal(number)) for number in numbers]
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            os.write(writer, repr((found, wakeup, blocked)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe: return pipe.read()

    @app.task(name="executed", max_attempts=1)
    def executed(code, prepared):
        prepare = (lambda: None) if prepared else None
        run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, preexec_fn=prepare)
        return run.stdout.decode()

    @app.task(name="sends", max_attempts=1)
    def sends():
        quick.delay("before")
        pid = os.fork()
        if pid == 0: return quick.delay("from the child")
        return waited(pid)

    @app.task(name="connects", bind=True, max_attempts=1)
    def connects(ctx, first):
        if first: ctx.connection.execute("SELECT 1")
        pid = os.fork()
        if pid == 0:
            try: ctx.connection.execute("SELECT 1")
            except Exception as error: sys.exit(3 if isinstance(error, ConnectionUsageError) else 4)
            sys.exit(0)
        code = waited(pid)
        return code, ctx.connection.execute("SELECT 2").fetchone()[0]

    @app.task(name="orphan", max_attempts=1)
    def orphan(stays):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number in range(3): os.dup2(os.open(os.devnull, os.O_RDWR), number)
            quick.delay("opened")
            app.close()
            Path("orphan").write_text(str(os.getpid()))
            time.sleep(60)
        while not Path("orphan").exists(): time.sleep(0.01)
        if stays: time.sleep(60)

    @app.task(name="limited", time_limit=0.5, max_attempts=1)
    def limited():
        if os.fork() == 0: sys.exit(0)
        time.sleep(60)
"""


class Pool:
    """A worker of one process, and its tasks."""

    def __init__(self, folder: Path, command: Command, tasks: dict[str, Any]) -> None:
        self.folder = folder
        self.command = command
        self._tasks = tasks
        self.process = command.started("durable:default")

    def run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a task or machine to its end and return its result."""
        return self._tasks[name].delay(*args, **kwargs).get(timeout=20)

    def start(self, name: str, *args: Any) -> Any:
        return self._tasks[name].delay(*args)

    def ran(self) -> Counter[str]:
        """What the tasks and their children have noted."""
        path = self.folder / "ran.txt"
        return Counter(path.read_text().splitlines()) if path.exists() else Counter()

    def is_unharmed(self) -> bool:
        """Whether the one worker process is there still, runs steps, and has no child."""
        self.run("quick", "after")
        children = Path(f"/proc/{self.process[0]}/task/{self.process[0]}/children").read_text().split()
        return self.command.children("durable:default") == self.process and not children


@pytest.fixture(params=POOLS)
def pool(
    request: pytest.FixtureRequest,
    app: Any,
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
) -> Iterator[Pool]:
    folder = tasks_module(TASKS)
    tasks = runpy.run_path(str(folder / "tasks.py"))
    yield Pool(folder, durable_worker("worker", *POOLS[request.param]), tasks)
    tasks["app"].close()


CODES = {"exit": 7, "text": 1, "raise": 1, "interrupt": -signal.SIGINT, "return": 0, "_exit": 9}


def test_child_ends_with_its_code(pool: Pool) -> None:
    neighbours = [pool.start("quick", f"neighbour {n}") for n in range(20)]
    for how, code in CODES.items():
        for name in ("forks", "aforks"):
            assert (name, how, pool.run(name, how)) == (name, how, code)
    assert (pool.run("gathered", "exit"), pool.run("gathered", "interrupt")) == (7, -signal.SIGINT)
    for neighbour in neighbours:
        neighbour.get(timeout=20)
    ran = pool.ran()
    assert all(ran[f"neighbour {n}"] == 1 for n in range(20))
    assert [ran[how] for how in CODES] == [3 if how in ("exit", "interrupt") else 2 for how in CODES]
    assert "ValueError: in the child" in pool.command.output()
    assert "why" in pool.command.output()
    assert pool.is_unharmed()


def test_child_of_async_step_cannot_await(pool: Pool) -> None:
    neighbours = [pool.start("aforks", "return") for _ in range(10)]
    assert [pool.run("aforks", how) for how in ("await", "future")] == [1, 1]
    assert [neighbour.get(timeout=20) for neighbour in neighbours] == [0] * 10
    assert pool.ran() == {"return": 10}
    assert pool.is_unharmed()


def test_child_of_hook_ends_before_the_step(pool: Pool) -> None:
    for how in ("exit", "return"):
        pool.run("hooked", how)
        assert pool.run("Handles", how=how) == CODES[how]
    assert pool.run("Constructed") == 0
    ran = pool.ran()
    assert ran == {"exit": 2, "return": 2, "child 7": 1, "child 0": 1, "hooked ran": 2, "step of the machine": 1}
    assert pool.is_unharmed()


def test_child_has_default_signals(pool: Pool) -> None:
    numbers = sorted({int(number) for number in signal.valid_signals()} - {signal.SIGKILL, signal.SIGSTOP})
    code = f"import signal; print([str(signal.getsignal(number)) for number in {numbers}])"
    outside = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode()
    assert ast.literal_eval(outside) == ast.literal_eval(pool.run("executed", code, False))
    assert ast.literal_eval(outside) == ast.literal_eval(pool.run("executed", code, True))
    found, wakeup, blocked = ast.literal_eval(pool.run("dispositions", numbers).replace("set()", "()"))
    assert [_kind(text) for text in found] == [_kind(text) for text in ast.literal_eval(outside)]
    assert (wakeup, blocked) == (-1, ())


def _kind(text: str) -> str:
    """The name of a handler without its address."""
    return text.split(" at ")[0]


def test_terminate_ends_child_of_step(pool: Pool) -> None:
    assert pool.run("children") == [-signal.SIGTERM] * 3
    assert pool.run("pool_left") is True


def test_child_may_enqueue(pool: Pool) -> None:
    assert pool.run("sends") == 0
    wait_until(lambda: pool.ran() == {"before": 1, "from the child": 1})
    assert pool.is_unharmed()


def test_child_has_no_step_connection(pool: Pool) -> None:
    assert pool.run("connects", False) == [3, 2]
    assert pool.run("connects", True) == [4, 2]


def test_orphan_keeps_nothing_of_the_worker(pool: Pool) -> None:
    stays = pool.start("orphan", True)
    wait_until((pool.folder / "orphan").exists)
    orphan = int(wait_until((pool.folder / "orphan").read_text))  # type: ignore[call-overload]
    try:
        kept = {os.readlink(entry) for entry in Path(f"/proc/{orphan}/fd").iterdir()}
        assert not [name for name in kept if name.startswith(("socket:", "pipe:"))]
        os.kill(pool.command.pid, signal.SIGKILL)
        pool.command.process.wait()
        wait_until(lambda: not Path(f"/proc/{pool.process[0]}").exists())
        assert Path(f"/proc/{orphan}").exists()
        assert stays.status == "executing"
    finally:
        with suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)


def test_time_limit_holds_after_fork(pool: Pool) -> None:
    with pytest.raises(TaskFailed, match="WorkerLost"):
        pool.run("limited")
