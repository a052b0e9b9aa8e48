"""When a worker process looks for limited rows, and what it does with what it finds.

It looks before it goes idle, when a token lane that it has seen opens, at once after one of its own commits opened a
lane of its queue, and otherwise at most every 50 ms beside the unlimited work: one cheap question, and a claim only if
the answer says so.

A row with a rate limit is claimed only for a slot that waits. While the slot is kept busy by a buffer that never runs
dry, `dry` asks the engine to let it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import datetime

from psycopg import errors as pg_errors

from durable.instance import Claimed
from durable.runtime import reporting
from durable.runtime.link import LOCKED, Link
from durable.storage import admission
from durable.storage.admission import Admitted, Demand
from durable.wakeups import Wakeups

log = logging.getLogger(__name__)

BUSY_INTERVAL = 0.05
"""Seconds between two looks beside unlimited work."""
IN_FLUX = 0.005
"""Seconds until rows are looked at again that somebody else was deciding about; doubled up to eight times that."""
MISSED = 0.01
"""Seconds by which a process comes later to the opening of a token lane for each time that others were first."""
MOST_MISSES = 20
PARKING_SHARE = 20
"""One part in so many of its time a process spends on parking rows, while there is unlimited work."""
WINDOW = 20
WIDEST_WINDOW = 200


class LimitedPicker:
    """Claims limited rows for one worker process."""

    def __init__(self, link: Link, queue: str, wakeups: Wakeups, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._queue = queue
        self._wakeups = wakeups
        self._clock = clock
        self.next_at = 0.0
        """clock() at which a look is due though nothing else happens."""
        self.dry = False
        """Whether a row with a rate limit waits for the slot to wait."""
        self.suspect = False
        """Whether a row with a crash behind it waits for the process to hold nothing."""
        self._looked_at = self._not_before = 0.0
        self._patience = IN_FLUX
        self._window = WINDOW
        self._misses = 0

    def look_soon(self) -> None:
        """Something was committed or heard: look again, if the last look is not too near."""
        self.next_at = min(self.next_at, max(self._looked_at + BUSY_INTERVAL, self._not_before))

    def look_now(self) -> None:
        """A lane of the queue was opened."""
        self.next_at = 0.0

    def is_due(self) -> bool:
        """Whether to look now."""
        return self._clock() >= self.next_at

    def claim(
        self,
        worker: int,
        limit: int,
        slots: int,
        alone: bool,
        unknown: list[str],
        position: tuple[int, datetime] | None,
    ) -> list[Claimed]:
        """Claim limited rows, best first; see `Demand`. Raises psycopg.Error: it may have committed or not."""
        self._looked_at = now = self._clock()
        self.next_at = math.inf
        self.dry = self.suspect = False
        candidates, opens_in = self._link.run(admission.limited_waits(self._queue, unknown))
        if not candidates and (opens_in is None or opens_in > 0):
            self._patience, self._window = IN_FLUX, WINDOW
            if opens_in is not None:
                self.next_at = now + self._politely(opens_in)
            return []
        demand = Demand(worker, self._queue, limit, slots, alone, max(self._window, limit), unknown, position)
        try:
            admitted = self._link.run_atomically(admission.claim_limited(demand))
        except pg_errors.UniqueViolation:
            log.info("another claim took the same concurrency key; claiming again")
            admitted = Admitted(again=True)
        except LOCKED:
            log.info("another session holds a row or a key that the claim needs; claiming again")
            admitted = Admitted(again=True)
        reporting.picked(self._queue, worker, limit, len(admitted.rows))
        reporting.admitted(self._queue, admitted)
        self._plan(admitted, now, self._clock() - now, busy=position is not None)
        self._link.notify(self._wakeups.became_ready(admitted.ready))
        return admitted.rows

    def _plan(self, admitted: Admitted, now: float, took: float, *, busy: bool) -> None:
        """Decide when to look again, after there was something to claim.

        took  seconds it took; busy: whether there is unlimited work
        """
        self.dry, self.suspect = admitted.wants_slot, admitted.suspect
        self._not_before = 0.0
        if admitted.parked * 2 >= self._window:
            self._window = min(WIDEST_WINDOW, self._window * 2)
        elif admitted.rows:
            self._window = WINDOW
        if admitted.rows or self.dry or self.suspect:
            self._patience, self._misses = IN_FLUX, 0
            self.next_at = now
        elif admitted.parked:
            # There may be many more to park: beside unlimited work that gets a part of the time.
            self._patience = IN_FLUX
            self.next_at = self._not_before = now + (took * PARKING_SHARE if busy else 0.0)
        else:
            # It is held by other claims, or comes after the unlimited rows, or has just been passed on.
            self.next_at = now + self._patience
            self._patience = min(self._patience * 2, 8 * IN_FLUX)
        if admitted.opens_in is not None and not admitted.rows:
            self.next_at = min(self.next_at, now + self._politely(admitted.opens_in))

    def _politely(self, opens_in: float) -> float:
        """Seconds until a look at a lane that opens then: whoever came in vain lets others be first, and notes it."""
        self._misses = min(self._misses + 1, MOST_MISSES)
        return opens_in + (self._misses - 1) * MISSED
