"""Every column of an instance survives each operation, or this file says why it does not.

Each row here has a value other than the default in every column. After an operation the row is compared with itself, by
the columns' names: the columns that differ must be exactly those that CHANGED lists for it, each with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from durable.instance import Claimed
from durable.storage import claims, inspection, instances, partitions
from tests import fix_db
from tests.fix_rows import DONE, Rows, done

schema = fix_db.schema  # one of its own for each test, since these change it

Row = dict[str, Any]
DAY = date(2035, 1, 2)
MOMENT = datetime(2035, 1, 2, 3, tzinfo=UTC)
LIVE = ["scheduled", "runnable", "executing", "awaiting_signal", "awaiting_children"]

VALUES: Row = {
    "eligible_at": datetime(2021, 1, 2, 3, tzinfo=UTC),
    "created_at": datetime(2020, 1, 2, 3, tzinfo=UTC),
    "expires_at": MOMENT,
    "token": 7,
    "version": 5,
    "attempt": 3,
    "machine_version": 4,
    "priority": 9,
    "crashes": 2,
    "cancel_requested": True,
    "max_attempts": 11,
    "queue": "mails",
    "machine": "order",
    "step": "paid",
    "state_type": "msgpack",
    "state": b"\x81",
    "result_type": "msgpack",
    "result": b"\x01",
    "error": Jsonb({"type": "Before", "message": "earlier"}),
    "correlation_key": "order:1",
    "correlation_scope": LIVE,
    "reason": "handed back",
    "inbox": 4,
    "signals_seen": 2,
    "awaits": ["paid"],
    "shown": [3],
    "deadline": MOMENT,
    "parent_id": 1_000_000,
    "parent_round": 6,
    "children_pending": 2,
    "children_round": 8,
    "terminate_requested": True,
    "trace": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "concurrency_key": "vendor:7",
    "rate_limit": "stripe",
    "weight": 5,
    "gate_shard": 1,
    "lane": "key vendor:7",
}
OF_STATUS = {"id", "status", "worker_id", "finished_at"}
"""Columns that `given` sets by the row's status."""


@dataclass(frozen=True)
class Operation:
    """One thing that happens to a row.

    Attributes:
        run: Does it to a row of this id.
        changed: Column -> why it does not survive.
        status: The row's before.
        values: Columns with other values before, which the operation needs.
    """

    run: Callable[[Rows, int, int], None]
    changed: Mapping[str, str]
    status: str = "executing"
    values: Mapping[str, Any] = field(default_factory=dict)


def flushed(status: str) -> Callable[[Rows, int, int], None]:
    """End a claimed row by its worker's flush."""

    def run(rows: Rows, instance: int, worker: int) -> None:
        live = rows.live(instance)
        assert live is not None
        claimed = Claimed(
            **{name: live[name] for name in Claimed._fields if name in live},
            keeps_key=live["correlation_scope"] is not None,
            expired=None,
        )
        error = '{"type": "ValueError", "message": "no"}' if status == "failed" else None
        assert rows.flush(worker, done(claimed, status=status, error=error, result=None if error else DONE)) == {
            instance
        }

    return run


def cancelled(rows: Rows, instance: int, worker: int) -> None:
    assert rows.cancel(instance)


def retried(rows: Rows, instance: int, worker: int) -> None:
    assert rows.run(instances.retry_failed(instance)) is not None


def purged(rows: Rows, instance: int, worker: int) -> None:
    """Purge the queue: what has started stays."""
    (waiting,) = rows.insert(queue="mails")
    assert rows.atomically(inspection.purge("mails")) == 1
    assert rows.status(waiting) is None


def thinned(rows: Rows, instance: int, worker: int) -> None:
    """Drop everything else from the row's partition."""
    partitions._thin(rows.connection, rows.sql, DAY, [instance])


def released(rows: Rows, instance: int, worker: int) -> None:
    assert rows.atomically(claims.release(worker, [(instance, VALUES["token"])], "full")) == {"mails": 1}


def reclaimed(most: int) -> Callable[[Rows, int, int], None]:
    """Take a row back from a worker process that died in its step."""

    def run(rows: Rows, instance: int, worker: int) -> None:
        rows.bury(worker)
        rows.reclaim(worker, [(instance, VALUES["token"])], most)

    return run


def with_wait(changed: Mapping[str, str]) -> Mapping[str, str]:
    """A failed instance keeps what it awaited, for a retry."""
    return {name: why for name, why in changed.items() if name not in ("awaits", "shown")}


def without_error(changed: Mapping[str, str]) -> Mapping[str, str]:
    """A cancelled instance keeps the error that says who cancelled it."""
    return {name: why for name, why in changed.items() if name != "error"}


ENDS = {
    "status": "the end",
    "finished_at": "the end",
    "version": "counts outcomes",
    "result_type": "the outcome's",
    "result": "the outcome's",
    "error": "the outcome's",
}
MOVED = {
    "reason": "says why an instance waits; a finished one does not wait",
    "signals_seen": "its last step was shown newer ones",
    "awaits": "a finished instance awaits nothing",
    "shown": "a finished instance awaits nothing",
    "deadline": "a finished instance awaits nothing",
    "children_pending": "an instance that runs has no barrier",
    "terminate_requested": "there is no claim to terminate",
}
KEPT = {
    "worker_id": "in the live table it says who runs an instance now",
    "signals_seen": "its last step was shown newer ones",
    "awaits": "a finished instance awaits nothing",
    "shown": "a finished instance awaits nothing",
    "deadline": "a finished instance awaits nothing",
}
CANCELLED = {
    "status": "the end",
    "finished_at": "the end",
    "cancel_requested": "asked now",
    "error": "says why it was cancelled",
    "reason": "says why an instance waits; a finished one does not wait",
    "lane": "it waits for no limit",
}
RETRIED = {
    "status": "runnable",
    "eligible_at": "its place in the queue begins now",
    "finished_at": "it is live again",
    "expires_at": "it has started before",
    "attempt": "attempts begin again",
    "crashes": "crashes begin again",
    "cancel_requested": "what was asked concerned the finished run",
    "terminate_requested": "what was asked concerned the finished run",
    "result_type": "there is no result yet",
    "result": "there is no result yet",
    "reason": "it waits for nothing but a worker",
    "deadline": "it runs at once",
    "parent_round": "a barrier that counted its end does not count it again",
}
MOVED_BACK = {
    "worker_id": "in the live table it says who runs an instance now",
    "gate_shard": "drawn by the next claim",
    "children_pending": "a failed instance has no barrier",
}
ASKED = {"cancel_requested": False, "terminate_requested": False}
HELD = [*LIVE, "done", "failed", "cancelled"]

