"""The claim of limited rows: which of them may go, which are parked, and what that takes. SQL in sql/limits.sql.

One short transaction of a few statements; what is decided between them is `verdicts.decide`. It looks at the queue's
candidates and, for keys and buckets that have something left, at the best rows parked in their lanes, in pick order:

* A row for which there is room is admitted: executing, with a slot and tokens taken.
* A candidate for which there is none is parked in the lane of what it lacks; a parked row stays as it is.
* Something locked by somebody else is in flux: rows that need it are left as candidates, to be looked at again.
* Room that this claim leaves (it wanted fewer rows, they are of another queue) is passed on: the next rows of the lane
  become candidates, for whoever looks next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from durable.instance import Claimed
from durable.limits import key_lane, name_of, rate_lane
from durable.storage import lanes
from durable.storage.arrays import Int4Array, Int8Array, TextArray, TimestampArray
from durable.storage.session import Operation
from durable.storage.tallies import Bucket, Key, Slots, Tokens, missing, share, token_time
from durable.storage.verdicts import LAST, Admitted, Demand, Row, Tally, decide

__all__ = ["LAST", "Admitted", "Demand", "claim_limited", "limited_waits"]

MOST_NAMES = 64
"""Keys and buckets that one claim locks: each takes a place in the server's lock table for a moment."""
PASSED_ON = 20
"""About how many parked rows one claim makes candidates for others, one per lane at least."""
MOST_DUE = 20


def claim_limited(demand: Demand) -> Operation[Admitted]:
    """Claim limited rows. Needs a transaction; raises UniqueViolation when another claim took a key after all."""
    if not (yield "live_lease", {"worker": demand.worker, "queue": demand.queue}):
        return Admitted()
    tally = Tally(demand)
    if demand.position is not None:
        head = yield (
            "unlimited_head",
            {"queue": demand.queue, "from_priority": demand.position[0], "from_time": demand.position[1]},
        )
        if head:
            tally.to = head[0][0], head[0][1]
    rows = yield (
        "limited_candidates",
        {
            "queue": demand.queue,
            "to_priority": tally.to[0],
            "to_time": tally.to[1],
            "unknown": TextArray(demand.unknown),
            "limit": demand.window,
        },
    )
    candidates = [Row(*row) for row in rows]
    due = yield "due_buckets", {"limit": MOST_DUE}
    yield from _assess(tally, candidates, [row[0] for row in due])
    heads = yield from _heads(tally)
    decide(tally, [*candidates, *heads])
    yield from _write(tally, heads)
    return tally.result


def _assess(tally: Tally, candidates: Sequence[Row], due: Sequence[str]) -> Operation[None]:
    """Lock what the candidates need, as far as nobody else has it, and see what it has to give."""
    wanted: dict[str, None] = dict.fromkeys(rate_lane(bucket) for bucket in due)
    for row in candidates:
        for lane in (row.key and key_lane(row.key), row.bucket and rate_lane(row.bucket)):
            if lane and len(wanted) < MOST_NAMES:
                wanted[lane] = None
    if not wanted:
        return
    rows = yield "try_names", {"names": TextArray(list(wanted))}
    got = {name for name, is_ours in rows if is_ours}
    if len(got) < len(wanted):
        tally.result.again = True
        lost = wanted.keys() - got
        tally.taken = {row.bucket for row in candidates if row.bucket is not None and rate_lane(row.bucket) in lost}
    keys = sorted({row.key for row in candidates if row.key is not None and key_lane(row.key) in got})
    buckets = sorted(
        {bucket for bucket in (*due, *(row.bucket for row in candidates)) if bucket and rate_lane(bucket) in got}
    )
    rows = yield (
        "limits_named",
        {
            "gates": TextArray(sorted({name_of(key) for key in keys})),
            "rates": TextArray(sorted({name_of(bucket) for bucket in buckets})),
        },
    )
    gates = {row[1]: (row[2], row[5]) for row in rows if row[0] == "concurrency"}
    rates = {row[1]: (row[2], row[3], row[4], row[5]) for row in rows if row[0] == "rate"}
    if keys:
        yield from _assess_keys(tally, keys, gates)
    tally.gone = {bucket for bucket in buckets if name_of(bucket) not in rates}
    buckets = [bucket for bucket in buckets if bucket not in tally.gone]
    if buckets:
        yield from _assess_buckets(tally, buckets, rates)


def _assess_keys(tally: Tally, keys: Sequence[str], gates: dict[str, tuple[int, int]]) -> Operation[None]:
    tally.keys = {key: Key() for key in keys}
    gated = [key for key in keys if name_of(key) in gates]
    ungated = [key for key in keys if name_of(key) not in gates]
    holders = yield "key_holders", {"keys": TextArray(keys), "ungated": TextArray(ungated)}
    for name, locked in holders:
        tally.keys[name].held += 1
        tally.keys[name].firm &= locked
    if not gated:
        return
    locked_shards = yield from lanes.lock_gates(gated)
    there = yield "gate_shards", {"keys": TextArray(gated)}
    for name in gated:
        key = tally.keys[name]
        limit, shards = gates[name_of(name)]
        key.shards = {row[1]: Slots(*row[2:]) for row in locked_shards if row[0] == name}
        existing = {row[1] for row in there if row[0] == name}
        if existing <= key.shards.keys():
            for number in missing(shards, key.shards):
                key.shards[number] = Slots(0, 0, 0)
                key.changed.add(number)
            key.resize(limit, shards)
        else:
            key.firm = False  # a shard is held by an outcome that commits, or was made meanwhile


