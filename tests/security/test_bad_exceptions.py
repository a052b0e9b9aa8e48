"""Whatever a step raises is an outcome: stored in bounded, clean text, and the worker goes on (13, 14)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from durable import Context, Durable, Machine, Stop, step
from durable.errors import TaskFailed
from tests.fix_rows import schema, shared_schema
from tests.machines.driver import Driver, driver, drivers

__all__ = ["driver", "drivers", "schema", "shared_schema"]

MOST = 16_384 + 100


class Rude(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Looking(Exception):
    """Its text is its own text."""

    def __str__(self) -> str:
        return str(self)

    __repr__ = __str__


class Guarded(Exception):
    """Can't be pickled, copied or compared."""

    def __reduce__(self) -> Any:
        raise TypeError("never")

    def __eq__(self, other: object) -> bool:
        raise TypeError("never")

    __hash__ = None  # type: ignore[assignment]


def in_a_circle() -> Exception:
    one, two = ValueError("one"), KeyError("two")
    one.__cause__, two.__cause__ = two, one
    return one


def deep_group() -> Exception:
    group: Exception = ValueError("core")
    for _ in range(500):
        group = ExceptionGroup("layer", [group])
    return group


def long_chain() -> Exception:
    last = ValueError("first")
    for n in range(2000):
        following = ValueError(f"number {n}")
        following.__context__ = last
        last = following
    return last


def noted() -> Exception:
    error = ValueError("noted")
    error.__notes__ = [Rude(), 5, "\ud800"]  # type: ignore[list-item]
    return error


RAISED: dict[str, tuple[Callable[[], BaseException], str, str]] = {
    "50 MB": (lambda: ValueError("start" + "x" * 50_000_000 + "end"), "ValueError", "start"),
    "no text": (Rude, "Rude", "<unprintable Rude>"),
    "text without end": (Looking, "Looking", "<unprintable Looking>"),
    "no pickle": (lambda: Guarded("kept"), "Guarded", "kept"),
    "a circle": (in_a_circle, "ValueError", "one"),
    "a group": (lambda: ExceptionGroup("both", [ValueError("a"), Rude()]), "ExceptionGroup", "both"),
    "500 layers": (deep_group, "ExceptionGroup", "layer"),
    "2000 contexts": (long_chain, "ValueError", "number 1999"),
    "odd notes": (noted, "ValueError", "noted"),
    "nul and surrogate": (lambda: ValueError("a\0b \ud800"), "ValueError", "a\\0b \\ud800"),
    "a long name": (lambda: type("X" * 100_000, (Exception,), {})("named"), "X" * 100, "named"),
    "system exit": (lambda: SystemExit(3), "SystemExit", "3"),
    "keyboard": (KeyboardInterrupt, "KeyboardInterrupt", ""),
    "generator exit": (GeneratorExit, "GeneratorExit", ""),
    "cancelled": (asyncio.CancelledError, "CancelledError", ""),
    "base": (lambda: BaseException("bare"), "BaseException", "bare"),
    "stop iteration": (StopIteration, "StopIteration", ""),
}


@pytest.mark.parametrize("kind", ["task", "async task", "machine", "handled"])
@pytest.mark.parametrize("case", RAISED)
def test_whatever_a_step_raises_is_stored_and_the_next_one_runs(
    app: Durable, driver: Driver, kind: str, case: str
) -> None:
    make, name, message = RAISED[case]

    @app.task(name="task", max_attempts=1)
    def task() -> None:
        raise make()

    @app.task(name="async task", max_attempts=1)
    async def async_task() -> None:
        raise make()

    @app.machine(name="machine")
    class Bad(Machine):
        @step(initial=True)
        def go(self, ctx: Context) -> Any:
            raise make()

    @app.machine(name="handled")
    class Handled(Machine):
        @step(initial=True)
        def go(self, ctx: Context) -> Any:
            raise make()

        def handle(self, error: BaseException, ctx: Context) -> Any:
            return Stop(error)

    @app.task(name="fine")
    def fine() -> int:
        return 1

    bad, after = app.insert(kind), fine.delay()
    driver.drain()
    with pytest.raises(TaskFailed) as failure:
        bad.get(timeout=10)
    told = failure.value
    if kind == "async task" and case == "stop iteration":
        assert told.error_type in ("RuntimeError", "StopIteration")  # Python's own rule for coroutines
    else:
        assert told.error_type.startswith(name)
        assert told.message.startswith(message)
    assert max(map(len, (told.error_type, told.message, told.traceback_text))) < MOST
    assert after.get(timeout=10) == 1
