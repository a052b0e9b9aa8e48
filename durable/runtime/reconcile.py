"""When a worker process compares what it holds with what the database says it holds: a clock, nothing else."""

from __future__ import annotations

import math
import time

LATE_CLAIM = 60.0
"""Seconds after an error during which a claim that we gave up on may still commit on the server."""


class Reconcile:
    """At once after an error, then every `interval` seconds while anything is held, or a late claim may come."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._suspicious_until = -math.inf
        self.at = math.inf
        """time.monotonic() when it is due."""

    def holding(self) -> None:
        """Rows are held."""
        if self.at == math.inf:
            self.at = time.monotonic() + self._interval

    def failed(self) -> None:
        """A statement failed: it may have taken place all the same."""
        self.at = 0.0
        self._suspicious_until = time.monotonic() + LATE_CLAIM

    def again(self, seconds: float) -> None:
        """Rows could not be released, since other sessions hold them: compare again after that many seconds."""
        self.at = min(self.at, time.monotonic() + seconds)

    def done(self, *, holding: bool) -> None:
        """It was compared."""
        now = time.monotonic()
        self.at = now + self._interval if holding or now < self._suspicious_until else math.inf