OPERATIONS = {
    "finish, done": Operation(
        flushed("done"), ENDS | MOVED, values={"cancel_requested": False, "correlation_scope": None}
    ),
    "finish, failed": Operation(
        flushed("failed"), with_wait(ENDS | MOVED), values={"cancel_requested": False, "correlation_scope": None}
    ),
    "finish, cancelled": Operation(flushed("done"), without_error(ENDS | MOVED), values={"correlation_scope": None}),
    "finish and archive": Operation(flushed("done"), ENDS | KEPT, values={"cancel_requested": False}),
    "finish and archive, cancelled": Operation(flushed("done"), without_error(ENDS | KEPT)),
    "finish with a reserved key": Operation(
        flushed("done"), ENDS | KEPT, values={"cancel_requested": False, "correlation_scope": HELD}
    ),
    "cancel and archive": Operation(cancelled, CANCELLED, "runnable", ASKED),
    "cancel with a reserved key": Operation(cancelled, CANCELLED, "runnable", {**ASKED, "correlation_scope": HELD}),
    "retry": Operation(retried, RETRIED | MOVED_BACK, "failed", {"lane": None}),
    "retry with a reserved key": Operation(retried, RETRIED, "failed kept", {"lane": None, "correlation_scope": HELD}),
    "thin": Operation(thinned, {}, "failed", {"lane": None}),
    "purge": Operation(purged, {}, "runnable"),
    "release": Operation(
        released,
        {"status": "runnable", "worker_id": "given back", "reason": "why it was given back"},
        values={"cancel_requested": False},
    ),
    "reclaim": Operation(
        reclaimed(9),
        {"status": "runnable", "worker_id": "its process died", "crashes": "counted"},
        values={**ASKED},
    ),
    "reclaim, failed": Operation(
        reclaimed(3),
        {
            "status": "the end",
            "finished_at": "the end",
            "worker_id": "its process died",
            "crashes": "counted",
            "error": "WorkerLost",
        },
        values={**ASKED},
    ),
}


def given(rows: Rows, operation: Operation) -> tuple[int, int]:
    """Insert the operation's row; return its id and a worker's."""
    status, _, kept = operation.status.partition(" ")
    terminal = status in ("done", "failed", "cancelled")
    worker = rows.worker()
    values = VALUES | operation.values
    if status != "runnable":
        values["lane"] = None  # only what waits is parked
    values |= {"status": status, "worker_id": worker if status == "executing" else None}
    if terminal:
        values["finished_at"] = MOMENT
        if not kept:
            values["worker_id"] = worker
    values["id"] = rows.fetch("SELECT nextval('{schema}.instance_ids') AS id")[0]["id"]
    if terminal and not kept:
        rows.fetch("SELECT {schema}.make_partition(%s)", [DAY])
    table = "history" if terminal and not kept else "instances"
    names = ", ".join(values)
    marks = ", ".join(["%s::{schema}.status[]" if name == "correlation_scope" else "%s" for name in values])
    rows.fetch(f"INSERT INTO {{schema}}.{table} ({names}) VALUES ({marks})", list(values.values()))
    return values["id"], worker


def columns(rows: Rows, table: str) -> list[tuple[str, str]]:
    found = rows.fetch(
        "SELECT attname::text AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute"
        " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        [f"{rows.schema}.{table}"],
    )
    return [(row["name"], row["type"]) for row in found]


def test_history_has_the_columns_of_instances(rows: Rows) -> None:
    """In the same order: rows are archived by SELECT *."""
    assert columns(rows, "history") == columns(rows, "instances")


def test_every_column_has_a_value_here(rows: Rows) -> None:
    names = {name for name, _ in columns(rows, "instances")}
    assert (names - set(VALUES) - OF_STATUS, set(VALUES) - names) == (set(), set()), (
        "a new column: give it a value other than its default in VALUES, and say in OPERATIONS where it is lost and why"
    )
    (defaults,) = rows.insert()
    live = rows.live(defaults)
    assert live is not None
    same = [name for name, value in VALUES.items() if live[name] == getattr(value, "obj", value)]
    assert same == [], "these have their default here, so that a loss would not be seen"


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_columns_survive_or_are_listed(rows: Rows, name: str) -> None:
    operation = OPERATIONS[name]
    instance, worker = given(rows, operation)
    before = rows.live(instance) or rows.history(instance)
    operation.run(rows, instance, worker)
    after = rows.live(instance) or rows.history(instance)
    assert before is not None
    assert after is not None
    lost = {column for column in before if before[column] != after[column]}
    assert (lost - set(operation.changed), set(operation.changed) - lost) == (set(), set()), (
        f"after {name!r}: columns that changed without a reason, and reasons for columns that survived. Carry a new"
        " column on in the statement (durable/sql: finish, advance, retry_failed, archive), or give the reason here"
    )
