"""Wherever user code is called around a step, what it raises ends at most that attempt of that instance.

Every place x every kind of exception x sync and async x task and machine, through the executor that every pool uses. It
proves that nothing comes out of a step, and which outcome it has; tests/slots/test_containment.py proves with worker
processes of each pool that neighbours and the process are unharmed.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from durable import Cancel, Context, Done, Durable, Machine, ScheduleChildren, Task, celery_signals, step, telemetry
from durable.containment import contain_logging
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.executor import Executor
from durable.storage.claims import Commit
from tests.unit.test_executor import claim, error_of

KINDS: list[Callable[[], BaseException]] = [
    lambda: KeyError("user"),
    lambda: SystemExit("user"),
    lambda: KeyboardInterrupt("user"),
    lambda: GeneratorExit("user"),
    lambda: asyncio.CancelledError("user"),
    lambda: MemoryError("user"),
    lambda: RecursionError("user"),
]
NAMES = [type(kind()).__name__ for kind in KINDS]
HOOKS = {
    "before_start": "done",
    "on_success": "done",
    "after_return": "done",
    "task_prerun": "done",
    "task_postrun": "done",
    "task_success": "done",
    "telemetry": "done",
}
"""Places that only hear of the step: its outcome stands."""
PLACES = {
    **HOOKS,
    "step": "attempt",
    "gathered": "attempt",
    "on_retry": "scheduled",
    "backoff": "scheduled",
    "result": "failed",
    "reason": "failed",
    "text": "scheduled",
    "arguments": "attempt",
}
"""Of tasks, with the outcome. attempt: an Exception is tried again, anything else fails; scheduled: the ValueError that
the step raised itself is tried again."""
MACHINE_PLACES = ("step", "constructor", "state", "handle", "children", "result", "decoder")


@pytest.fixture(autouse=True)
def worker_process() -> Iterator[None]:
    """SIGINT is handled as in a worker process, where KeyboardInterrupt is user code's; receivers leave no trace."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)
    for hook in (celery_signals.task_prerun, celery_signals.task_postrun, celery_signals.task_success):
        hook.receivers.clear()
    celery_signals.connected_task_hooks.clear()
    telemetry.attached.clear()


class Bench:
    """An app that never connects, its executor, and a task that proves after each case that steps still run."""

    def __init__(self) -> None:
        self.app = Durable("unit", dsn="postgresql://nobody@127.0.0.1:1/none", max_attempts=3)
        self.executor = Executor(self.app, CoroutineRunner())
        self.app.task(name="neighbour")(lambda: 1)

        @self.app.task(name="aneighbour")
        async def aneighbour() -> int:
            await asyncio.sleep(0)
            return 1

    def run(self, name: str, state: Any = None, step: str = "run") -> Commit:
        payload = self.app.codec.encode(state or {})
        return self.executor.execute(claim(machine=name, step=step, state_type=payload.type, state=payload.body))

    def check_neighbours(self) -> None:
        for name in ("neighbour", "aneighbour"):
            assert self.run(name).status == "done"


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.executor.close()


def raising(error: Callable[[], BaseException]) -> Callable[..., Any]:
    """Return a function that raises whatever it is called with."""

    def fails(*_: Any, **__: Any) -> Any:
        raise error()

    return fails