def _assess_buckets(
    tally: Tally, buckets: Sequence[str], rates: dict[str, tuple[int, timedelta, int, int]]
) -> Operation[None]:
    locked = yield "lock_buckets", {"buckets": TextArray(buckets)}
    there = yield "bucket_shards", {"buckets": TextArray(buckets)}
    # In a time zone with daylight saving Python subtracts wall clocks: two seconds over an autumn's hour are an hour.
    now = max(row[2] for row in there).astimezone(UTC)
    for name in buckets:
        allowed, period, burst, shards = rates[name_of(name)]
        bucket = Bucket(now, token_time(period, allowed, shards), {})
        for _, number, full_at, opens_at, _ in (row for row in locked if row[0] == name):
            if number < shards:
                bucket.shards[number] = Tokens(full_at.astimezone(UTC), share(burst, shards, number))
            if number == 0:
                bucket.opens_at = opens_at and opens_at.astimezone(UTC)
        existing = {row[1] for row in there if row[0] == name}
        # A cold bucket is full; a shard that a change of the limit adds is as far as the others.
        as_of = max([now, *(shard.full_at for shard in bucket.shards.values())])
        bucket.unstored = missing(shards, existing)
        for number in bucket.unstored:
            bucket.shards[number] = Tokens(as_of, share(burst, shards, number))
        bucket.firm = len(bucket.shards) == shards
        tally.buckets[name] = bucket


def _heads(tally: Tally) -> Operation[list[Row]]:
    """Lock the best parked rows of the lanes that have something to give."""
    most = tally.demand.limit + max(1, PASSED_ON // (len(tally.keys) + len(tally.buckets) or 1))
    wanted = {key_lane(name): min(key.free, most) for name, key in tally.keys.items() if key.free > 0}
    # A bucket without tokens shows its first row too: that says when it opens.
    wanted |= {rate_lane(name): max(1, min(bucket.tokens, most)) for name, bucket in tally.buckets.items()}
    if not wanted:
        return []
    rows = yield (
        "lane_heads",
        {
            "queue": tally.demand.queue,
            "unknown": TextArray(tally.demand.unknown),
            "lanes": TextArray(list(wanted)),
            "counts": Int4Array(list(wanted.values())),
        },
    )
    return [Row(*row) for row in rows]


def _write(tally: Tally, heads: Sequence[Row]) -> Operation[None]:
    result = tally.result
    if tally.admitted:
        rows = yield (
            "admit",
            {
                "worker": tally.demand.worker,
                "ids": Int8Array([row_id for row_id, _ in tally.admitted]),
                "shards": Int4Array([shard for _, shard in tally.admitted]),
            },
        )
        result.rows = [Claimed(*row) for row in rows]
        result.rows.sort(key=lambda row: (row.priority, row.eligible_at, row.id))
    if tally.moved:
        rows = yield (
            "set_lanes",
            {"ids": Int8Array(list(tally.moved)), "lanes": TextArray(list(tally.moved.values()))},
        )
        result.ready.update(queue for queue, lane in rows if lane is None)
        result.parked = sum(lane is not None for _, lane in rows)
    yield from _write_gates(tally)
    yield from _write_buckets(tally, heads)
    if tally.gone:
        yield "close_buckets", {"buckets": TextArray(sorted(tally.gone))}


def _write_gates(tally: Tally) -> Operation[None]:
    changed = [
        (name, number, key.shards[number])
        for name, key in sorted(tally.keys.items())
        if key.shards is not None
        for number in sorted(key.changed)
    ]
    if changed:
        yield (
            "write_gates",
            {
                "keys": TextArray([name for name, _, _ in changed]),
                "shards": Int4Array([number for _, number, _ in changed]),
                "wanteds": Int4Array([slots.wanted for _, _, slots in changed]),
                "capacities": Int4Array([slots.capacity for _, _, slots in changed]),
                "used": Int4Array([slots.used for _, _, slots in changed]),
            },
        )


def _write_buckets(tally: Tally, heads: Sequence[Row]) -> Operation[None]:
    changed: list[tuple[str, int, datetime, datetime | None]] = []
    parked = Counter(lane for lane in tally.moved.values() if lane is not None)
    seen = Counter(row.lane for row in heads)
    for name, bucket in sorted(tally.buckets.items()):
        lane = rate_lane(name)
        opens_at: datetime | None = None
        if bucket.blocked is not None:
            opens_at = bucket.opens_for(bucket.blocked)
        elif parked[lane] or seen[lane]:  # there may be more
            opens_at = bucket.opens_for(1)
        if 0 in bucket.shards and opens_at != bucket.opens_at:
            bucket.changed.add(0)
        elif 0 not in bucket.shards:
            opens_at = None
        if opens_at is not None:
            wait = (opens_at - bucket.now).total_seconds()
            tally.result.opens_in = wait if tally.result.opens_in is None else min(wait, tally.result.opens_in)
        if bucket.changed:
            bucket.changed.update(bucket.unstored)
        changed += [
            (name, number, bucket.shards[number].full_at, opens_at if number == 0 else None)
            for number in sorted(bucket.changed)
        ]
    if changed:
        yield (
            "write_buckets",
            {
                "buckets": TextArray([entry[0] for entry in changed]),
                "shards": Int4Array([entry[1] for entry in changed]),
                "full_ats": TimestampArray([entry[2] for entry in changed]),
                "opens_ats": TimestampArray([entry[3] for entry in changed]),
            },
        )


def limited_waits(queue: str, unknown: Sequence[str]) -> Operation[tuple[bool, float | None]]:
    """Return whether a queue has limited candidates, and in how many seconds the next token lane opens."""
    rows: list[Any] = yield "limited_waits", {"queue": queue, "unknown": TextArray(unknown)}
    return rows[0][0], rows[0][1]
