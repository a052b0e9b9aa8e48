"""Inserting instances, reading them back, cancelling and listing them. SQL in sql/instances.sql."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from psycopg.types.json import Jsonb

from durable.errors import DuplicateError
from durable.instance import NewInstance, Snapshot
from durable.limits import lanes_of
from durable.storage.arrays import (
    ByteaArray,
    Float8Array,
    Int4Array,
    Int8Array,
    TextArray,
    TimestampArray,
)
from durable.storage.copying import instance_rows
from durable.storage.lanes import open_lanes
from durable.storage.session import Copied, Operation, Row

INSERT_CHUNK = 5000
"""Rows of one insert statement; larger batches take several in one transaction."""
MOST_BYTES = 256 * 1024 * 1024
"""Of payloads in one insert statement with keys: a message of 1 GiB ends the connection."""
WALKS = 3
"""Walks of a tree that is cancelled: two find everything, a third is for a tree without a mark."""
COPY_FROM = 200
"""Rows from which a COPY is worth its two more round trips; beside rows with keys, ids are drawn anyway: always."""


def insert(new: NewInstance) -> Operation[int]:
    """Insert one instance and return its id. Raises DuplicateError; the caller's transaction stays usable."""
    parameters = {
        "queue": new.queue,
        "priority": new.priority,
        "delay": new.delay,
        "at": new.at,
        "expires_in": new.expires_in,
        "expires_at": new.expires_at,
        "machine": new.machine,
        "machine_version": new.machine_version,
        "step": new.step,
        "state_type": new.state.type,
        "state": new.state.body,
        "max_attempts": new.max_attempts,
        "trace": new.trace,
        "concurrency_key": new.concurrency_key,
        "rate_limit": new.rate_limit,
        "weight": new.weight,
    }
    if new.correlation_key is None:
        ((instance_id,),) = yield "insert_one", parameters
        return int(instance_id)
    parameters["correlation_key"] = new.correlation_key
    parameters["correlation_scope"] = None if new.correlation_scope is None else list(new.correlation_scope)
    rows = yield "insert_one_keyed", parameters
    if rows:
        return int(rows[0][0])
    occupants = yield "occupant", {"key": new.correlation_key}
    if new.on_conflict == "return":
        # Nobody there any more: the key came free between the two statements, so it is ours to take.
        return int(occupants[0][0]) if occupants else (yield from insert(new))
    raise DuplicateError(new.correlation_key, occupants[0][0] if occupants else None)


def insert_many(batch: Sequence[NewInstance]) -> Operation[list[int | None]]:
    """Insert a batch; return an id per row in the given order, None where the key was occupied.

    The caller provides the transaction that makes the statements one. Rows with keys go first and in key order, so that
    two batches with the same new keys cannot deadlock.
    """
    ids: list[int | None] = [None] * len(batch)
    parked, leaders = _park_behind_the_best(batch)
    keys = [new.correlation_key for new in batch]
    keyed = sorted((n for n, key in enumerate(keys) if key is not None), key=lambda n: keys[n] or "")
    unkeyed = [n for n, key in enumerate(keys) if key is None] if keyed else list(range(len(batch)))
    drawn, now = [], 0
    if keyed or len(unkeyed) >= COPY_FROM:
        # Ids rise in the given order, whatever the order of writing: children are read in theirs.
        ((drawn, now),) = yield "new_ids", {"count": len(batch)}
    for chunk in _chunks_by_size(keyed, batch):
        rows = [batch[n] for n in chunk]
        columns = _columns(rows, [parked[n] for n in chunk]) | _key_columns(rows, [drawn[n] for n in chunk])
        ((inserted,),) = yield "insert_many_keyed", columns
        there = set(inserted or ())
        for n in chunk:
            if drawn[n] in there:
                ids[n] = drawn[n]
    for chunk in _chunks(unkeyed):
        rows, lanes = [batch[n] for n in chunk], [parked[n] for n in chunk]
        if drawn:
            made = [drawn[n] for n in chunk]
            yield "copy_instances", Copied(instance_rows(rows, made, now, lanes))
        else:
            ((made,),) = yield "insert_many", _columns(rows, lanes)
        for n, instance_id in zip(chunk, made, strict=True):
            ids[n] = instance_id
    # A candidate whose correlation key was occupied is not there to see to its lane.
    yield from open_lanes((lane for lane, n in leaders.items() if ids[n] is None), wait=False)
    return ids


