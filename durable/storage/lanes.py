"""Lanes: opening them when something was freed, and mending those that nobody would open. SQL in sql/limits.sql.

Everything that takes a row out of `executing` calls `free` in the same transaction, after the row itself changed;
everything that ends or deletes a waiting row calls `open_lanes` for the lanes that the row may have had to see to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from durable.limits import key_lane
from durable.storage.arrays import Int4Array, TextArray
from durable.storage.session import Operation, Row

Freed = tuple[str | None, int | None]
"""The concurrency key of a row that executes no longer, and the shard of the gate that it drew its slot from."""

PAGE = 1000
"""Lanes that one turn of the repair looks at."""


def free(freed: Iterable[Freed], *, wait: bool = True) -> Operation[dict[str, int]]:
    """Give slots back and open the lanes of their keys, in this order; return how many rows came out, per queue.

    wait  False: neither a slot nor a parked row that another session holds is waited for; `repair` recounts the slots
          and opens the lanes later
    """
    pairs = Counter((key, shard) for key, shard in freed if key is not None)
    if not pairs:
        return {}
    drawn = sorted((key, shard) for key, shard in pairs if shard is not None)
    if drawn and not wait:
        locked = yield from lock_gates(sorted({key for key, _ in drawn}))
        ours = {(row[0], row[1]) for row in locked}
        drawn = [pair for pair in drawn if pair in ours]
    if drawn:
        yield (
            "credit_slots",
            {
                "keys": TextArray([key for key, _ in drawn]),
                "shards": Int4Array([shard for _, shard in drawn]),
                "counts": Int4Array([pairs[pair] for pair in drawn]),
            },
        )
    return (yield from open_lanes({key_lane(key) for key, _ in pairs}, wait=wait))


def open_lanes(lanes: Iterable[str], *, wait: bool = True) -> Operation[dict[str, int]]:
    """Make a candidate of the best row of each lane; return how many, per queue.

    wait  False: a lane whose rows are all held by other sessions is left to `repair`
    """
    ordered = sorted(set(lanes), key=str.encode)
    if not ordered:
        return {}
    rows = yield "open_lanes", {"lanes": TextArray(ordered), "wait": wait}
    return {row[0]: row[1] for row in rows}


def open_due_lanes(limit: int = 100) -> Operation[dict[str, int]]:
    """Open the token lanes that are due and that no worker has opened; return how many rows came out, per queue."""
    rows = yield "open_due_lanes", {"limit": limit}
    return {row[0]: row[1] for row in rows}


def open_lanes_of(kind: str, name: str) -> Operation[dict[str, int]]:
    """Open every lane of a limit that has changed; return how many rows came out, per queue."""
    rows = yield "lanes_of_limit", {"kind": kind, "name": name}
    return (yield from open_lanes(row[0] for row in rows))


def lock_gates(keys: Sequence[str]) -> Operation[list[Row]]:
    """Lock what can be locked of the keys' slots: (key, shard, wanted, capacity, used)."""
    return (yield "lock_gates", {"keys": TextArray(keys)})


def in_use() -> Operation[bool]:
    """Tell whether a row is parked or a slot drawn: without either there is nothing to repair."""
    return bool((yield "limits_in_use", {})[0][0])


def parked(after: str = "") -> Operation[tuple[list[str], str]]:
    """Return a page of the lanes in which rows are parked, and where it ends ("": with the last of them).

    after  where the last page ended
    """
    rows = yield "parked_lanes", {"after": after, "limit": PAGE}
    return [row[0] for row in rows], rows[-1][0] if len(rows) == PAGE else ""


def repair(after: str = "") -> Operation[tuple[dict[str, int], str]]:
    """Mend counters and lanes that contradict what executes. Needs a transaction.

    after  where the last turn stopped in the lanes
    Returns how many rows came out per queue, and where this turn stopped ("": at the end).
    """
    wrong = yield "wrong_gates", {"limit": PAGE}
    lanes: set[str] = set()
    if wrong:
        held = yield from lock_gates(sorted({row[0] for row in wrong}))
        mended = yield (
            "recount_shards",
            {"keys": TextArray([row[0] for row in held]), "shards": Int4Array([row[1] for row in held])},
        )
        lanes |= {key_lane(row[0]) for row in mended}
    any_parked = yield "any_parked", {}
    stopped = ""
    if any_parked[0][0]:
        page, stopped = yield from parked(after)
        unattended = yield "unattended_lanes", {"lanes": TextArray(page)}
        lanes |= {row[0] for row in unattended}
    return (yield from open_lanes(lanes, wait=False)), stopped


def sweep(limit: int = PAGE) -> Operation[tuple[int, int]]:
    """Forget gates and buckets that nobody uses; return how many shards of each there were."""
    gates = yield "sweep_gates", {"limit": limit}
    buckets = yield "sweep_buckets", {"limit": limit}
    return len(gates), len(buckets)