class Evil:
    """Raises whatever is done with it."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self._error = error

    def __json__(self) -> Any:
        raise self._error()

    def __repr__(self) -> str:
        raise self._error()

    __str__ = __reduce__ = __repr__


def task_of(app: Durable, place: str, error: Callable[[], BaseException], is_async: bool) -> None:
    """Register the task `t` whose user code raises in one place."""

    fails = raising(error)
    hooks = ("before_start", "on_success", "on_retry", "after_return")
    base = type("Hooked", (Task,), {place: fails}) if place in hooks else Task
    if hasattr(celery_signals, place):
        getattr(celery_signals, place).connect(fails)
    if place == "telemetry":
        telemetry.attach("step.stop", fails)

    class Unprintable(ValueError):
        __str__ = __repr__ = fails

    async def gathered() -> Any:
        await asyncio.gather(asyncio.create_task(part()))

    async def part() -> Any:
        raise error()

    def body() -> Any:
        match place:
            case "step" | "gathered":
                raise error()
            case "result":
                return Evil(error)
            case "reason":
                raise Cancel(Evil(error))
            case "text":
                raise Unprintable
            case "on_retry" | "backoff":
                raise ValueError("the step's own")
        return 1

    def plain() -> Any:
        return body()

    async def coroutine() -> Any:
        if place == "gathered":
            return await gathered()
        return body()

    options: dict[str, Any] = {"backoff": fails} if place == "backoff" else {}
    app.task(name="t", base=base, **options)(coroutine if is_async else plain)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("place", PLACES)
def test_a_task_is_charged_once(bench: Bench, place: str, is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in zip(KINDS, NAMES, strict=True):
        bench.app.definitions.pop(("t", 1), None)
        task_of(bench.app, place, kind, is_async)
        with monkeypatch.context() as patch:
            if place == "arguments":
                patch.setattr(bench.app.codec, "decode", raising(kind))
            commit = bench.run("t")
        expected = PLACES[place]
        if expected == "attempt":
            expected = "scheduled" if isinstance(kind(), Exception) else "failed"
            assert error_of(commit)["type"] == name
        assert commit.status == expected, f"{place} {name}: {commit}"
        bench.check_neighbours()


def machine_of(app: Durable, place: str, error: Callable[[], BaseException], is_async: bool) -> None:
    """Register the machine `m` whose user code raises in one place."""

    def check(here: str) -> None:
        if place == here:
            raise error()

    def children() -> Iterator[Any]:
        yield "neighbour"
        raise error()

    def outcome() -> Any:
        check("step")
        match place:
            case "handle":
                raise ValueError("the step's own")
            case "children":
                return ScheduleChildren(children(), then="go")
            case "result":
                return Done(Evil(error))
        return Done(1)

    @dataclass
    class Checked:
        n: int = 0

        def __post_init__(self) -> None:
            check("state")

    class Base(Machine):
        State = Checked

        def __init__(self) -> None:
            check("constructor")

        def handle(self, error: BaseException, ctx: Any) -> Any:
            check("handle")
            return Done(f"handled {type(error).__name__}")

    class Plain(Base):
        @step
        def go(self, ctx: Context[Any]) -> Any:
            return outcome()

    class Coroutine(Base):
        @step
        async def go(self, ctx: Context[Any]) -> Any:
            await asyncio.sleep(0)
            return outcome()

    app.machine(name="m")(Coroutine if is_async else Plain)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("place", MACHINE_PLACES)
def test_a_machine_is_charged_once(bench: Bench, place: str, is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in zip(KINDS, NAMES, strict=True):
        bench.app.definitions.pop(("m", 1), None)
        machine_of(bench.app, place, kind, is_async)
        with monkeypatch.context() as patch:
            if place == "decoder":
                patch.setattr(bench.app.codec, "decode", raising(kind))
            commit = bench.run("m", step="go")
        if place in ("step", "children", "result"):
            assert commit.status == "done", f"{place} {name}: {commit}"  # `handle` was asked
        else:
            assert commit.status == "failed", f"{place} {name}: {commit}"
            wrapped = place == "state" and isinstance(kind(), Exception)
            assert error_of(commit)["type"] == ("ValidationError" if wrapped else name)
        bench.check_neighbours()


variable: contextvars.ContextVar[str | None] = contextvars.ContextVar("variable", default=None)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_hooks_share_the_context_of_their_step(bench: Bench, is_async: bool) -> None:
    seen: list[str | None] = []

    class Hooked(Task[Any, Any]):
        def before_start(self, *_: Any) -> None:
            seen.append(variable.get())
            variable.set("before")

        def on_success(self, *_: Any) -> None:
            seen.append(variable.get())

    def body() -> None:
        seen.append(variable.get())
        variable.set("step")

    async def coroutine() -> None:
        body()

    bench.app.task(name="t", base=Hooked)(coroutine if is_async else body)
    for _ in range(2):
        bench.run("t")
    assert seen == [None, "before", "step"] * 2


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_handle_shares_the_context_of_its_step(bench: Bench, is_async: bool) -> None:
    seen: list[str | None] = []

    def fails() -> None:
        seen.append(variable.get())
        variable.set("step")
        raise ValueError

    class Base(Machine):
        def handle(self, error: BaseException, ctx: Any) -> Any:
            seen.append(variable.get())
            return Done()

    class Plain(Base):
        @step
        def go(self, ctx: Any) -> Any:
            fails()

    class Coroutine(Base):
        @step
        async def go(self, ctx: Any) -> Any:
            fails()

    bench.app.machine(name="m")(Coroutine if is_async else Plain)
    for _ in range(2):
        bench.run("m", step="go")
    assert seen == [None, "step"] * 2


@pytest.mark.parametrize("where", ["filter", "handler"])
def test_failing_logging_is_told_on_stderr(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("durable.test_containment")

    class Bad(logging.Handler):
        def filter(self, record: logging.LogRecord) -> bool:
            if where == "filter":
                raise SystemExit("a filter")
            return True

        def emit(self, record: logging.LogRecord) -> None:
            raise SystemExit("a handler")

    handler = Bad()
    contain_logging(TimeoutError)
    logger.addHandler(handler)
    try:
        logger.warning("lost %d", 5)
        assert "this record is lost: 'lost %d'" in capsys.readouterr().err
        logger.removeHandler(handler)
        logger.addFilter(raising(TimeoutError))
        with pytest.raises(TimeoutError):
            logger.warning("interrupted")
    finally:
        logger.filters.clear()
        for own in list(logging.root.manager.loggerDict.values()):
            own.__dict__.pop("_log", None)