def _park_behind_the_best(batch: Sequence[NewInstance]) -> tuple[list[str | None], dict[str, int]]:
    """Of the rows that share a lane let the best be the candidate and park the others: they are never written twice.

    Scheduled rows are not parked; they become candidates when they are due.
    Returns the lane of each row, and lane -> index of its candidate.
    """
    parked: list[str | None] = [None] * len(batch)
    best: dict[str, int] = {}
    limited = [
        (n, lanes_of(new.concurrency_key, new.rate_limit))
        for n, new in enumerate(batch)
        if (new.concurrency_key is not None or new.rate_limit is not None) and not new.delay and new.at is None
    ]
    for n, lanes in limited:
        for lane in lanes:
            if lane not in best or batch[n].priority < batch[best[lane]].priority:
                best[lane] = n
    for n, lanes in limited:
        parked[n] = next((lane for lane in lanes if best[lane] != n), None)
    return parked, best


def _chunks(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), INSERT_CHUNK):
        yield order[start : start + INSERT_CHUNK]


def _chunks_by_size(order: list[int], batch: Sequence[NewInstance]) -> Iterator[list[int]]:
    """`_chunks`, each with no more payload than surely fits a message to the server."""
    chunk: list[int] = []
    size = 0
    for n in order:
        size += len(batch[n].state.body)
        if chunk and (size > MOST_BYTES or len(chunk) == INSERT_CHUNK):
            yield chunk
            chunk, size = [], len(batch[n].state.body)
        chunk.append(n)
    if chunk:
        yield chunk


def _columns(batch: Sequence[NewInstance], parked: Sequence[str | None]) -> dict[str, Any]:
    return {
        "queues": TextArray([new.queue for new in batch]),
        "priorities": Int4Array([new.priority for new in batch]),
        "delays": Float8Array([new.delay for new in batch]),
        "ats": TimestampArray([new.at for new in batch]),
        "expires_ins": Float8Array([new.expires_in for new in batch]),
        "expires_ats": TimestampArray([new.expires_at for new in batch]),
        "machines": TextArray([new.machine for new in batch]),
        "machine_versions": Int4Array([new.machine_version for new in batch]),
        "steps": TextArray([new.step for new in batch]),
        "state_types": TextArray([new.state.type for new in batch]),
        "states": ByteaArray([new.state.body for new in batch]),
        "max_attempts": Int4Array([new.max_attempts for new in batch]),
        "parent_ids": Int8Array([new.parent_id for new in batch]),
        "parent_rounds": Int4Array([new.parent_round for new in batch]),
        "traces": TextArray([new.trace for new in batch]),
        "concurrency_keys": TextArray([new.concurrency_key for new in batch]),
        "rate_limits": TextArray([new.rate_limit for new in batch]),
        "weights": Int4Array([new.weight for new in batch]),
        "lanes": TextArray(parked),
    }


def _key_columns(batch: Sequence[NewInstance], ids: Sequence[int]) -> dict[str, Any]:
    scopes = [new.correlation_scope for new in batch]
    return {
        "ids": Int8Array(ids),
        "correlation_keys": TextArray([new.correlation_key for new in batch]),
        "correlation_scopes": TextArray([None if scope is None else ",".join(scope) for scope in scopes]),
    }


def retry_failed(instance_id: int) -> Operation[dict[str, int] | None]:
    """Put a failed instance back at its failed step; return its queue with 1, or None when it is not failed.

    Raises psycopg's UniqueViolation when its correlation key is occupied; nothing is moved then.
    """
    rows = yield "retry_failed", {"id": instance_id}
    return {rows[0][1]: 1} if rows else None


