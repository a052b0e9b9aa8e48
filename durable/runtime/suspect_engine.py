"""The engine of a process that runs rows with a crash behind them, alone: beside one of many slots (quarantine.py)."""

from __future__ import annotations

import time

from durable.runtime.engine import Engine
from durable.runtime.shared import BUSY, IDLE


class SuspectEngine(Engine):
    """Claims one row at a time, and only such that has a crash behind it."""

    _look = True

    def _hear_of_suspect(self) -> None:
        self._look = True

    def _demand(self) -> int:
        return int(self._look and not self._held and not self._seat.paused)

    def _claim_if_wanted(self) -> None:
        if not self._demand() or time.monotonic() >= self._seat.deadline:
            return
        self._seat.state = IDLE  # before the claim that may find nothing: who hears of one then rings us
        rows = self._claimed(self._picker.claim_suspect(self._worker))
        if not rows:
            unknown = self._picker.unknown
            # A limit of 0: only rows that are claimed alone are none of those.
            rows = self._claimed(self._limited.claim(self._worker, 0, 0, True, unknown, None))
        self._look = bool(rows)
        if rows:
            self._seat.state = BUSY
            self.buffer.put(rows)

    def _give_back_excess(self) -> None:
        if self._seat.paused:
            self._release(self.buffer.take_back())
