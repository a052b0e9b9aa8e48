"""What durable.testing asks the database besides what production does. SQL in sql/testing.sql."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from psycopg import sql

from durable.storage import lanes, maintenance
from durable.storage.arrays import TextArray
from durable.storage.session import Connection, Operation

_MARK = "made by durable.testing, which empties it"


class Pictured(NamedTuple):
    """One instance in a picture of the schema; `error_type` names the exception it ended with."""

    id: int
    parent_id: int | None
    parent_round: int | None
    correlation_key: str | None
    machine: str
    machine_version: int
    status: str
    step: str
    state_type: str
    state: bytes
    result_type: str | None
    result: bytes | None
    error_type: str | None


def next_claimable(queue: str | None, unknown: Sequence[str]) -> Operation[tuple[str, bool, bool] | None]:
    """Return the queue of the row that comes next, whether it has crashed before, and whether it is limited."""
    rows = yield "next_claimable", {"queue": queue, "unknown": TextArray(unknown)}
    return (rows[0][0], rows[0][1], rows[0][2]) if rows else None


def awaits_tokens() -> Operation[bool]:
    """Return whether rows wait for tokens."""
    rows = yield "awaits_tokens", {}
    return bool(rows[0][0])


def refill() -> Operation[None]:
    """Let rows that wait for tokens have them as if their time had come. Needs a transaction."""
    yield "refill", {}
    yield from lanes.open_due_lanes()


def earliest_scheduled(queue: str | None) -> Operation[tuple[int, bool] | None]:
    """Return the id of the scheduled row that is due first, and whether it is due now; None when there is none."""
    rows = yield "earliest_scheduled", {"queue": queue}
    return (rows[0][0], rows[0][1]) if rows else None


def promote(instance_id: int) -> Operation[None]:
    """Make a scheduled row runnable as if its time had come, and all that are due. Needs a transaction."""
    yield "make_due", {"id": instance_id}
    yield from maintenance.promote()


def fire_timeouts(instance_id: int | None) -> Operation[int]:
    """Wake parks with a deadline (None: all of them) as if it had passed; return how many. Needs a transaction."""
    rows = yield "make_overdue", {"id": instance_id}
    while (yield from maintenance.time_out()):
        pass
    return len(rows)


def travel(seconds: float) -> Operation[int]:
    """Let that much time pass for live rows; return how many became runnable. Needs a transaction."""
    yield "travel", {"seconds": seconds}
    woken = 0
    for due in (maintenance.promote, maintenance.time_out):
        while counts := (yield from due()):
            woken += sum(counts.values())
    return woken


def newest_of_key(key: str) -> Operation[int | None]:
    """Return the id of who occupies a correlation key or, if nobody does, of who had it last."""
    rows = yield "newest_of_key", {"key": key}
    return int(rows[0][0]) if rows else None


def picture() -> Operation[list[Pictured]]:
    """Return every instance, live and finished, by id."""
    rows = yield "picture", {}
    return [Pictured(*row) for row in rows]


def history_ready() -> Operation[bool]:
    """Return whether the history can take what ends today."""
    rows = yield "history_ready", {}
    return bool(rows[0][0])


def in_use() -> Operation[tuple[bool, bool]]:
    """Return whether the schema holds instances, and whether living processes work on it."""
    rows = yield "in_use", {}
    return rows[0][0], rows[0][1]


def wipe() -> Operation[None]:
    """Delete every instance, signal and lease; ids begin at 1 again."""
    yield "wipe", {}


def is_marked(connection: Connection, schema: str) -> bool:
    """Return whether `mark` was called for a schema."""
    row = connection.execute(
        "SELECT obj_description(oid, 'pg_namespace') = %s FROM pg_namespace WHERE nspname = %s", (_MARK, schema)
    ).fetchone()
    return row is not None and bool(row[0])


def mark(connection: Connection, schema: str) -> None:
    """Mark a schema as one that tests may empty."""
    connection.execute(sql.SQL("COMMENT ON SCHEMA {} IS {}").format(sql.Identifier(schema), sql.Literal(_MARK)))


def drop(connection: Connection, schema: str) -> None:
    """Drop a schema with everything in it."""
    connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
