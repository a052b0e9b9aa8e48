"""Claiming rows, giving them back, committing outcomes: the statements a worker process lives on.

Called by one thread per worker process, on that process's one connection. SQL in sql/claims.sql.

A flush commits a batch of outcomes of one worker in a number of statements that does not depend on its size: `finish`
moves the plainly terminal ones to history, `advance` updates those that keep their row, and each kind of rider
(consumed signals, children, barriers, inboxes) goes once for the whole batch. Riders are made only for what committed.
Rows of two flushes are disjoint (a row has one owner), parents are locked together with the rows in id order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import starmap
from operator import attrgetter
from typing import NamedTuple

import psycopg
from psycopg.types.json import Jsonb

from durable.instance import TERMINAL, Claimed, NewInstance, Payload
from durable.sql import Statements
from durable.storage.arrays import ByteaArray, Float8Array, Int4Array, Int8Array, TextArray
from durable.storage.instances import end, insert_many, lock_free, lock_parents, lower_barriers
from durable.storage.lanes import Freed, free
from durable.storage.session import Connection, Operation, local_lock_timeout, run, run_atomically

_IN_PICK_ORDER = attrgetter("priority", "eligible_at", "id")
_BY_ID = attrgetter("claimed.id", "claimed.token")
"""Of two outcomes of one row the newest claim's comes last: the only one that may commit."""


class Limits(NamedTuple):
    """What a step is limited by."""

    concurrency_key: str | None = None
    rate_limit: str | None = None
    weight: int = 1


@dataclass(slots=True)
class Commit:
    """One outcome on its way to the database.

    status    what the row becomes: done, failed; runnable, scheduled, awaiting_signal, awaiting_children; or
              executing for an inline hop, which keeps its claim
    kind      retry, next, await, children, end: what becomes of attempt, awaits and signals
    step      the next step, None: the same
    state     None: kept
    error     JSON text {"type", "message", "traceback"} or None; it must hold no NUL and no lone surrogate
    delay     seconds until eligible; timeout: seconds until a park ends by itself
    consumed  ids of signals this outcome consumes; shown: ids the step was shown and did not consume
    children  rows to insert with this outcome
    limits    what the next step is limited by; None: what it was, without a rate limit when it is another step
    rerun     of an end: run the step again instead when a signal has come that it was not shown
    flushed   what its flush did, when it was committed together with what its step wrote
    """

    claimed: Claimed
    status: str
    result: Payload | None = None
    error: str | None = None
    attempt: int = 0
    delay: float | None = None
    kind: str = ""
    step: str | None = None
    state: Payload | None = None
    timeout: float | None = None
    awaits: Sequence[str] = ()
    shown: Sequence[int] = ()
    consumed: Sequence[int] = ()
    children: Sequence[NewInstance] = ()
    limits: Limits | None = None
    rerun: bool = False
    flushed: Flushed | None = None

    def __post_init__(self) -> None:
        if not self.kind:
            self.kind = "end" if self.status in TERMINAL else "retry"

    @property
    def next_limits(self) -> Limits | None:
        """What the row is limited by from now on; None: no change. A rate limit ends with the step that had it."""
        if self.limits is None and self.claimed.rate_limit is not None and self.kind != "retry":
            return Limits(self.claimed.concurrency_key)
        return self.limits

    @property
    def keeps_row(self) -> bool:
        """Whether the row may stay in the live table."""
        return self.claimed.keeps_key or self.kind != "end"

    def again(self) -> Commit:
        """Return what is committed instead of an end when the step runs again: nothing but that it does."""
        return Commit(self.claimed, "runnable", attempt=self.claimed.attempt, delay=0.0)

    def next_claim(self, inbox: int | None) -> Claimed:
        """For an inline hop that was committed: the claim as it goes on, the inbox yet to be loaded."""
        state = self.state or Payload(self.claimed.state_type, self.claimed.state)
        return self.claimed._replace(
            version=self.claimed.version + 1,
            step=self.step or self.claimed.step,
            attempt=0,
            crashes=0,
            state_type=state.type,
            state=state.body,
            inbox=inbox,
            awaits=None,
            signals=(),
            rate_limit=None,
        )


