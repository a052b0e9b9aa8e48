"""Tasks and machines that harm their process: they fork, and raise what ends a process wherever user code is called.

Each has a right end, as every other instance has: what it does may cost its own attempt, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from durable import Done, Durable, Machine, Next, Task, celery_signals, step
from tests.chaos import effects
from tests.chaos.effects import effect

LEAVES = ("return", "sys.exit", "exception", "interrupt", "os._exit", "late")
"""How a child that a step forks ends; `late`: it returns after the step has."""
BUSY = ("process", "pool", "SIGINT", "SIGHUP", "SIGTERM")
"""What a step starts and ends again: a process, a pool at work, a command that it signals."""
RAISES: dict[str, type[BaseException]] = {
    "exit": SystemExit,
    "interrupt": KeyboardInterrupt,
    "generator-exit": GeneratorExit,
    "cancelled": asyncio.CancelledError,
    "memory": MemoryError,
    "error": RuntimeError,
}
BEFORE, AFTER = ("before_start", "prerun"), ("on_success", "success", "after_return", "postrun")
PLACES: dict[str, tuple[str, int]] = {
    **dict.fromkeys((*BEFORE, *AFTER), ("done", 1)),
    **dict.fromkeys(("body", "on_failure", "failure", "str", "json", "filter", "handler"), ("failed", 1)),
    **dict.fromkeys(("on_retry", "retry"), ("failed", 2)),
}
"""Where a task of the load raises, how it has to end all the same, and after how many outcomes."""
RECEIVED = ("prerun", "postrun", "success", "failure", "retry")
STEP_PLACES = ("step", "handle", "outcome")
LOOP_PLACES: dict[str, str | None] = {
    "body": "failed", "gathered": "failed", "left": "done", "nested": "failed", "stops": None,
}  # fmt: skip
"""Where a coroutine of the load raises, and how it has to end; None: either way, its neighbours are what counts."""
ON_DUTY = "CHAOS_EFFECTS"
"""In the environment of the fleet, and not of the harness, which inserts."""
ENDS_SOON = 5.0
"""Seconds within which a child that was told to end is gone."""


class Unasked(Exception):
    """What a step raises so that what is called for a failure is called."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(str(given))
        self.given = given


class Odd(Exception):
    """Its text can't be had."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __str__(self) -> str:
        leave(self.kind)

    __repr__ = __str__


class Unwritable:
    """A result whose encoding raises."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __json__(self) -> Any:
        leave(self.kind)

    def __repr__(self) -> str:
        leave(self.kind)


def leave(kind: str) -> NoReturn:
    """Raise the exception of that name."""
    raise RAISES[kind](f"as its spec says: {kind}")


