"""`soft_time_limit`: SoftTimeLimitExceeded is raised inside a step that runs too long.

A sync step is interrupted by a signal, a coroutine by an exception thrown into it where it awaits. Only user code is
ever interrupted, never what the runtime does before and after, nor a call into durable (see `interruption`). A signal
is handled in the main thread, so there is one alarm per process; where `install` was not called, as in tests that drain
in their own process, sync steps are not interrupted.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from durable import forks, interruption
from durable.instance import Claimed
from durable.outcomes import SoftTimeLimitExceeded
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.leftovers import Leftovers

T = TypeVar("T")
Within = Callable[[float | None, CoroutineRunner, bool, Callable[[], Any]], Any]
"""What `within` is."""

RING = getattr(signal, "SIGRTMIN", signal.SIGVTALRM - 5) + 5
"""The signal that interrupts a sync step: not SIGALRM, which is user code's. A real-time signal, where there are any;
else SIGVTALRM."""
AGAIN = 0.002
"""Seconds after which a step is interrupted again that could not be: see `interruption`."""
LONGEST_AGAIN = 0.1
"""Seconds to which a growing pause between such tries is limited: each signal interrupts a system call."""


class _Alarm:
    """Sends a signal to the main thread when the time of its step is over.

    A thread does that, since the process's timer is user code's too. Steps that end in time never wake it: it sleeps
    until the first deadline, and looks then for the one that holds by now.
    """

    def __init__(self) -> None:
        self.at = math.inf
        """time.monotonic() from which the step is beyond its limit."""
        self.seconds = 0.0
        self.waits = False
        """Whether the runtime does something inside of user code that is not to be interrupted."""
        self.missed = False
        """Whether it would have been, meanwhile."""
        self.main = threading.get_ident()
        self._wakes_at = math.inf
        self._stirred = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="durable-soft-limit", daemon=True).start()

    def arm(self, seconds: float) -> None:
        """Main thread: a step with a limit begins."""
        self.seconds = seconds
        self.at = at = time.monotonic() + seconds
        if at < self._wakes_at:
            self._stirred.set()

    def disarm(self) -> None:
        """Main thread: it has ended, or was interrupted."""
        self.at = math.inf

    def _run(self) -> None:
        again = AGAIN
        while True:
            self._stirred.clear()
            at = self.at
            left = at - time.monotonic()
            if left > 0:
                again = AGAIN
            else:
                signal.pthread_kill(self.main, RING)
                left, again = again, min(again * 1.5, LONGEST_AGAIN)
            self._wakes_at = time.monotonic() + left
            if self.at == at:  # else it was armed anew meanwhile
                self._stirred.wait(None if left == math.inf else left)

    def ring(self, _number: int, frame: types.FrameType | None) -> None:
        """The handler of the signal."""
        beyond = time.monotonic() - self.at
        if beyond < 0:
            return  # the step that it was meant for has ended
        if self.waits:
            self.missed = True
        elif beyond < interruption.LONGEST_DELAY and interruption.in_our_code(frame):
            interruption.late[self.main] = self.expired
        elif (error := self.expired()) is not None:
            raise error

    def expired(self) -> SoftTimeLimitExceeded | None:
        """Return the interruption of the step that runs, if it is due; it is told once."""
        if time.monotonic() < self.at:
            return None
        self.disarm()
        return SoftTimeLimitExceeded(self.seconds)


_alarm: _Alarm | None = None
_leftovers: Leftovers | None = None


def install() -> None:
    """Interrupt sync steps from now on; called in the main thread of a worker process."""
    global _alarm
    _alarm = _Alarm()
    forks.handle(RING, _alarm.ring)
    _alarm.start()


def guard_handlers() -> None:
    """From now on, take back the signal handlers and the alarm that a step leaves behind; in the main thread."""
    global _leftovers
    _leftovers = Leftovers(RING)


def take_back() -> None:
    """Take back what user code has left behind. In another thread than the main one it can leave nothing."""
    if _leftovers is not None and threading.get_ident() == _leftovers.main:
        _leftovers.take_back()


@interruption.boundary
def within(seconds: float | None, coroutines: CoroutineRunner, is_async: bool, call: Callable[[], Any]) -> Any:
    """Return what a step returns, a coroutine's result if it is one; `seconds` None for no limit.

    Raises what the step raises.
    """
    alarm = _alarm
    try:
        if is_async:
            coroutine = call() if seconds is None else awithin(call(), seconds)
            value = coroutines.run(coroutine)
        elif seconds is None or alarm is None:
            value = call()
        else:
            alarm.arm(seconds)
            try:
                value = call()
            finally:
                alarm.disarm()  # first: what rings now interrupts nothing any more
                if interruption.late:
                    interruption.late.pop(alarm.main, None)
    except BaseException as error:
        if forks.strayed:
            forks.end(error)
        raise
    finally:
        if _leftovers is not None:
            _leftovers.after_step()
    if forks.strayed:
        forks.end()
    return value


def beginning(begin: Callable[[Claimed, bool], T], claimed: Claimed, is_async: bool, keep: Callable[[T], None]) -> None:
    """Begin something for a step and have it kept: both or, if that fails, neither, whatever limit passes."""
    alarm = _alarm
    if alarm is None or threading.get_ident() != alarm.main:
        keep(begin(claimed, is_async))  # no signal comes here
        return
    alarm.waits, alarm.missed = True, False
    try:
        keep(begin(claimed, is_async))
    finally:
        alarm.waits = False
    if alarm.missed and (error := alarm.expired()) is not None:
        raise error


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
    over = told = False
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds + interruption.LONGEST_DELAY
    timer = loop.call_later(seconds, lambda: expire())

    def expire() -> None:
        nonlocal over, told, timer
        if told:
            return
        if loop.time() < until and interruption.awaits_our_code(coroutine):
            interruption.late[task] = expired
            timer = loop.call_later(AGAIN, expire)
            return
        over = told = True
        task.cancel()

    def expired() -> SoftTimeLimitExceeded | None:
        nonlocal told
        if told:
            return None
        told = True
        return SoftTimeLimitExceeded(seconds)

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
        told = True
        timer.cancel()
        if interruption.late:
            interruption.late.pop(task, None)