@dataclass(slots=True)
class Flushed:
    """What a flush did.

    committed  ids whose outcome is durable; the others are stale
    ready      rows that became runnable per queue: parents, children, parks that found their signal, next steps
    inboxes    committed ids that may have signals -> id of the newest one
    unread     ended ids -> names of the signals that no step was shown, each with how many
    rerun      committed ids whose step runs again instead of their end -> how many signals came for it
    ended      committed ids that don't go on here even if meant to: finished (a cancel overrules), or lost since
    opened     queues in which a key or slot that came free made a row a candidate; `ready` counts it too
    locked     ids whose outcome waits for a lock that another session holds, with the parent that it holds (None: the
               row itself, or something else): not committed, and not stale
    """

    committed: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    ready: Counter[str] = field(default_factory=Counter)
    inboxes: dict[int, int] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    locked: dict[int, int | None] = field(default_factory=dict)
    unread: dict[int, dict[str, int]] = field(default_factory=dict)
    rerun: dict[int, int] = field(default_factory=dict)

    def add(self, other: Flushed) -> None:
        """Count another flush in."""
        self.committed |= other.committed
        self.ready += other.ready
        self.inboxes |= other.inboxes
        self.ended |= other.ended
        self.opened |= other.opened
        self.locked |= other.locked
        self.unread |= other.unread
        self.rerun |= other.rerun


def claim(
    worker: int, queue: str, limit: int, position: tuple[int, datetime], to_priority: int, unknown: Sequence[str]
) -> Operation[list[Claimed]]:
    """Claim at most `limit` rows from `position` on, best first; none when the worker's lease is not live."""
    rows = yield (
        "claim",
        {
            "worker": worker,
            "queue": queue,
            "limit": limit,
            "from_priority": position[0],
            "from_time": position[1],
            "to_priority": to_priority,
            "unknown": TextArray(unknown),
        },
    )
    return sorted(starmap(Claimed, rows), key=_IN_PICK_ORDER)


def claim_suspect(worker: int, queue: str, unknown: Sequence[str]) -> Operation[list[Claimed]]:
    """Claim one row that has a crash behind it."""
    rows = yield "claim_suspect", {"worker": worker, "queue": queue, "unknown": TextArray(unknown)}
    return [Claimed(*row) for row in rows]


def held(worker: int) -> Operation[dict[int, int]]:
    """Return id -> token of everything the worker holds in the database."""
    rows = yield "held", {"worker": worker}
    return dict(rows)


def release(
    worker: int, claims: Sequence[tuple[int, int]], reason: str | None = None, *, wait: bool = True
) -> Operation[dict[str, int]]:
    """Give back (id, token) pairs unchanged; return how many became runnable per queue. Needs a transaction.

    wait  False: leave out rows that other sessions hold, or whose parent they hold
    """
    ordered = yield from _locked_with_parents(claims, wait)
    rows = yield (
        "release",
        {
            "worker": worker,
            "ids": Int8Array([claim[0] for claim in ordered]),
            "tokens": Int4Array([claim[1] for claim in ordered]),
            "reason": reason,
        },
    )
    counts = Counter((yield from end([row[0] for row in rows if row[2] == "cancelled"])))
    counts.update(row[1] for row in rows if row[2] == "runnable")
    counts.update((yield from free(((row[3], row[4]) for row in rows), wait=wait)))
    return dict(counts)


def _locked_with_parents(claims: Sequence[tuple[int, int]], wait: bool) -> Operation[list[tuple[int, int]]]:
    """Lock what an end of these rows changes in their families; return the claims to go on with, by id."""
    ids = sorted(claim[0] for claim in claims)
    if wait:
        yield from lock_parents(ids)
        return sorted(claims)
    held = yield from lock_free(ids)
    return sorted(claim for claim in claims if claim[0] not in held)


def expire(worker: int, claims: Sequence[tuple[int, int]], *, wait: bool = True) -> Operation[dict[str, int]]:
    """End claims whose `expires` passed before they started; return woken parents per queue. Needs a transaction.

    wait  as for `release`
    """
    ordered = yield from _locked_with_parents(claims, wait)
    rows = yield (
        "expire",
        {
            "worker": worker,
            "ids": Int8Array([claim[0] for claim in ordered]),
            "tokens": Int4Array([claim[1] for claim in ordered]),
            "error": Jsonb({"type": "Expired", "message": "its `expires` passed before it started"}),
        },
    )
    counts = Counter((yield from end([row[0] for row in rows])))
    counts.update((yield from free(((row[1], row[2]) for row in rows), wait=wait)))
    return dict(counts)


