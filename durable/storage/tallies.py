"""What keys, gates and buckets have to give, as a claim found them under its locks. Plain arithmetic; no SQL.

Slots and tokens are counted in shards: parts of a gate or bucket that are locked one by one, so that an outcome that
commits holds up only the part it touches. What could not be locked is left out, which is stricter, never looser.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Container
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from durable.limits import MAX_REFILL

_MICROSECOND = timedelta(microseconds=1)
MOST_SIMULATED = 1000
"""Tokens whose times are worked out one by one."""
MOST_OWED = timedelta(seconds=2 * MAX_REFILL)
"""What rows may owe a bucket: a limit that was lowered makes tokens dear for those that waited before."""


def share(total: int, shards: int, shard: int) -> int:
    """Return what one of `shards` parts gets of `total`; 0 beyond them."""
    return total // shards + (shard < total % shards) if shard < shards else 0


@dataclass(slots=True)
class Slots:
    """One shard of a gate, locked."""

    wanted: int
    capacity: int
    used: int


@dataclass(slots=True)
class Key:
    """A concurrency key.

    held    executing instances of it that hold no slot of its gate (all of them when it has none)
    firm    whether the end of every one of those, and every slot given back, has to wait for us: only then may a row
            that finds no room be parked, since its lane is opened after our commit
    shards  of its gate: those that could be locked; None without a gate
    """

    held: int = 0
    firm: bool = True
    shards: dict[int, Slots] | None = None
    changed: set[int] = field(default_factory=set)
    reserved: int = 0

    @property
    def free(self) -> int:
        """How many more may execute."""
        if self.shards is None:
            return 0 if self.held or self.reserved else 1
        return sum(shard.capacity - shard.used for shard in self.shards.values()) - self.held - self.reserved

    def resize(self, limit: int, shards: int) -> None:
        """Make the gate what its limit says now; needs every shard of it.

        The sum of the capacities never exceeds the larger of the limit and what is drawn: a limit that was lowered
        waits for slots to come back.
        """
        assert self.shards is not None, "it has a gate"
        left = max(0, limit - sum(shard.used for shard in self.shards.values()))
        for number, shard in sorted(self.shards.items()):
            wanted = share(limit, shards, number)
            more = min(left, max(0, wanted - shard.used))
            left -= more
            if (shard.wanted, shard.capacity) != (wanted, shard.used + more):
                shard.wanted, shard.capacity = wanted, shard.used + more
                self.changed.add(number)

    def reserve(self) -> None:
        """Leave room for a row that is not for this claim to admit."""
        self.reserved += 1

    def draw(self) -> int | None:
        """Take room for a row; return the shard it came from, None for a key without a gate."""
        if self.shards is None:
            self.held += 1
            return None
        number = max(self.shards, key=lambda n: self.shards[n].capacity - self.shards[n].used)  # type: ignore[index]
        self.shards[number].used += 1
        self.changed.add(number)
        return number


@dataclass(slots=True)
class Tokens:
    """One shard of a bucket, locked: when it is full again, what it holds then."""

    full_at: datetime
    size: int


@dataclass(slots=True)
class Bucket:
    """A token bucket: GCRA, one timestamp per shard.

    token     time that a token takes to come back, in one shard
    firm      whether every shard could be locked, so that what we say of the time it opens is true
    opens_at  when the first row parked in its lane may go, as it was stored
    blocked   weight of the first row that found too few tokens; whatever comes behind it waits too
    unstored  shards that are stored with the first that changes: one that is missing beside others counts as drawn
    """

    now: datetime
    token: timedelta
    shards: dict[int, Tokens]
    firm: bool = True
    opens_at: datetime | None = None
    blocked: int | None = None
    changed: set[int] = field(default_factory=set)
    unstored: Collection[int] = ()
    reserved: int = 0

    @property
    def size(self) -> int:
        """Tokens of a full bucket, as far as it could be locked."""
        return sum(shard.size for shard in self.shards.values())

    def _tokens(self, shard: Tokens) -> int:
        """None where a heavy row owes some."""
        missing = max(shard.full_at, self.now) - self.now
        return max(0, (shard.size * self.token - missing) // self.token)

    @property
    def tokens(self) -> int:
        """Tokens there are now."""
        return sum(self._tokens(shard) for shard in self.shards.values()) - self.reserved

    def fits(self, weight: int) -> bool:
        """Whether a row of that weight may go; one heavier than a full bucket may when it is full."""
        return self.blocked is None and self.tokens >= min(weight, self.size) > 0

    def reserve(self, weight: int) -> None:
        """Leave tokens for a row that is not for this claim to admit."""
        self.reserved += weight

    def take(self, weight: int) -> None:
        """Take that many tokens, from the fullest shards first; what a heavy row takes too much is owed."""
        left = weight
        by_tokens = sorted(self.shards, key=lambda n: self._tokens(self.shards[n]), reverse=True)
        for number in by_tokens:
            shard = self.shards[number]
            part = min(left, self._tokens(shard))
            if number == by_tokens[-1]:
                part = left
            if part:
                owed = min(part, MOST_OWED // self.token) * self.token
                shard.full_at = min(max(shard.full_at, self.now) + owed, self.now + MOST_OWED)
                self.changed.add(number)
            left -= part

    def opens_for(self, weight: int) -> datetime:
        """When there will be tokens for a row of that weight, if nobody takes any before."""
        lacking = min(weight, self.size) - self.tokens
        if lacking <= 0:
            return self.now
        nexts = [
            (self._next(shard), number) for number, shard in self.shards.items() if self._tokens(shard) < shard.size
        ]
        if len(nexts) == 1:
            at, number = nexts[0]
            wait = min(lacking - 1, MOST_OWED // self.token) * self.token
            return min(at + wait, self.shards[number].full_at)
        heapq.heapify(nexts)
        at = self.now
        # Too early for more than these, and for more than the bucket holds beside what is left for others: whoever
        # looks then sees that.
        for _ in range(min(lacking, MOST_SIMULATED)):
            if not nexts:
                break
            at, number = heapq.heappop(nexts)
            if at + self.token <= max(self.shards[number].full_at, self.now):
                heapq.heappush(nexts, (at + self.token, number))
        return at

    def _next(self, shard: Tokens) -> datetime:
        """When a shard that is not full has its next token."""
        return max(shard.full_at, self.now) - (shard.size - self._tokens(shard) - 1) * self.token


def token_time(period: timedelta, allowed: int, shards: int) -> timedelta:
    """Return what a token takes to come back in one of `shards`, in whole microseconds, rounded up."""
    return -(-period * shards // (allowed * _MICROSECOND)) * _MICROSECOND


def missing(shards: int, there: Container[int]) -> list[int]:
    """Return the numbers of the shards that are not there."""
    return [number for number in range(shards) if number not in there]
