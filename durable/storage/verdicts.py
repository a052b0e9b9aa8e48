"""Which limited rows may go: what a claim has found, and what it makes of that. No SQL.

Rows are judged in pick order, each against what its key and its bucket have left after those before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from durable.instance import Claimed
from durable.limits import key_lane, rate_lane
from durable.storage.tallies import Bucket, Key

LAST = (32767, datetime(9999, 12, 31, tzinfo=UTC))


class Row(NamedTuple):
    """A limited row as it is judged; `ours`: of the claim's queue, and of a machine that its worker knows."""

    id: int
    priority: int
    eligible_at: datetime
    queue: str
    lane: str | None
    key: str | None
    bucket: str | None
    weight: int
    crashes: int
    ours: bool
    machine: str
    step: str

    @property
    def place(self) -> tuple[int, datetime, int]:
        """In the pick order."""
        return self.priority, self.eligible_at, self.id


@dataclass(frozen=True, slots=True)
class Demand:
    """What a worker process asks for.

    limit      rows at most
    slots      rows with a rate limit at most: as many as slots wait, since those are never prefetched
    window     candidates to look at; they are locked, and so hidden from other claims
    alone      whether the process holds nothing, so that a row with a crash behind it may be claimed, alone
    position   from where in the pick order to look for unlimited rows, which must not wait longer; None: there are none
    """

    worker: int
    queue: str
    limit: int
    slots: int
    alone: bool
    window: int = 100
    unknown: Sequence[str] = ()
    position: tuple[int, datetime] | None = None


@dataclass(slots=True)
class Denied:
    """What kept rows of the claim's queue from going.

    busy       rows parked since another instance of their key, which has no gate, executes
    gates      key -> rows that found no slot of its gate
    buckets    bucket -> rows that found too few tokens
    unknown    rows parked since their rate limit does not exist
    contended  rows left alone since other claims have their bucket
    """

    busy: list[Row] = field(default_factory=list)
    gates: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    unknown: list[Row] = field(default_factory=list)
    contended: int = 0


@dataclass(slots=True)
class Admitted:
    """What a claim did.

    rows        claimed, best first
    ready       rows that were made candidates for others, per queue
    parked      candidates that were parked
    again       something was in flux, or room is left: worth another look at once
    wants_slot  a row with a rate limit could go, if a slot waited for it
    suspect     a row with a crash behind it could go, if the process held nothing
    opens_in    seconds until the first token lane that was seen opens
    denied      what it did not admit, for whoever watches
    """

    rows: list[Claimed] = field(default_factory=list)
    ready: Counter[str] = field(default_factory=Counter)
    parked: int = 0
    again: bool = False
    wants_slot: bool = False
    suspect: bool = False
    opens_in: float | None = None
    denied: Denied = field(default_factory=Denied)


@dataclass(slots=True)
class Tally:
    """Everything a decision looks at and everything it decides. A name that is not in `keys`/`buckets` is in flux."""

    demand: Demand
    to: tuple[int, datetime] = LAST
    keys: dict[str, Key] = field(default_factory=dict)
    buckets: dict[str, Bucket] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    """Buckets whose limit does not exist."""
    taken: set[str] = field(default_factory=set)
    """Buckets that other claims have."""
    admitted: list[tuple[int, int | None]] = field(default_factory=list)
    rated: int = 0
    """Admitted rows with a rate limit."""
    moved: dict[int, str | None] = field(default_factory=dict)
    result: Admitted = field(default_factory=Admitted)


def decide(tally: Tally, rows: Iterable[Row]) -> None:
    """Decide about every row, in pick order."""
    for row in sorted(rows, key=lambda row: row.place):
        key = tally.keys.get(row.key) if row.key is not None else None
        bucket = tally.buckets.get(row.bucket) if row.bucket is not None else None
        if row.bucket in tally.gone:
            _park(tally, row, rate_lane(str(row.bucket)), tally.result.denied.unknown)
        elif key is not None and key.free <= 0:
            _deny_key(tally, row, key)
        elif bucket is not None and not bucket.fits(row.weight):
            _deny_bucket(tally, row, bucket)
        elif (row.key is not None and key is None) or (row.bucket is not None and bucket is None):
            # In flux; or the other thing a parked row needs has not been looked at: as a candidate it will be.
            tally.result.again = True
            tally.result.denied.contended += row.bucket in tally.taken
            if row.lane is not None:
                tally.moved[row.id] = None
        elif _may_go(tally, row, bucket):
            tally.admitted.append((row.id, key.draw() if key else None))
            if bucket:
                bucket.take(row.weight)
            if row.crashes:
                break
        else:
            if row.lane is not None:
                tally.moved[row.id] = None
            if row.ours or row.queue != tally.demand.queue:  # else nobody may know its machine any more
                if key:
                    key.reserve()
                if bucket:
                    bucket.reserve(row.weight)


def _deny_key(tally: Tally, row: Row, key: Key) -> None:
    denied = tally.result.denied
    if not key.firm:
        tally.result.again = True
        return
    if key.shards is not None and row.queue == tally.demand.queue:
        denied.gates[str(row.key)] += 1
    _park(tally, row, key_lane(str(row.key)), denied.busy if key.shards is None else None)


def _deny_bucket(tally: Tally, row: Row, bucket: Bucket) -> None:
    denied, here = tally.result.denied, row.queue == tally.demand.queue
    if bucket.blocked is None:
        bucket.blocked = row.weight
    if not bucket.firm:
        tally.result.again = True
        denied.contended += here
        return
    denied.buckets[str(row.bucket)] += here
    _park(tally, row, rate_lane(str(row.bucket)))


def _may_go(tally: Tally, row: Row, bucket: Bucket | None) -> bool:
    """Whether a row that its limits let go may be claimed by this process now."""
    demand, result = tally.demand, tally.result
    if not row.ours or (row.priority, row.eligible_at) > tally.to:
        return False
    if row.crashes:
        result.suspect = not demand.alone or bool(tally.admitted)
        return not result.suspect
    if len(tally.admitted) >= demand.limit:
        result.again = True
        return False
    if bucket is not None:
        if tally.rated >= demand.slots:
            result.wants_slot = True
            return False
        tally.rated += 1
    return True


def _park(tally: Tally, row: Row, lane: str, noted: list[Row] | None = None) -> None:
    """Leave a row to its lane; one that comes there now, and is of our queue, is noted."""
    if row.lane != lane:
        tally.moved[row.id] = lane
        if noted is not None and row.queue == tally.demand.queue:
            noted.append(row)
