"""The other side of the comparison: an app on a real Postgres, workers turned by hand, and everything read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

from durable import ConcurrencyLimit, Durable
from durable.runtime.gc import collect
from durable.runtime.reaper import reap
from durable.storage import maintenance, testing
from durable.storage.session import Operation
from tests.machines.driver import Driver
from tests.property.model import GATES, TERMINAL, Instance, Model
from tests.property.program import Programs, tag_of

QUEUES = ("default", "other")
SEATS = ("default", "default", "other")
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIER = """
WITH i AS (UPDATE {schema}.instances SET finished_at = finished_at - interval '2 days' WHERE finished_at IS NOT NULL)
UPDATE {schema}.signals SET created_at = created_at - interval '2 days'
"""

_ROWS = """
SELECT e.*, e.status::text AS status, e.error ->> 'type' AS error
FROM (SELECT true AS here, * FROM {schema}.instances UNION ALL SELECT false, * FROM {schema}.history) AS e ORDER BY id
"""
_SIGNALS = """
SELECT target_id, name, convert_from(payload, 'UTF8')::jsonb AS payload, dedup_key, consumed
FROM {schema}.signals ORDER BY target_id, id
"""


class World:
    """An app, three seats for workers, and a connection to look with.

    Nobody keeps a clock here: `travel` moves the rows instead, and duties run when they are called.
    """

    def __init__(self, dsn: str, schema: str) -> None:
        self.app = Durable(
            "model",
            dsn=dsn,
            schema=schema,
            reaper_grace=0.0,
            concurrency_limits={name: ConcurrencyLimit(limit) for name, limit in GATES.items()},
        )
        self.app.migrate()
        self.programs = Programs(self.app)
        self.drivers = [Driver(self.app, queue) for queue in SEATS]
        self.connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self.callers = psycopg.connect(dsn, autocommit=True)

    def close(self) -> None:
        for driver in self.drivers:
            driver.close()
        self.connection.close()
        self.callers.close()
        self.app.close()

    def reset(self) -> None:
        """As on the first day."""
        self.run(testing.wipe())
        self.fetch("DELETE FROM {schema}.queues")
        self.fetch("UPDATE {schema}.duties SET ran_at = clock_timestamp()")  # the repair must not hide what is broken
        for driver in self.drivers:
            driver.engine._start_over()

    def run(self, operation: Operation[Any]) -> Any:
        """Run a storage operation in a transaction."""
        return self.drivers[0].run(operation)

    def fetch(self, query: str, *parameters: Any) -> list[dict[str, Any]]:
        """Rows of a query in which {schema} stands for the schema."""
        cursor = self.connection.execute(query.replace("{schema}", self.app.schema), parameters or None)
        return cursor.fetchall() if cursor.description else []

    # Time and duties

    def travel(self, seconds: int) -> None:
        """Let time pass for what waits; nobody looks yet."""
        self.run(_travel(seconds))

    def promote(self) -> None:
        self.run(maintenance.promote())

    def time_out(self) -> None:
        self.run(maintenance.time_out())

    def lapse(self, worker: int) -> None:
        """A lease runs out."""
        self.fetch("UPDATE {schema}.workers SET expires_at = clock_timestamp() - interval '1 s' WHERE id = %s", worker)

    def reap(self) -> None:
        reap(self.drivers[0].engine._link, self.app.conf, self.app.wakeups, LONG_AGO)

    def collect(self) -> None:
        """Sweep two days after whatever has ended and is still in the live table."""
        self.fetch(_EARLIER)
        collect(self.drivers[0].engine._link, self.app.conf)

    # Reading

    def rows(self) -> dict[int, dict[str, Any]]:
        """Every instance."""
        found = self.fetch(_ROWS)
        rows = {row["id"]: row for row in found}
        assert len(rows) == len(found), "an instance is in one place"
        return rows

    def child(self, parent: int, tag: int) -> int:
        """The id of a parent's child."""
        found = self.fetch("SELECT id, state FROM {schema}.instances WHERE parent_id = %s", parent)
        ids = [row["id"] for row in found if tag_of(decoded(row["state"])) == tag]
        assert len(ids) == 1, f"parent {parent} has {len(ids)} children with tag {tag}"
        return int(ids[0])

    def differences(self, model: Model) -> Iterator[str]:
        """In what the database and the model differ."""
        rows = self.rows()
        for instance_id in sorted(rows.keys() | model.instances.keys()):
            row, meant = rows.get(instance_id), model.instances.get(instance_id)
            if row is None or meant is None:
                yield f"instance {instance_id}: {'missing' if row is None else 'should not be there: ' + row['status']}"
                continue
            stands = in_words(row)
            for name, should in foretold(meant).items():
                if stands[name] != should:
                    yield f"instance {instance_id}: {name} is {stands[name]!r}, not {should!r}"
        inboxes: dict[int, list[Any]] = {i.id: [] for i in model.instances.values() if i.inbox}
        for signal in self.fetch(_SIGNALS):
            inboxes.setdefault(signal.pop("target_id"), []).append(tuple(signal.values()))
        for target, inbox in inboxes.items():
            owner = model.instances.get(target)
            meant = [(s.name, s.payload, s.dedup, s.consumed) for s in owner.inbox] if owner else []
            if inbox != meant:
                yield f"inbox of {target} is {inbox!r}, not {meant!r}"


def _travel(seconds: int) -> Operation[None]:
    yield "travel", {"seconds": float(seconds)}


def decoded(payload: bytes | None) -> Any:
    return None if payload is None else json.loads(payload)


def in_words(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the model describes instances."""
    here, state = row["here"], decoded(row["state"])
    words = {
        "status": row["status"],
        "kept": here and row["status"] in TERMINAL,
        "step": row["step"],
        "state": state,
        "token": row["token"],
        "version": row["version"],
        "queue": row["queue"],
        "priority": row["priority"],
        "key": row["correlation_key"],
        "limit": row["concurrency_key"],
        "parent_id": row["parent_id"],
        "parent_round": row["parent_round"],
        "rounds": row["children_round"],
        "cancel_requested": row["cancel_requested"],
        "result": decoded(row["result"]),
        "error": row["error"],
    }
    if row["status"] in TERMINAL:
        words["unread"] = (row["inbox"] or 0) > (row["signals_seen"] or 0)
        return words | {"awaits": row["awaits"]} if row["status"] == "failed" else words
    return words | {
        "attempt": row["attempt"],
        "crashes": row["crashes"],
        "worker": row["worker_id"],
        "awaits": row["awaits"],
        "deadline": row["deadline"] is not None,
        "pending": row["children_pending"] if row["status"] == "awaiting_children" else 0,
    }


def foretold(i: Instance) -> dict[str, Any]:
    """What `in_words` has to say of an instance. Some columns of what has ended are nobody's business."""
    same = ("status", "step", "token", "version", "queue", "priority", "key", "limit", "parent_id", "parent_round")
    words = {name: getattr(i, name) for name in (*same, "rounds", "cancel_requested", "result", "error")}
    words |= {"kept": not i.live and i.occupies, "state": i.state}
    if not i.live:
        words["unread"] = any(s.number > i.seen for s in i.inbox)
        return words | {"awaits": i.awaits and list(i.awaits)} if i.status == "failed" else words
    return words | {
        "attempt": i.attempt,
        "crashes": i.crashes,
        "worker": i.worker,
        "awaits": None if i.awaits is None else list(i.awaits),
        "deadline": i.deadline is not None,
        "pending": i.pending if i.status == "awaiting_children" else 0,
    }
