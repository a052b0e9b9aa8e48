"""`soft_time_limit`: SoftTimeLimitExceeded is raised inside a step that runs too long.

A sync step is interrupted by SIGALRM, a coroutine by an exception thrown into it where it awaits. Only user code is
ever interrupted, never what the runtime does before and after. A signal is the whole process's and is handled in its
main thread, so there is one alarm per process; where `install` was not called, as in tests that drain in their own
process, sync steps are not interrupted.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from durable.instance import Claimed
from durable.outcomes import SoftTimeLimitExceeded
from durable.runtime.coroutines import CoroutineRunner

T = TypeVar("T")
Within = Callable[[float | None, CoroutineRunner, bool, Callable[[], Any]], Any]
"""What `within` is."""

_armed: float | None = None
_installed = False
_put_off = False
_late = False


def install() -> None:
    """Take SIGALRM over; called in the main thread of a worker process."""
    global _installed
    signal.signal(signal.SIGALRM, _ring)
    _installed = True


def within(seconds: float | None, coroutines: CoroutineRunner, is_async: bool, call: Callable[[], Any]) -> Any:
    """Return what a step returns, a coroutine's result if it is one; `seconds` None for no limit.

    Raises what the step raises.
    """
    if seconds is None:
        return coroutines.run(call()) if is_async else call()
    if is_async:
        return coroutines.run(awithin(call(), seconds))
    with _alarm(seconds):
        return call()


@contextmanager
def _putting_off() -> Iterator[None]:
    """An alarm that comes meanwhile interrupts after."""
    global _put_off, _late
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal comes here
        return
    _put_off = True
    try:
        yield
    finally:
        _put_off = False
    if _late:
        _ring(signal.SIGALRM, None)


def beginning(begin: Callable[[Claimed, bool], T], claimed: Claimed, is_async: bool, keep: Callable[[T], None]) -> None:
    """Begin something for a step and have it kept: both or, if that fails, neither, whatever alarm comes."""
    with _putting_off():
        keep(begin(claimed, is_async))


def _ring(_number: int, _frame: object) -> None:
    global _armed, _late
    _late = _put_off
    if _late:
        return
    seconds, _armed = _armed, None
    if seconds is not None:
        raise SoftTimeLimitExceeded(seconds)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    global _armed, _late
    if not _installed:
        yield
        return
    _armed, _late = seconds, False
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        _armed = None  # first: an alarm that comes now interrupts nothing any more
        signal.setitimer(signal.ITIMER_REAL, 0)


async def awithin(coroutine: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """Return what a step's coroutine returns, on whatever loop this one is run by."""
    return await _limited(coroutine, seconds)


@types.coroutine
def _limited(coroutine: Coroutine[Any, Any, Any], seconds: float) -> Generator[Any, Any, Any]:
    """Drive a coroutine, and throw into it when its time is over.

    Cancelling the task wakes it from whatever it awaits; the CancelledError arrives here, outermost, and is exchanged.
    """
    task = asyncio.current_task()
    assert task is not None, "run by a loop"
    over = False

    def expire() -> None:
        nonlocal over
        over = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    value: Any = None
    error: BaseException | None = None
    try:
        while True:
            try:
                awaited = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            value = error = None
            try:
                value = yield awaited
            except asyncio.CancelledError as cancelled:
                error = cancelled
                if over:
                    over = False
                    task.uncancel()
                    error = SoftTimeLimitExceeded(seconds)
            except BaseException as problem:
                error = problem
    finally:
        timer.cancel()
