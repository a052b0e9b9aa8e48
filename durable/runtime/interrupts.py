"""Time limits of steps that run in threads: an exception is raised in that very thread, inside user code only.

A thread is interrupted where it runs Python code; one that waits in C (`time.sleep`, a socket) hears of it when that
returns. CPython's PyThreadState_SetAsyncExc only leaves a note that the thread finds later, so that each step has a
region: whoever opens and closes it, and whoever interrupts, do so under one lock, and closing withdraws a note that was
not found yet.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from durable import forks, interruption
from durable.instance import Claimed
from durable.outcomes import SoftTimeLimitExceeded

T = TypeVar("T")


class HardTimeLimitExceeded(BaseException):
    """Frees a thread whose step was given up. What the step makes of it does not count any more."""


class Interrupter:
    """The region of one thread that runs steps, one after another."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._open = False
        self._puts_off = False
        self._note: type[BaseException] | None = None
        """Left for the thread, and not found by it yet."""
        self._soft_at: float | None = None
        self._seconds = 0.0

    @interruption.boundary
    def run(self, call: Callable[[], Any], seconds: float | None, now: float) -> Any:
        """Return what user code returns; raises what it raises, or what interrupts it. `seconds`: its soft limit."""
        self._seconds = seconds or 0.0
        self._soft_at = None if seconds is None else now + seconds
        self._note = None
        self._open = True
        try:
            value = call()
            if forks.strayed:
                forks.end()
            return value
        except BaseException as error:
            if forks.strayed:
                forks.end(error)
            raise
        finally:
            while self._open:  # here, not in `_close`: a note may be found as soon as that is entered
                try:
                    self._close()
                except (SoftTimeLimitExceeded, HardTimeLimitExceeded):
                    continue  # found on the way out: too late to count

    def _close(self) -> None:
        with self._lock:
            if self._note is not None:
                self._leave_note(None)
            self._soft_at = None
            self._open = False
            if interruption.late:
                interruption.late.pop(self._thread, None)

    def look(self, now: float) -> None:
        """Watch: interrupt user code that is beyond its soft limit; a call of ours comes to its end first."""
        soft_at = self._soft_at
        if soft_at is None or now < soft_at:
            return
        with self._lock:
            if self._soft_at is None or not self._open:
                return
            if now < soft_at + interruption.LONGEST_DELAY:
                time.sleep(0)  # so that this thread keeps the GIL until it has looked and left its note
                if self._in_our_code():
                    interruption.late[self._thread] = self._expired
                    return
            self._soft_at = None
            self._interrupt(SoftTimeLimitExceeded, self._seconds)

    def _in_our_code(self) -> bool:
        return interruption.in_our_code(sys._current_frames().get(self._thread))

    def _expired(self) -> SoftTimeLimitExceeded | None:
        """The thread itself: return the interruption that is due."""
        with self._lock:
            if self._soft_at is None or not self._open:
                return None
            self._soft_at = None
            return SoftTimeLimitExceeded(self._seconds)

    def give_up(self) -> None:
        """Watch: interrupt user code that was given up."""
        with self._lock:
            if self._open:
                self._soft_at = None
                self._interrupt(HardTimeLimitExceeded)

    def _interrupt(self, kind: type[BaseException], *args: Any) -> None:
        def found(error: BaseException) -> None:
            self._note = None
            kind.__init__(error, *args)

        # A class for this once: Python makes the instance itself, without arguments, when the thread finds it.
        body = {"__init__": found, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        self._note = type(kind.__name__, (kind,), body)
        if not self._puts_off:
            self._leave_note(self._note)

    def _leave_note(self, kind: type[BaseException] | None) -> None:
        note = None if kind is None else ctypes.py_object(kind)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), note)

    def undisturbed(self, call: Callable[[], None]) -> None:
        """Run something of the runtime inside of user code; an interruption that comes meanwhile comes after."""
        with self._lock:
            self._puts_off = True
            if self._note is not None:
                self._leave_note(None)
        try:
            call()
        finally:
            with self._lock:
                self._puts_off = False
                note = self._note
            if note is not None:
                raise note


class ThreadLimits:
    """What runs user code in the threads of one process: see `soft_limit` for the process of a single slot.

    clock  time.monotonic
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._threads = threading.local()

    def begin_thread(self) -> Interrupter:
        """A thread that runs steps begins."""
        self._threads.interrupter = Interrupter()
        return self._threads.interrupter  # type: ignore[no-any-return]

    def within(self, seconds: float | None, _coroutines: Any, _is_async: bool, call: Callable[[], Any]) -> Any:
        """Return what a plain step returns; raises what it raises."""
        interrupter: Interrupter = self._threads.interrupter
        return interrupter.run(call, seconds, self._clock())

    def beginning(
        self, begin: Callable[[Claimed, bool], T], claimed: Claimed, is_async: bool, keep: Callable[[T], None]
    ) -> None:
        """Begin something for a step and have it kept: both or, if that fails, neither, whatever limit passes."""
        interrupter: Interrupter | None = getattr(self._threads, "interrupter", None)
        if interrupter is None:
            keep(begin(claimed, is_async))  # a thread that the step has started
        else:
            interrupter.undisturbed(lambda: keep(begin(claimed, is_async)))
