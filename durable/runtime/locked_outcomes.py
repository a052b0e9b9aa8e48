"""Outcomes put aside because another session holds a lock that they need.

The rows stay claimed: the process holds them, its heartbeats keep them, and an outcome whose claim is lost turns out
stale as any other. Each is offered again after a growing pause. A pause is also kept in proportion to how long
the last turn took, so that rows that stay locked for hours cost a process a fraction of its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from durable.storage.claims import Commit

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two tries of one outcome."""
SHARE = 5
"""A turn that took t seconds is followed by one after SHARE * t seconds at the earliest."""
MOST = 10_000
"""Outcomes that wait in one process before it stops claiming: each is in memory."""


@dataclass(slots=True)
class _Entry:
    commit: Commit
    parent: int | None
    due: float
    pause: float


class LockedOutcomes:
    """The outcomes of one process that wait for locks, one of each instance."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[int, _Entry] = {}
        self._parents: dict[int, int] = {}
        self._not_before = -math.inf

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether no more rows should be claimed until some of these are committed."""
        return len(self._entries) >= MOST

    @property
    def due(self) -> float:
        """time.monotonic() at which the next is to be tried; infinite when there is none."""
        if not self._entries:
            return math.inf
        return max(self._not_before, min(entry.due for entry in self._entries.values()))

    def holds_up(self, commit: Commit) -> bool:
        """Whether an outcome needs a parent's row that another session was seen to hold."""
        return commit.claimed.reports_to in self._parents

    def put(self, commit: Commit, parent: int | None) -> None:
        """Put an outcome aside.

        parent  the parent's row that is held; None: the instance's own, or something else
        """
        instance_id = commit.claimed.id
        before = self._entries.pop(instance_id, None)
        if before is not None:
            self._forget_parent(before)
        pause = FIRST_PAUSE if before is None else min(2 * before.pause, LONGEST_PAUSE)
        self._entries[instance_id] = _Entry(commit, parent, self._clock() + pause, pause)
        if parent is not None:
            self._parents[parent] = self._parents.get(parent, 0) + 1

    def take_due(self, most: int) -> list[Commit]:
        """Return the outcomes to try now, the longest due first, at most `most`; they stay until `forget`."""
        now = self._clock()
        if now < self._not_before:
            return []
        ready = sorted((entry.due, instance_id) for instance_id, entry in self._entries.items() if entry.due <= now)
        return [self._entries[instance_id].commit for _, instance_id in ready[:most]]

    def took(self, seconds: float) -> None:
        """A turn took that long."""
        self._not_before = self._clock() + SHARE * seconds

    def forget(self, instances: Iterable[int]) -> None:
        """These are durable, stale, or no longer this process's."""
        for instance_id in instances:
            entry = self._entries.pop(instance_id, None)
            if entry is not None:
                self._forget_parent(entry)

    def clear(self) -> list[Commit]:
        """Forget all; return them."""
        commits = [entry.commit for entry in self._entries.values()]
        self._entries.clear()
        self._parents.clear()
        return commits

    def _forget_parent(self, entry: _Entry) -> None:
        if entry.parent is not None:
            left = self._parents[entry.parent] - 1
            if left:
                self._parents[entry.parent] = left
            else:
                del self._parents[entry.parent]
