"""When a worker process claims, how much, and when it commits: the policy behind the engine.

Reads the slot, the buffer and the outbox.
"""

from __future__ import annotations

import time

from durable.config import Config
from durable.runtime.buffer import Buffer, Outbox
from durable.runtime.shared import Seat
from durable.runtime.slot import SHORT_STEP, Slot

BUFFERED_WORK = 0.03
"""Seconds of expected work that the buffer holds at most, when prefetch is auto."""
BEHIND_A_LONG_STEP = 0.05
"""Seconds a step may run before the rows buffered behind it are given back."""
MAX_PREFETCH = 400


class Pacing:
    """The policy of one worker process."""

    def __init__(self, conf: Config, slot: Slot, buffer: Buffer, outbox: Outbox, seat: Seat) -> None:
        self._conf = conf
        self._slot = slot
        self._buffer = buffer
        self._outbox = outbox
        self._seat = seat

    def target(self) -> int:
        """How many rows the buffer should hold; one until the first step has shown how long steps take."""
        if self._conf.prefetch is not None:
            return self._conf.prefetch
        mean = self._slot.mean_step
        if mean is None:
            return 1
        return min(MAX_PREFETCH, int(BUFFERED_WORK / max(mean, 1e-6)))

    def demand(self, *, buffering: bool) -> int:
        """How many rows to claim now; 0 for none.

        buffering  False: only for a slot that waits (a suspect is claimed alone: the buffer runs dry for it)
        """
        if self._seat.paused:
            return 0
        target, waiting = self.target(), len(self._buffer)
        if self._buffer.slot_waits and not waiting:
            return max(1, target)
        if not buffering:
            return 0
        if (self._slot.mean_step or 0.0) >= SHORT_STEP and self._conf.prefetch is None:
            return 0
        room = target - waiting
        least = self._conf.min_demand or max(1, target // 2)
        return room if room >= least else 0

    def keep(self, entered_at: float) -> int | None:
        """How many buffered rows to keep: none behind a long step or of a paused queue, few when they hold too much.

        entered_at  time.monotonic() when the running step began
        Returns None when nothing is to be given back.
        """
        waiting = len(self._buffer)
        if not waiting:
            return None
        if self._seat.paused:
            return 0
        if self._slot.running:
            ran = time.monotonic() - entered_at
            if ran > BEHIND_A_LONG_STEP:
                self._slot.expect(ran)
                return 0
        mean = self._slot.mean_step
        if mean is not None and waiting > 1 and waiting * mean > 4 * BUFFERED_WORK:
            return max(1, self.target())
        return None

    def flush_is_due(self) -> bool:
        """A full set of waiting outcomes goes at once; fewer wait for more only while the slot makes more."""
        waiting = len(self._outbox)
        if not waiting:
            return False
        if waiting >= self._conf.outcomes_per_commit or self._buffer.slot_waits or self._outbox.slot_waits:
            return True
        if not self._slot.running and not len(self._buffer):
            return True  # it has just run its last, and is about to wait
        return time.monotonic() - self._outbox.oldest_at >= self._conf.flush_delay
