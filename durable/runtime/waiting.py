"""Waiting while the database is away: a random pause, then the agent's word that it is back.

The agent is the command's one prober, so that a fleet of worker processes does not storm a server that starts.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from durable.runtime.shared import Bell, SharedSeats

PROBER_PATIENCE = 5.0
"""Seconds after which a process tries by itself, whatever the agent says."""


class Waiting:
    """The pauses of one worker process; `stop_asked` as in Engine."""

    def __init__(self, seats: SharedSeats, bell: Bell, stop_asked: Callable[[], float | None]) -> None:
        self._seats = seats
        self._bell = bell
        self._stop_asked = stop_asked
        self._poll = select.poll()
        self._poll.register(bell.reader, select.POLLIN)

    def pause(self, seconds: float) -> bool:
        """Wait that long, and for the agent; return whether the process must be gone."""
        now = time.monotonic()
        patience = now + PROBER_PATIENCE
        until = now + seconds
        while True:
            stop = self._stop_asked()
            now = time.monotonic()
            if stop is not None and now >= stop:
                return True
            if now >= until and (self._seats.database_up or now >= patience):
                return False
            wait = min(0.2, max(0.001, until - now)) if now < until else 0.05
            self._poll.poll(wait * 1000)
            self._bell.silence()
