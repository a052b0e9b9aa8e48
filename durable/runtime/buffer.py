"""What passes between a worker process's two threads: claimed rows one way, outcomes the other.

The slot (main thread) takes rows and hands outcomes over; the engine (the thread with the connection) fills and
empties both ends. Every operation is one atomic deque or list operation under the GIL; the two only block on events.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from durable.instance import Claimed
from durable.storage.claims import Commit


class Buffer:
    """Claimed rows that wait for the slot. `wake_engine` is called when the slot finds it empty."""

    def __init__(self, wake_engine: Callable[[], None]) -> None:
        self._rows: deque[Claimed] = deque()
        self._ready = threading.Event()
        self._wake_engine = wake_engine
        self.slot_waits = False
        self._closed = False

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free(self) -> int:
        """How many slots have neither a row nor one waiting for them."""
        return int(self.slot_waits and not self._rows)

    def put(self, rows: Iterable[Claimed]) -> None:
        """Engine: add claimed rows, best first."""
        self._rows.extend(rows)
        if self.slot_waits:
            self._ready.set()

    def put_first(self, rows: Iterable[Claimed]) -> None:
        """Engine: add rows before all others."""
        self._rows.extendleft(rows)
        if self.slot_waits:
            self._ready.set()

    def take(self) -> Claimed | None:
        """Slot: the next row; blocks while there is none, None when the buffer was closed."""
        while True:
            try:
                return self._rows.popleft()
            except IndexError:
                pass
            if self._closed:
                return None
            self._ready.clear()
            self.slot_waits = True
            if not self._rows and not self._closed:
                self._wake_engine()
                self._ready.wait()
            self.slot_waits = False

    def take_back(self, keep: int = 0) -> list[Claimed]:
        """Engine: remove the last rows, leaving `keep`."""
        rows: list[Claimed] = []
        try:
            while len(self._rows) > keep:
                rows.append(self._rows.pop())
        except IndexError:
            pass  # the slot took the last one meanwhile: it is not ours to give back
        return rows

    def close(self) -> None:
        """Engine: let the slot end once it has finished what it runs."""
        self._closed = True
        self._ready.set()


class Outbox:
    """Outcomes that wait for the flush. `ring` wakes the engine; it is called only when that is worth it."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._commits: list[Commit] = []
        self._ring = ring
        self._committed = threading.Event()
        self._handed = 0
        self._settled = 0
        self.oldest_at = 0.0
        self.wake_at: float = math.inf
        """How many outcomes wake the engine: infinitely many while it is awake."""
        self.slot_waits = False

    def __len__(self) -> int:
        return len(self._commits)

    def hand_over(self, commit: Commit) -> None:
        """Slot: pass an outcome on."""
        if not self._commits:
            self.oldest_at = time.monotonic()
        self._handed += 1
        self._commits.append(commit)
        if len(self._commits) >= self.wake_at:
            self.wake_at = math.inf
            self._ring()

    def take(self, most: int) -> list[Commit]:
        """Engine: the oldest outcomes, at most `most`."""
        taken = self._commits[:most]
        del self._commits[: len(taken)]
        self.oldest_at = time.monotonic()
        return taken

    def settled(self, count: int) -> None:
        """Engine: these many outcomes are durable, or known to be stale."""
        self._settled += count
        if self.slot_waits:
            self._committed.set()

    def settled_all(self) -> None:
        """Engine: nothing that was handed over will ever commit."""
        self._settled = self._handed
        self._committed.set()

    def wait_until_durable(self) -> None:
        """Slot: block until everything handed over is settled."""
        while self._settled < self._handed:
            self._committed.clear()
            self.slot_waits = True
            if self._settled < self._handed:
                self._ring()
                self._committed.wait()
            self.slot_waits = False