def flush(connection: Connection, sql: Statements, worker: int, batch: Sequence[Commit]) -> Flushed:
    """Commit a batch of outcomes in one transaction; in a savepoint where one is open.

    Raises psycopg.Error, with nothing committed (or, when the connection is lost, nothing known: see `resolve`).
    """
    alone = connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE and not local_lock_timeout(
        connection
    )
    plain = alone and all(
        commit.kind == "end"
        and not commit.claimed.keeps_key
        and commit.claimed.reports_to is None
        and commit.claimed.concurrency_key is None
        and not commit.rerun
        for commit in batch
    )
    if not plain:
        return run_atomically(connection, sql, _flush(worker, batch))
    flushed = Flushed()
    run(connection, sql, _finish(worker, sorted(batch, key=_BY_ID), flushed, []))
    return flushed


def hold(worker: int, claimed: Claimed, rerun: bool = False) -> Operation[str]:
    """Lock a claimed row, and the parent it reports to, until the transaction ends.

    Args:
        worker: The worker id that claimed it.
        claimed: The row.
        rerun: Whether the step runs again instead of ending when a signal has come that it was not shown.

    Returns:
        "owned", "cancelled" (owned, and its cancel was asked for), "rerun" (owned, and its step is to run again), or
        "lost" (the claim or the row is gone).
    """
    family = {claimed.id, claimed.reports_to or claimed.id}
    fence = {"worker": worker, "token": claimed.token, "version": claimed.version}
    rows = yield "hold", {"ids": Int8Array(sorted(family)), **fence}
    for instance_id, owned, cancel_requested, inbox in rows:
        if instance_id == claimed.id and owned:
            if cancel_requested:
                return "cancelled"
            return "rerun" if rerun and (inbox or 0) > claimed.seen else "owned"
    return "lost"


def flush_one(worker: int, commit: Commit) -> Operation[Flushed]:
    """Write one outcome with all its riders, as `flush` does, into a transaction that is open."""
    return (yield from _flush(worker, [commit]))


@dataclass(slots=True)
class Around:
    """The ids that a `flush_free` leaves out, as in `Flushed.locked`; None as long as it does not know them."""

    locked: dict[int, int | None] | None = None


def flush_free(worker: int, batch: Sequence[Commit], around: Around) -> Operation[Flushed]:
    """Write the outcomes of a batch whose rows, and whose parents, no other session holds. Needs a transaction.

    Waits for no slot and no lane either. Only a correlation key of a child may still be another transaction's.

    around  told what is left out before anything is written
    """
    around.locked = yield from lock_free([commit.claimed.id for commit in batch])
    free_ones = [commit for commit in batch if commit.claimed.id not in around.locked]
    flushed = (yield from _flush(worker, free_ones, wait=False)) if free_ones else Flushed()
    flushed.locked |= around.locked
    return flushed


def _flush(worker: int, batch: Sequence[Commit], *, wait: bool = True) -> Operation[Flushed]:
    batch = sorted(batch, key=_BY_ID)
    flushed = Flushed()
    parents = {commit.claimed.reports_to for commit in batch if commit.claimed.reports_to is not None}
    asking = [commit for commit in batch if commit.rerun]
    ending = [commit for commit in batch if not commit.keeps_row]
    staying = [commit for commit in batch if commit.keeps_row]
    # Two statements would lock their rows one set after the other.
    if wait and (parents or asking or (ending and staying)):
        yield "lock_family", {"ids": Int8Array(sorted(parents | {commit.claimed.id for commit in batch}))}
    if asking:
        batch = yield from _rerun(batch, asking, flushed)
        ending = [commit for commit in batch if not commit.keeps_row]
        staying = [commit for commit in batch if commit.keeps_row]
    freed: list[Freed] = []
    if ending:
        yield from _finish(worker, ending, flushed, freed)
    if staying:
        yield from _advance(worker, staying, flushed, freed)
    if freed:
        opened = yield from free(freed, wait=wait)
        flushed.ready.update(opened)
        flushed.opened |= opened.keys()
    return flushed


def _rerun(batch: Sequence[Commit], asking: Sequence[Commit], flushed: Flushed) -> Operation[Sequence[Commit]]:
    """Replace the ends of instances that were sent a signal meanwhile. Their rows are locked: none comes in between."""
    rows = yield (
        "sent_meanwhile",
        {
            "ids": Int8Array([commit.claimed.id for commit in asking]),
            "seen": Int8Array([commit.claimed.seen for commit in asking]),
        },
    )
    flushed.rerun.update(rows)
    return [commit.again() if commit.rerun and commit.claimed.id in flushed.rerun else commit for commit in batch]


