"""The rows that say what each limit is: reading and changing them. SQL in sql/limits.sql."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

from durable.limits import ConcurrencyLimit, RateLimit
from durable.storage import lanes
from durable.storage.arrays import Float8Array, Int4Array, TextArray
from durable.storage.session import Operation

Limit = RateLimit | ConcurrencyLimit
RATE, CONCURRENCY = "rate", "concurrency"
MOST_COUNTED = 100_000
"""Waiting rows that `use` counts at most, for each limit."""


class LimitRow(NamedTuple):
    """One limit as it is stored; `pinned`: set by hand, the app leaves it alone."""

    kind: str
    name: str
    allowed: int
    period: timedelta | None
    burst: int | None
    shards: int
    pinned: bool


class LimitUse(NamedTuple):
    """A limit and what it governs now.

    period   seconds
    in_use   keys that execute, or buckets that are not full
    executing  slots drawn by the keys of a gate
    waiting  rows parked in its lanes, counted up to MOST_COUNTED
    """

    kind: str
    name: str
    allowed: int
    period: float | None
    burst: int | None
    shards: int
    pinned: bool
    in_use: int
    executing: int
    waiting: int


def read() -> Operation[list[LimitRow]]:
    """Return every limit, by kind and name."""
    rows = yield "read_limits", {}
    return [LimitRow(*row) for row in rows]


def use() -> Operation[list[LimitUse]]:
    """Return every limit with what it governs, by kind and name. Not for hot paths."""
    rows = yield "limit_use", {"most": MOST_COUNTED}
    return [LimitUse(*row) for row in rows]


def kind_of(limit: Limit) -> str:
    """Return the kind under which a limit is stored."""
    return RATE if isinstance(limit, RateLimit) else CONCURRENCY


def put(given: Mapping[tuple[str, str], Limit], *, pin: bool = False) -> Operation[dict[str, int]]:
    """Store limits by (kind, name); without `pin` not over those that were set by hand. Needs a transaction.

    Lanes of those that changed are opened; returns how many rows came out, per queue.
    """
    entries = sorted(given.items())
    rows = yield (
        "put_limits",
        {
            "kinds": TextArray([kind for (kind, _), _ in entries]),
            "names": TextArray([name for (_, name), _ in entries]),
            "alloweds": Int4Array([_allowed(limit) for _, limit in entries]),
            "periods": Float8Array([limit.period if isinstance(limit, RateLimit) else None for _, limit in entries]),
            "bursts": Int4Array([limit.size if isinstance(limit, RateLimit) else None for _, limit in entries]),
            "shards": Int4Array([limit.shards for _, limit in entries]),
            "pin": pin,
        },
    )
    ready: dict[str, int] = {}
    for kind, name in rows:
        for queue, count in (yield from lanes.open_lanes_of(kind, name)).items():
            ready[queue] = ready.get(queue, 0) + count
    return ready


def _allowed(limit: Limit) -> int:
    return limit.allowed if isinstance(limit, RateLimit) else limit.limit


def unpin(kind: str, name: str) -> Operation[bool]:
    """Give a limit back to the app; return whether it was there."""
    return bool((yield "unpin_limit", {"kind": kind, "name": name}))


def drop(kind: str, name: str) -> Operation[tuple[bool, dict[str, int]]]:
    """Delete a limit and open its lanes: keys are exclusive without one. Needs a transaction.

    Returns whether it was there, and how many rows came out, per queue.
    """
    rows = yield "drop_limit", {"kind": kind, "name": name}
    return (True, (yield from lanes.open_lanes_of(kind, name))) if rows else (False, {})
