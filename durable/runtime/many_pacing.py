"""When a worker process of many slots claims, how much, and when it commits: as `pacing`, with its slots together."""

from __future__ import annotations

import time

from durable.config import Config
from durable.runtime.buffer import Outbox
from durable.runtime.pacing import BEHIND_A_LONG_STEP, BUFFERED_WORK, MAX_PREFETCH
from durable.runtime.shared import Seat
from durable.runtime.shared_buffer import SharedBuffer
from durable.runtime.slot import SHORT_STEP
from durable.runtime.slots import Slots


class ManyPacing:
    """The policy of one worker process.

    Free slots are filled whatever steps take. Beyond them it buffers only while steps are short.
    """

    def __init__(self, conf: Config, slots: Slots, buffer: SharedBuffer, outbox: Outbox, seat: Seat) -> None:
        self._conf = conf
        self._slots = slots
        self._buffer = buffer
        self._outbox = outbox
        self._seat = seat

    def target(self) -> int:
        """How many rows to hold beyond those that slots take at once."""
        if self._conf.prefetch is not None:
            return self._conf.prefetch
        mean = self._slots.mean_step
        if mean is None or mean >= SHORT_STEP:
            return 0
        return min(MAX_PREFETCH, int(self._slots.count * BUFFERED_WORK / max(mean, 1e-6)))

    def demand(self, *, buffering: bool) -> int:
        """How many rows to claim now; 0 for none. `buffering` False: only for slots that are free."""
        if self._seat.paused:
            return 0
        free = self._buffer.free
        target = self.target() if buffering else 0
        if free:
            return free + target
        if not target:
            return 0
        room = target - len(self._buffer)
        least = self._conf.min_demand or max(1, target // 2)
        return room if room >= least else 0

    def keep(self, moved_at: float) -> int | None:
        """How many buffered rows to keep: none of a paused queue, or when no slot has come free for a while.

        moved_at  time.monotonic() when a row was last put in or taken
        """
        if not len(self._buffer):
            return None
        if self._seat.paused:
            return 0
        still = time.monotonic() - moved_at
        if still > BEHIND_A_LONG_STEP:
            self._slots.expect(still)
            return 0
        return None

    def flush_is_due(self) -> bool:
        """A full set of waiting outcomes goes at once; fewer wait for more only while steps run that may make them."""
        waiting = len(self._outbox)
        if not waiting:
            return False
        if waiting >= self._conf.outcomes_per_commit or not self._slots.running:
            return True
        return time.monotonic() - self._outbox.oldest_at >= self._conf.flush_delay