def _seen(batch: Sequence[Commit]) -> Int8Array:
    """Return the newest signal that each step was shown; nothing at all when none of the rows has signals."""
    if not any([commit.claimed.inbox for commit in batch]):  # noqa: C419 - a generator costs twice as much
        return Int8Array(())
    return Int8Array([commit.claimed.seen for commit in batch])


def _count_unread(ended: Sequence[Claimed], flushed: Flushed) -> Operation[None]:
    """Look up the names of signals that came while the last step ran."""
    rows = yield (
        "unread_counts",
        {
            "ids": Int8Array([claimed.id for claimed in ended]),
            "seen": Int8Array([claimed.seen for claimed in ended]),
        },
    )
    for instance_id, name, count in rows:
        flushed.unread.setdefault(instance_id, {})[name] = count


def _finish(worker: int, ending: Sequence[Commit], flushed: Flushed, freed: list[Freed]) -> Operation[None]:
    rows = yield (
        "finish",
        {
            "worker": worker,
            "ids": Int8Array([commit.claimed.id for commit in ending]),
            "tokens": Int4Array([commit.claimed.token for commit in ending]),
            "versions": Int4Array([commit.claimed.version for commit in ending]),
            "statuses": TextArray([commit.status for commit in ending]),
            "result_types": TextArray([commit.result and commit.result.type for commit in ending]),
            "results": ByteaArray([commit.result and commit.result.body for commit in ending]),
            "errors": TextArray([commit.error for commit in ending]),
            "seen": _seen(ending),
        },
    )
    claims = {commit.claimed.id: commit.claimed for commit in ending}
    ended = [claims[row[0]] for row in rows]
    flushed.committed.update(claimed.id for claimed in ended)
    unread = [row[0] for row in rows if row[1]]
    if unread:
        yield from _count_unread([claims[instance_id] for instance_id in unread], flushed)
    freed += [(row.concurrency_key, row.gate_shard) for row in ended if row.concurrency_key is not None]
    flushed.ready.update(
        (yield from lower_barriers(Counter(row.reports_to for row in ended if row.reports_to is not None)))
    )


def _advance(worker: int, staying: Sequence[Commit], flushed: Flushed, freed: list[Freed]) -> Operation[None]:
    rows = yield (
        "advance",
        {
            "worker": worker,
            "ids": Int8Array([commit.claimed.id for commit in staying]),
            "tokens": Int4Array([commit.claimed.token for commit in staying]),
            "versions": Int4Array([commit.claimed.version for commit in staying]),
            "kinds": TextArray([commit.kind for commit in staying]),
            "statuses": TextArray([commit.status for commit in staying]),
            "steps": TextArray([commit.step for commit in staying]),
            "state_types": TextArray([commit.state and commit.state.type for commit in staying]),
            "states": ByteaArray([commit.state and commit.state.body for commit in staying]),
            "attempts": Int4Array([commit.attempt for commit in staying]),
            "delays": Float8Array([commit.delay for commit in staying]),
            "timeouts": Float8Array([commit.timeout for commit in staying]),
            "awaits": TextArray([_json_list(commit.awaits) for commit in staying]),
            "shown": TextArray([_shown(commit) for commit in staying]),
            "result_types": TextArray([commit.result and commit.result.type for commit in staying]),
            "results": ByteaArray([commit.result and commit.result.body for commit in staying]),
            "errors": TextArray([commit.error for commit in staying]),
            "seen": _seen(staying),
        },
    )
    commits = {commit.claimed.id: commit for commit in staying}
    went_on: dict[int, tuple[Commit, int]] = {}
    ended: list[int] = []
    unread: list[Claimed] = []
    for instance_id, status, queue, children_round, inbox, has_unread in rows:
        flushed.committed.add(instance_id)
        if inbox is not None:
            flushed.inboxes[instance_id] = inbox
        claimed = commits[instance_id].claimed
        if claimed.concurrency_key is not None and status != "executing":
            freed.append((claimed.concurrency_key, claimed.gate_shard))
        if status in TERMINAL:
            ended.append(instance_id)  # also whatever was asked to be cancelled meanwhile
            if has_unread:
                unread.append(claimed)
            continue
        went_on[instance_id] = (commits[instance_id], children_round)
        if status == "runnable":
            flushed.ready[queue] += 1
    yield from _relimit({i: limits for i, (commit, _) in went_on.items() if (limits := commit.next_limits)})
    consumed = [signal for commit, _ in went_on.values() for signal in commit.consumed]
    if consumed:
        yield "consume", {"ids": Int8Array(sorted(consumed))}
    yield from _insert_children({i: entry for i, entry in went_on.items() if entry[0].kind == "children"}, flushed)
    parked = [instance_id for instance_id, (commit, _) in went_on.items() if commit.kind == "await"]
    if parked:
        woken = yield "wake_parked", {"ids": Int8Array(sorted(parked))}
        flushed.ready.update(commits[row[0]].claimed.queue for row in woken)
    flushed.ended.update(ended)
    if unread:
        yield from _count_unread(unread, flushed)
    flushed.ready.update((yield from end(ended)))


