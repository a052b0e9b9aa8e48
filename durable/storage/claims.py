"""Claiming rows, giving them back, committing outcomes: the statements a worker process lives on.

Called by one thread per worker process, on that process's one connection. SQL in sql/claims.sql.

A flush commits a batch of outcomes of one worker in at most three statements whatever its size: `finish` moves the
plainly terminal ones to history, `advance` updates those that keep their row, `archive` moves what `advance` finished
and nothing keeps. Rows of two flushes are disjoint (a row has one owner) and every statement goes in id order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.types.json import Jsonb

from durable.instance import Claimed, Payload
from durable.sql import Statements
from durable.storage.arrays import ByteaArray, Float8Array, Int4Array, Int8Array, TextArray
from durable.storage.session import Connection, Operation, run, run_atomically


@dataclass(slots=True)
class Commit:
    """One outcome on its way to the database.

    status   done, failed, cancelled; or runnable, scheduled for another attempt after `delay` seconds
    error    JSON text {"type", "message", "traceback"} or None; it must hold no NUL and no lone surrogate
    """

    claimed: Claimed
    status: str
    result: Payload | None = None
    error: str | None = None
    attempt: int = 0
    delay: float | None = None

    @property
    def keeps_row(self) -> bool:
        """Whether the row may stay in the live table."""
        return self.claimed.keeps_key or self.status in ("runnable", "scheduled")


def claim(
    worker: int,
    queue: str,
    limit: int,
    position: tuple[int, datetime],
    to_priority: int,
    unknown: Sequence[str],
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
    claimed = [Claimed(*row) for row in rows]
    claimed.sort(key=lambda row: (row.priority, row.eligible_at, row.id))
    return claimed


def claim_suspect(worker: int, queue: str, unknown: Sequence[str]) -> Operation[list[Claimed]]:
    """Claim one row that has a crash behind it."""
    rows = yield "claim_suspect", {"worker": worker, "queue": queue, "unknown": TextArray(unknown)}
    return [Claimed(*row) for row in rows]


def held(worker: int) -> Operation[dict[int, int]]:
    """Return id -> token of everything the worker holds in the database."""
    rows = yield "held", {"worker": worker}
    return dict(rows)


def release(worker: int, claims: Sequence[tuple[int, int]], reason: str | None = None) -> Operation[dict[str, int]]:
    """Give back (id, token) pairs unchanged; return how many became runnable per queue. Needs a transaction."""
    ordered = sorted(claims)
    rows = yield (
        "release",
        {
            "worker": worker,
            "ids": Int8Array([claim[0] for claim in ordered]),
            "tokens": Int4Array([claim[1] for claim in ordered]),
            "reason": reason,
        },
    )
    cancelled = [row[0] for row in rows if row[2] == "cancelled"]
    if cancelled:
        yield "archive", {"ids": Int8Array(cancelled)}
    counts: dict[str, int] = {}
    for _, queue, status in rows:
        if status == "runnable":
            counts[queue] = counts.get(queue, 0) + 1
    return counts


def expire(worker: int, claims: Sequence[tuple[int, int]]) -> Operation[int]:
    """End claims whose `expires` passed before they started; return how many. Needs a transaction."""
    ordered = sorted(claims)
    rows = yield (
        "expire",
        {
            "worker": worker,
            "ids": Int8Array([claim[0] for claim in ordered]),
            "tokens": Int4Array([claim[1] for claim in ordered]),
            "error": Jsonb({"type": "Expired", "message": "its `expires` passed before it started"}),
        },
    )
    yield "archive", {"ids": Int8Array([row[0] for row in rows])}
    return len(rows)


def flush(connection: Connection, sql: Statements, worker: int, batch: Sequence[Commit]) -> set[int]:
    """Commit a batch of outcomes in one transaction; return the ids that committed, the others are stale.

    Raises psycopg.Error, with nothing committed (or, when the connection is lost, nothing known: see `resolve`).
    """
    keeping = any(commit.keeps_row for commit in batch)
    return (run_atomically if keeping else run)(connection, sql, _flush(worker, batch))


def _flush(worker: int, batch: Sequence[Commit]) -> Operation[set[int]]:
    batch = sorted(batch, key=lambda commit: commit.claimed.id)
    committed: set[int] = set()
    ending = [commit for commit in batch if not commit.keeps_row]
    if ending:
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
            },
        )
        committed.update(row[0] for row in rows)
    staying = [commit for commit in batch if commit.keeps_row]
    if staying:
        rows = yield (
            "advance",
            {
                "worker": worker,
                "ids": Int8Array([commit.claimed.id for commit in staying]),
                "tokens": Int4Array([commit.claimed.token for commit in staying]),
                "versions": Int4Array([commit.claimed.version for commit in staying]),
                "statuses": TextArray([commit.status for commit in staying]),
                "attempts": Int4Array([commit.attempt for commit in staying]),
                "delays": Float8Array([commit.delay for commit in staying]),
                "result_types": TextArray([commit.result and commit.result.type for commit in staying]),
                "results": ByteaArray([commit.result and commit.result.body for commit in staying]),
                "errors": TextArray([commit.error for commit in staying]),
            },
        )
        committed.update(row[0] for row in rows)
        yield "archive", {"ids": Int8Array([row[0] for row in rows])}
    return committed


def resolve(batch: Sequence[Commit]) -> Operation[set[int]]:
    """After a re-submission: the ids whose earlier submission had committed although its answer was lost.

    That is so when the row, live or finished, shows my token with a later version, or a later token with one.
    """
    rows = yield "committed", {"ids": Int8Array([commit.claimed.id for commit in batch])}
    stands = {instance_id: (token, version) for instance_id, token, version in rows}
    committed: set[int] = set()
    for commit in batch:
        token, version = stands.get(commit.claimed.id, (0, 0))
        if token >= commit.claimed.token and version > commit.claimed.version:
            committed.add(commit.claimed.id)
    return committed