def rival(instance_id: int) -> Operation[tuple[str, int | None]]:
    """Return an instance's correlation key and who occupies it."""
    rows = yield "rival", {"id": instance_id}
    return (rows[0][0], rows[0][1]) if rows else ("", None)


def snapshot(instance_id: int) -> Operation[Snapshot | None]:
    """Return where an instance stands, or None if there is none of that id."""
    rows = yield "snapshot", {"id": instance_id}
    return Snapshot(*rows[0]) if rows else None


def finished(ids: Sequence[int]) -> Operation[list[Snapshot]]:
    """Return those of `ids` that are finished."""
    if len(ids) == 1:
        rows = yield "finished_one", {"id": ids[0]}
    else:
        rows = yield "finished", {"ids": Int8Array(ids)}
    return [Snapshot(*row) for row in rows]


def occupant(correlation_key: str) -> Operation[int | None]:
    """Return the id of the instance that occupies a correlation key."""
    rows = yield "occupant", {"key": correlation_key}
    return int(rows[0][0]) if rows else None


class Cancelled(NamedTuple):
    """What a cancel did.

    found    whether there was anything to cancel
    woken    how many parents went on for it, per queue
    running  whether something executes, and ends later
    itself   whether the target was live; else, with `cascade`, only what lived of its tree is cancelled
    """

    found: bool = False
    woken: Mapping[str, int] = MappingProxyType({})
    running: bool = False
    itself: bool = True

    def also(self, other: Cancelled) -> Cancelled:
        """Return what this cancel and another of the same tree did together."""
        woken = Counter(self.woken) + Counter(other.woken)
        return Cancelled(self.found or other.found, woken, self.running or other.running, self.itself or other.itself)


def cancel(
    instance_id: int, reason: str, cascade: bool = False, terminate: bool = False, mark: int | None = None
) -> Operation[Cancelled]:
    """Cancel a waiting instance, or ask an executing one. Needs a transaction.

    The first walk of a tree locks every row that existed when it began. What it missed are children of outcomes that
    were being committed then, and had not seen the mark: their parents are locked now, so that a second walk finds all
    of them. Outcomes that commit later see the mark, and cancel themselves with the children they insert. So two walks
    are enough, however fast the tree grows.

    Args:
        instance_id: The instance.
        reason: Kept with what is cancelled.
        cascade: Cancel its whole tree too, of one that is finished what still lives of it.
        terminate: Have the process killed that executes one.
        mark: What `mark_cascade` returned, committed before; without one a tree must not grow meanwhile.
    """
    error = Jsonb({"type": "Cancelled", "message": reason})
    found: dict[int, str] = {}
    if mark is not None:
        yield "hold_cascade", {"id": mark}
    for _ in range(WALKS if cascade else 1):
        rows = yield "cancel", {"id": instance_id, "cascade": cascade, "terminate": terminate, "error": error}
        known = len(found)
        found.update(rows)
        if len(found) == known:
            break
    if mark is not None:
        yield "end_cascade", {"id": mark}
    woken = yield from end([row for row, status in found.items() if status == "cancelled"], waiting=True)
    return Cancelled(bool(found), woken, "executing" in found.values(), instance_id in found)


def mark_cascade(instance_id: int, reason: str, terminate: bool) -> Operation[int]:
    """Note a cascading cancel that is to begin; return its mark. Must be committed before `cancel` walks the tree."""
    error = Jsonb({"type": "Cancelled", "message": reason})
    rows = yield "mark_cascade", {"id": instance_id, "terminate": terminate, "error": error}
    return int(rows[0][0])


