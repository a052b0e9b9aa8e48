"""How full a worker process is, told now and then: the event `scheduler.saturation`."""

from __future__ import annotations

import math
import time

from durable import telemetry
from durable.runtime.buffer import Outbox
from durable.runtime.slots import Policy, Rows, Slots

EVERY = 1.0
"""Seconds between two reports at least."""


class Saturation:
    """Reports while there is work, and once more when the process has come to rest."""

    def __init__(self, queue: str, slot: Slots, buffer: Rows, outbox: Outbox, pacing: Policy) -> None:
        self._queue = queue
        self._slot = slot
        self._buffer = buffer
        self._outbox = outbox
        self._pacing = pacing
        self._next = -math.inf
        self._told_of_rest = False

    @property
    def due(self) -> float:
        """time.monotonic() at which `report` has something to say; infinite when nothing is new, or nobody listens."""
        if "scheduler.saturation" not in telemetry.attached:
            return math.inf
        at_rest = not self._slot.running and not len(self._buffer)
        return math.inf if at_rest and self._told_of_rest else self._next

    def report(self) -> None:
        """Emit the event if it is due."""
        now = time.monotonic()
        if now < self.due:
            return
        in_flight, waiting = int(self._slot.running), len(self._buffer)
        self._next = now + EVERY
        self._told_of_rest = not in_flight and not waiting
        telemetry.emit(
            "scheduler.saturation",
            {
                "in_flight": in_flight,
                "buffer": waiting,
                "concurrency": self._slot.count,
                "prefetch": self._pacing.target(),
                "flush_lag": max(0.0, now - self._outbox.oldest_at) if len(self._outbox) else 0.0,
            },
            {"queue": self._queue},
        )