def _leave_somehow() -> NoReturn:
    """Raise one after the other, where no spec can say which."""
    leave(list(RAISES)[time.monotonic_ns() // 1000 % len(RAISES)])


def _at(place: str, given: dict[str, Any]) -> None:
    if given.get("place") == place:
        leave(given["kind"])


class Hooked(Task[Any, Any]):
    """A base class each of whose methods raises where its task's arguments say so."""

    def before_start(self, task_id: Any, args: Any, kwargs: Any) -> None:
        _at("before_start", kwargs)

    def on_success(self, retval: Any, task_id: Any, args: Any, kwargs: Any) -> None:
        _at("on_success", kwargs)

    def on_failure(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        _at("on_failure", kwargs)

    def on_retry(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        _at("on_retry", kwargs)

    def after_return(self, status: Any, retval: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        _at("after_return", kwargs)


class _Filter(logging.Filter):
    """Raises at what is logged about a step that says so."""

    def filter(self, record: logging.LogRecord) -> bool:
        _logged("filter", record)
        return True


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _logged("handler", record)


def _logged(place: str, record: logging.LogRecord) -> None:
    text = f"{record.getMessage()} {getattr(record, 'error', '')}"
    for kind in RAISES:
        if f"raise {kind} in a {place}" in text:
            leave(kind)


def _forked(ctx: Any, how: str) -> Any:
    """The child: what it does before its step's code ends in it."""
    effects.note("fork", ctx, how)
    match how:
        case "sys.exit":
            sys.exit(3)
        case "exception":
            raise Unasked({"how": how})
        case "interrupt":
            raise KeyboardInterrupt
        case "os._exit":
            os._exit(0)
        case "late":
            time.sleep(0.7)
    return None


def _gone(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def _ended(pid: int, how: str) -> bool:
    """Wait for a forked child; return whether it went by itself."""
    until = time.monotonic() + ENDS_SOON
    while how != "late":
        if _gone(pid):
            return True
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.01)
    return True


async def _ended_async(pid: int, how: str) -> bool:
    until = time.monotonic() + ENDS_SOON
    while how != "late" and time.monotonic() < until:
        if _gone(pid):
            return True
        await asyncio.sleep(0.01)
    return how == "late" or _ended(pid, how)


def _sleeps(ctx: Any, how: str) -> None:
    effects.note("fork", ctx, how)
    time.sleep(30)


def _starts(ctx: Any, how: str) -> bool:
    """Start something, end it again; return whether it went at once."""
    began = time.monotonic()
    match how:
        case "process":
            child = multiprocessing.get_context("fork").Process(target=_sleeps, args=(ctx, how))
            child.start()
            time.sleep(0.05)
            child.terminate()
            child.join(ENDS_SOON)
            ended = not child.is_alive()
            child.kill()
            child.join()
            return ended
        case "pool":
            with multiprocessing.get_context("fork").Pool(2, effects.note, ("fork", ctx, how)) as pool:
                try:
                    pool.map_async(time.sleep, [30, 30]).get(timeout=0.1)
                except multiprocessing.TimeoutError:
                    began = time.monotonic()
            return time.monotonic() - began < ENDS_SOON
        case _:
            command = subprocess.Popen(["sleep", "30"])
            command.send_signal(getattr(signal, how))
            try:
                command.wait(ENDS_SOON)
            except subprocess.TimeoutExpired:
                command.kill()
                command.wait()
                return False
            return True


def define(app: Durable) -> None:
    """Give an app what harms its processes."""
    _define_forks(app)
    _define_tasks(app)
    _define_coroutines(app)
    _define_machines(app)
    _define_around(app)
    step_log = logging.getLogger("durable.step")
    step_log.addFilter(_Filter())
    step_log.addHandler(_Handler())


def _define_forks(app: Durable) -> None:
    @app.task(name="fork", bind=True, max_attempts=1, time_limit=30)
    def fork(self: Any, k: str, how: str) -> Any:
        with effect(self):
            pass
        child = os.fork()
        if child == 0:
            return _forked(self, how)
        return {"k": k, "left": _ended(child, how)}

    @app.task(name="fork-async", bind=True, max_attempts=1, time_limit=30)
    async def fork_async(self: Any, k: str, how: str) -> Any:
        with effect(self):
            pass
        child = os.fork()
        if child == 0:
            return _forked(self, how)
        return {"k": k, "left": await _ended_async(child, how)}

    @app.task(name="fork-busy", bind=True, max_attempts=1, time_limit=40)
    def busy(self: Any, k: str, how: str) -> Any:
        with effect(self):
            pass
        return {"k": k, "left": _starts(self, how)}

    @app.task(name="fork-orphan", bind=True, max_attempts=1)
    def orphan(self: Any, k: str, how: str) -> Any:
        """Is killed, with its process, while its child lives: once, since the second run sees the crash."""
        with effect(self):
            pass
        if self._claimed.crashes == 0:
            child = os.fork()
            if child == 0:
                effects.note("fork", self, how)
                time.sleep(8)
                os._exit(0)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"k": k, "left": True}

    @app.machine(name="fork-machine", inline=True)
    class ForkMachine(Machine):
        @step(initial=True)
        def first(self, ctx: Any) -> Any:
            with effect(ctx):
                pass
            child = os.fork()
            if child == 0:
                _forked(ctx, ctx.state["how"])
                return Next(self.last)
            return Next(self.last, {**ctx.state, "left": _ended(child, ctx.state["how"])})

        @step
        def last(self, ctx: Any) -> Any:
            with effect(ctx):
                return Done({"k": ctx.state["k"], "left": ctx.state["left"]})


def _define_tasks(app: Durable) -> None:
    @app.task(name="exit", base=Hooked, bind=True, max_attempts=2, retry_for=(Unasked,), backoff=lambda attempt: 0.05)
    def exits(self: Any, k: str, place: str, kind: str) -> Any:
        with effect(self):
            pass
        match place:
            case "body":
                leave(kind)
            case "on_failure" | "failure":
                raise ValueError(k)
            case "on_retry" | "retry":
                raise Unasked({"place": place, "kind": kind})
            case "filter" | "handler":
                raise ValueError(f"raise {kind} in a {place}")
            case "str":
                raise Odd(kind)
            case "json":
                return Unwritable(kind)
        return {"k": k, "place": place, "kind": kind}

    def broken(attempt: int) -> float:
        leave(list(RAISES)[attempt % len(RAISES)])

    @app.task(name="exit-backoff", bind=True, max_attempts=3, retry_for=(Unasked,), backoff=broken)
    def backoff(self: Any, k: str) -> None:
        with effect(self):
            pass
        raise Unasked({"k": k})

    for place in RECEIVED:
        hook = getattr(celery_signals, f"task_{place}")
        hook.connect(partial(_received, place), sender="exit", dispatch_uid=f"chaos-{place}")


def _received(place: str, **values: Any) -> None:
    """A receiver: raises where the arguments say so, or the result, or what is tried again for."""
    given = values.get("kwargs") or values.get("result")
    if given is None and isinstance(values.get("reason"), Unasked):
        given = values["reason"].given
    _at(place, given or {})


def _define_coroutines(app: Durable) -> None:
    @app.task(name="exit-async", bind=True, max_attempts=1)
    async def exits(self: Any, k: str, place: str, kind: str) -> Any:
        with effect(self):
            pass

        async def part() -> None:
            await asyncio.sleep(0.01)
            leave(kind)

        match place:
            case "body":
                leave(kind)
            case "gathered":
                await asyncio.gather(part(), part())
            case "nested":
                await asyncio.create_task(part())
            case "left":
                self.app.chaos_left = asyncio.create_task(part())
            case "stops":
                asyncio.get_running_loop().stop()
                await asyncio.sleep(0.01)
        return {"k": k, "place": place, "kind": kind}


def _define_machines(app: Durable) -> None:
    @app.machine(name="exit-machine")
    class ExitMachine(Machine):
        @step(initial=True)
        def first(self, ctx: Any) -> Any:
            with effect(ctx):
                pass
            match ctx.state["place"]:
                case "step":
                    leave(ctx.state["kind"])
                case "outcome":
                    return Done(Unwritable(ctx.state["kind"]))
            raise ValueError(ctx.state["k"])

        def handle(self, error: BaseException, ctx: Any) -> Any:
            if ctx.state["place"] == "handle":
                leave(ctx.state["kind"])
            raise error

    @app.machine(name="exit-state")
    class ExitState(Machine):
        """Its state can't be built by a worker."""

        @dataclass
        class State:
            k: str
            kind: str

            def __post_init__(self) -> None:
                if ON_DUTY in os.environ:
                    leave(self.kind)

        @step(initial=True)
        def first(self, ctx: Any) -> Any:
            with effect(ctx):
                return Done(ctx.state.k)

    @app.machine(name="exit-init")
    class ExitInit(Machine):
        """Can't be built itself, each time by another exception."""

        def __init__(self) -> None:
            _leave_somehow()

        @step(initial=True)
        def first(self, ctx: Any) -> Any:
            with effect(ctx):
                return Done(ctx.state["k"])


def _define_around(app: Durable) -> None:
    @app.around_step
    @contextmanager
    def around(ctx: Any) -> Iterator[None]:
        if ctx.name == "exit-enter":
            _leave_somehow()
        yield
        if ctx.name == "exit-leave":
            _leave_somehow()

    @app.task(name="exit-enter", bind=True, max_attempts=1)
    def enters(self: Any, k: str) -> str:
        with effect(self):
            return k

    @app.task(name="exit-leave", bind=True, max_attempts=1)
    def leaves(self: Any, k: str) -> str:
        with effect(self):
            return k


NEVER_ENTERED = ("exit-state", "exit-init", "exit-enter")
"""What no step is ever run of."""
HOSTILE = ("fork", "fork-async", "fork-busy", "fork-orphan", "fork-machine", "exit", "exit-backoff", "exit-async",
           "exit-machine", "exit-leave", *NEVER_ENTERED)  # fmt: skip


def right_end(machine: str, given: dict[str, Any]) -> tuple[str | None, Any, int | None]:
    """Return how one of these must end: status (None: done or failed), result, and outcomes where they are known."""
    match machine:
        case "fork-machine":
            return "done", {"k": given["k"], "left": True}, 2
        case "fork" | "fork-async" | "fork-busy" | "fork-orphan":
            return "done", {"k": given["k"], "left": True}, 1
        case "exit":
            status, outcomes = PLACES[given["place"]]
            return status, given if status == "done" else None, outcomes
        case "exit-async":
            status = LOOP_PLACES[given["place"]]
            return status, given if status == "done" else None, None if status is None else 1
        case "exit-backoff":
            return "failed", None, 3
        case "exit-machine" | "exit-state" | "exit-init" | "exit-enter" | "exit-leave":
            return "failed", None, 1
    raise ValueError(f"no right end of {machine}")