def begin_cascade(instance_id: int, reason: str, terminate: bool) -> Operation[tuple[int, Cancelled]]:
    """Mark the tree of an instance and cancel its root. Needs a transaction.

    From the mark on, outcomes of the tree cancel themselves. Their ends could let the root end `done` before the walk
    reaches it, so the root is cancelled with the mark.

    Returns:
        The mark, for `cancel`, and what became of the root.
    """
    mark = yield from mark_cascade(instance_id, reason, terminate)
    return mark, (yield from cancel(instance_id, reason, False, terminate))


def finish_cascade(age: float) -> Operation[Cancelled | None]:
    """Finish one cascading cancel that its process left `age` seconds ago; None: there is none. Needs a transaction."""
    rows = yield "left_cascade", {"age": age}
    if not rows:
        return None
    mark, target, terminate, error = rows[0]
    return (yield from cancel(target, error["message"], True, terminate, mark))


def cancel_asked(instance_id: int, token: int) -> Operation[bool]:
    """Tell whether a claim was asked to end, or is not there any more: then its outcome counts for nothing either."""
    rows = yield "cancel_asked", {"id": instance_id, "token": token}
    return not rows or bool(rows[0][0])


def end(ids: Sequence[int], *, waiting: bool = False) -> Operation[dict[str, int]]:
    """Finish what ended these rows, in the same transaction: lower barriers, delete signals, move them to history.

    A failed row keeps its signals; others keep those that no step was shown.
    waiting  whether they may have waited for a limit: somebody else sees to their lanes then
    Rows that keep a correlation key reserved stay. Returns how many rows became runnable, per queue.
    """
    if not ids:
        return {}
    rows = yield "ended_families", {"ids": Int8Array(sorted(ids))}
    # Two cancels of the last two rows of a lane wait for each other here; the caller repeats the one that is undone.
    opened = (yield from open_lanes(lane for row in rows for lane in lanes_of(row[3], row[4]))) if waiting else {}
    counts = Counter(row[1] for row in rows if row[1] is not None)
    woken = yield from lower_barriers(counts)
    inboxes = [row[0] for row in rows if row[2] is not None]
    if inboxes:
        yield "settle_inboxes", {"ids": Int8Array(sorted(inboxes))}
    yield "archive", {"ids": Int8Array(sorted(ids))}
    return dict(Counter(woken) + Counter(opened))


def clear_inboxes(ids: Sequence[int]) -> Operation[None]:
    """Delete every signal of deleted instances."""
    if ids:
        yield "clear_inboxes", {"ids": Int8Array(sorted(ids))}


def lock_parents(ids: Sequence[int]) -> Operation[None]:
    """Before rows are locked that may end: lock whom they report to, in the order of a flush and of a cascade."""
    yield "lock_parents", {"ids": Int8Array(sorted(ids))}


def lock_free(ids: Sequence[int]) -> Operation[dict[int, int | None]]:
    """Lock the rows, and the parents they report to, that no other session holds. Needs a transaction; never waits.

    Returns the ids of the others: with the parent that another session holds, or None where it holds the row itself.
    """
    rows = yield "lock_free", {"ids": Int8Array(sorted(ids))}
    return dict(rows)


def lower_barriers(ended: Mapping[int, int]) -> Operation[dict[str, int]]:
    """Count ended children (parent id -> how many) off their parents' barriers; return woken parents per queue."""
    if not ended:
        return {}
    parents = sorted(ended)
    rows = yield (
        "join_children",
        {"ids": Int8Array(parents), "counts": Int4Array([ended[parent] for parent in parents])},
    )
    return dict(Counter(row[1] for row in rows if row[2] == "runnable"))


def children(parent: int, children_round: int | None, after: int, limit: int) -> Operation[list[Row]]:
    """Return a page of an instance's children by id, of one round or (None) of all."""
    return (yield "children", {"parent": parent, "round": children_round, "after": after, "limit": limit})


def listing(
    queue: str | None, status: str | None, machine: str | None, limit: int | None, before: int | None = None
) -> Operation[list[Row]]:
    """Return instances newest first; `limit` None for all."""
    return (yield "list", {"queue": queue, "status": status, "machine": machine, "before": before, "limit": limit})