def _json_list(values: Sequence[int | str]) -> str:
    return json.dumps(list(values)) if values else "[]"


def _shown(commit: Commit) -> str:
    """Return the ids that a park adds to `shown` and those that it removes, as JSON."""
    if not (commit.kind == "await" and (commit.shown or commit.consumed)):
        return "[]"
    return json.dumps([list(commit.shown), list(commit.consumed)])


def _relimit(changed: Mapping[int, Limits]) -> Operation[None]:
    """Give committed rows the limits of their next step."""
    if not changed:
        return
    ids = sorted(changed)
    yield (
        "relimit",
        {
            "ids": Int8Array(ids),
            "concurrency_keys": TextArray([changed[i].concurrency_key for i in ids]),
            "rate_limits": TextArray([changed[i].rate_limit for i in ids]),
            "weights": Int4Array([changed[i].weight for i in ids]),
        },
    )


def _insert_children(parents: Mapping[int, tuple[Commit, int]], flushed: Flushed) -> Operation[None]:
    """Insert the children of committed parents and set the barriers; duplicates of occupied keys are dropped."""
    if not parents:
        return
    batch: list[NewInstance] = []
    for parent, (commit, children_round) in sorted(parents.items()):
        for child in commit.children:
            child.parent_id, child.parent_round = parent, children_round
        batch += commit.children
    ids = (yield from insert_many(batch)) if batch else []
    there = [child for child, instance_id in zip(batch, ids, strict=True) if instance_id is not None]
    counts = Counter(child.parent_id for child in there)
    flushed.ready.update(child.queue for child in there if not child.delay and child.at is None)
    rows = yield (
        "raise_barrier",
        {"ids": Int8Array(sorted(parents)), "counts": Int4Array([counts[parent] for parent in sorted(parents)])},
    )
    flushed.ready.update(row[1] for row in rows if row[2] == "runnable")
    if rows and rows[0][3]:
        yield from _cancel_under_cascade(
            {
                parent: [i for child, i in zip(batch, ids, strict=True) if child.parent_id == parent]
                for parent in parents
            },
            flushed,
        )


def _cancel_under_cascade(families: Mapping[int, Sequence[int | None]], flushed: Flushed) -> Operation[None]:
    """Cancel parents in a tree that is being cancelled, and the children they have just got: see `instances.cancel`.

    Every row is locked here already: the parents by their outcome, those that they report to before it.
    """
    rows = yield "under_cascade", {"ids": Int8Array(sorted(families))}
    for parent, error in rows:
        family = [parent, *(child for child in families[parent] if child is not None)]
        yield "cancel_locked", {"ids": Int8Array(sorted(family)), "error": Jsonb(error)}
        flushed.ended.add(parent)
        flushed.ready.update((yield from end(family, waiting=True)))


def resolve(batch: Sequence[Commit]) -> Operation[Flushed]:
    """After a re-submission: what of it had been committed by the earlier one, although its answer was lost.

    An outcome was when the row, live or finished, shows its token with a later version, or a later token with one.
    """
    rows = yield "committed", {"ids": Int8Array([commit.claimed.id for commit in batch])}
    stands = {row[0]: row[1:] for row in rows}
    flushed = Flushed()
    for commit in batch:
        claimed = commit.claimed
        token, version, status, inbox = stands.get(claimed.id, (0, 0, "", None))
        if token < claimed.token or version <= claimed.version:
            continue
        flushed.committed.add(claimed.id)
        if inbox is not None:
            flushed.inboxes[claimed.id] = inbox
        if (token, version, status) != (claimed.token, claimed.version + 1, "executing"):
            flushed.ended.add(claimed.id)
    return flushed
