"""Signal handlers and alarms that a step leaves behind: they are taken back before the next step begins.

Handlers and the alarm belong to the whole process. In a process of one slot, a step has them for itself while it runs.
Looking whether it changed anything costs two microseconds between other work, a seventh of a no-op job. So steps that
follow each other within a millisecond are looked at together, and always before the process waits for more.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import logging
import signal
import threading
import time
from typing import Any

from durable import forks

log = logging.getLogger(__name__)

LOOK_EVERY = 0.001
"""Seconds within which the steps that follow each other are looked at together."""
MOST_RINGS = 100
"""How often handlers that were left behind may interrupt their own removal."""
WATCHED = tuple(
    int(number)
    for name in ("SIGALRM", "SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGCHLD", "SIGPIPE")
    if (number := getattr(signal, name, None)) is not None
)
"""The signals whose handlers programs replace."""
_getsignal: Any = _signal.getsignal  # signal.getsignal takes a microsecond to make an enum of the answer
_getitimer: Any = _signal.getitimer


class Leftovers:
    """The handlers of this process as they are now; made in the main thread, when no step runs.

    also  one more signal to watch
    """

    def __init__(self, also: int) -> None:
        if _getsignal(signal.SIGALRM) is signal.SIG_DFL or _getsignal(signal.SIGALRM) == 0:
            forks.ignore(signal.SIGALRM)  # an alarm that was left behind would end the process
        self.main = threading.get_ident()
        self._numbers = (*WATCHED, also)
        self._handlers = list(map(_getsignal, self._numbers))
        self._looked_at = 0.0

    def after_step(self) -> None:
        """`take_back` after a step that another may follow at once: the caller takes back before it waits."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY:
            self._looked_at = now
            self.take_back()

    def take_back(self) -> None:
        """Undo what a step has changed, if anything. Never raises; in the main thread."""
        for _ in range(MOST_RINGS):
            try:
                if list(map(_getsignal, self._numbers)) != self._handlers or _getitimer(0)[0]:
                    self._restore()
                return
            except BaseException:  # raised by a handler that the step has left, and too late to count
                log.debug("a signal handler that a step has left behind raised after its step", exc_info=True)

    def _restore(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(self._numbers, self._handlers, strict=True):
            if handler is not None and _getsignal(number) is not handler:
                signal.signal(number, handler)
                if forks.is_ignored(number):
                    signal.siginterrupt(number, False)
