"""Claimed rows on their way to many slots of one process, and how many of these are free.

The engine puts rows in; slots, which are threads or an event loop, take them. A slot is taken from the moment at which
it takes a row until `leave`, so that the engine never claims for a slot twice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from durable.instance import Claimed


class SharedBuffer:
    """Claimed rows for at most `slots` slots.

    wake_engine  called when a slot comes free after there was none
    allowed      returns how many slots may be taken at the moment
    """

    def __init__(self, wake_engine: Callable[[], None], slots: int, allowed: Callable[[], int]) -> None:
        self._rows: deque[Claimed] = deque()
        self._changed = threading.Condition()
        self._wake_engine = wake_engine
        self._allowed = allowed
        self._closed = False
        self.slots = slots
        self.taken = 0
        """Slots that have a row."""
        self.moved_at = 0.0
        """time.monotonic() when a row was last put in or taken."""
        self.on_rows: Callable[[], None] | None = None
        """Called in the engine's thread when there are rows, or no more will come."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def most(self) -> int:
        """How many slots may be taken at the moment."""
        return min(self.slots, self._allowed())

    @property
    def free(self) -> int:
        """How many slots have neither a row nor one waiting for them."""
        return max(0, self.most - self.taken - len(self._rows))

    def put(self, rows: Iterable[Claimed]) -> None:
        """Engine: add claimed rows, best first."""
        with self._changed:
            self._rows.extend(rows)
        self._tell()

    def put_first(self, rows: Iterable[Claimed]) -> None:
        """Engine: add rows before all others."""
        with self._changed:
            self._rows.extendleft(rows)
        self._tell()

    def _tell(self) -> None:
        self.moved_at = time.monotonic()
        with self._changed:
            self._changed.notify(len(self._rows))
        if self.on_rows is not None:
            self.on_rows()

    def take(self) -> Claimed | None:
        """Slot: the next row; blocks while there is none, None when the buffer was closed."""
        with self._changed:
            while (row := self._next()) is None and not self._closed:
                self._changed.wait()
            return row

    def take_now(self) -> Claimed | None:
        """Slot: the next row, None when there is none or no slot is free."""
        with self._changed:
            return self._next()

    def _next(self) -> Claimed | None:
        if not self._rows or self.taken >= self.most:
            return None
        self.taken += 1
        self.moved_at = time.monotonic()
        return self._rows.popleft()

    def leave(self) -> None:
        """Slot: free again."""
        with self._changed:
            full = self.taken >= self.most
            self.taken -= 1
            if self._rows:
                self._changed.notify()
        if full:
            self._wake_engine()

    def take_back(self, keep: int = 0) -> list[Claimed]:
        """Engine: remove the last rows, leaving `keep`."""
        rows: list[Claimed] = []
        with self._changed:
            while len(self._rows) > keep:
                rows.append(self._rows.pop())
        return rows

    def close(self) -> None:
        """Engine: let slots end once they have finished what they run."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self.on_rows is not None:
            self.on_rows()

    @property
    def closed(self) -> bool:
        """Whether no more rows will come."""
        return self._closed
