"""The rows that two operations meet at: one family with a member of every status, made anew for each meeting.

Ids are the same every time, so that two ends can be compared: rows and signals up to 99 are the world's, those from
1000 on were made by an operation. Every change of an instance is written down by a trigger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Any

from durable.instance import Claimed
from durable.sql import Statements
from durable.storage import migrations, partitions
from durable.storage.session import connect, execute
from tests.fix_rows import Session

PARENT, EXECUTING, RUNNABLE, DUE, PARKED, SUSPECT, SECOND, FAILED, KEPT, HEIR, OLD_CHILD, OLD = range(1, 13)
OLD_DAY = date(2025, 1, 1)
SCHEMA = "t_pairs"
CANDIDATE, WAITING, RATED, RATED_WAITING = range(20, 24)
OWNER, DEAD = 1, 4
CLAIMERS = (2, 3)
TOKEN, VERSION = 3, 2
SHOWN = (1, 2)
"""Ids of the signals that the step of EXECUTING was shown."""
LONG_AGO = "2026-01-01T00:00:00+00:00"
NEW = 1000
_IDS = ("id", "target_id", "parent_id", "inbox", "signals_seen")

Row = dict[str, Any]
Shape = Mapping[str, Sequence[str]]
Traits = frozenset[str]
"""What is different in this world.

gated, keyed  EXECUTING holds a slot of a gate, or a key without one; others wait for it, and for tokens
asked         EXECUTING was asked to end
kept          EXECUTING reserves its key beyond its end
rated         as gated, but nobody who waits for tokens is a candidate: the clock has to open their lane
paused        the queue is
old           the history has a day past retention: a finished child of PARENT, and one of nobody
expired       OWNER's lease has run out
dead          OWNER is
"""

_INSTANCE: Row = {
    "eligible_at": LONG_AGO,
    "created_at": LONG_AGO,
    "status": "runnable",
    "token": 0,
    "version": 0,
    "attempt": 0,
    "machine_version": 1,
    "priority": 0,
    "crashes": 0,
    "cancel_requested": False,
    "terminate_requested": False,
    "queue": "default",
    "machine": "task",
    "step": "run",
    "state_type": "json",
    "state": "\\x7b7d",
    "inbox": None,
    "parent_id": PARENT,
    "parent_round": 1,
    "children_pending": 0,
    "children_round": 0,
    "weight": 1,
}
_WORKER: Row = {
    "kind": "worker",
    "name": "test",
    "host": "host",
    "boot_id": "boot",
    "pid": 1,
    "command_pid": 1,
    "command_start": "start",
    "queue": "default",
    "slots": 1,
    "started_at": LONG_AGO,
    "heartbeat_at": LONG_AGO,
    "expires_at": "2100-01-01T00:00:00+00:00",
}
_SIGNAL: Row = {"created_at": LONG_AGO, "consumed": False, "payload_type": "json", "payload": "\\x31"}
_ORPHAN: Row = {"parent_id": None, "parent_round": None}
_TABLES = ("instances", "history", "signals", "workers", "limits", "gates", "buckets", "queues", "changes")

_LOG = """
CREATE TABLE {schema}.changes (
    n bigint GENERATED ALWAYS AS IDENTITY, id bigint, worker bigint, was text, became text, tokens int[], versions int[]
);
CREATE FUNCTION {schema}.note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {schema}.changes (id, worker, was, became, tokens, versions)
    VALUES (coalesce(OLD.id, NEW.id), OLD.worker_id, OLD.status, NEW.status,
            ARRAY[OLD.token, NEW.token], ARRAY[OLD.version, NEW.version]);
    RETURN NULL;
END $$;
CREATE TRIGGER changes AFTER INSERT OR UPDATE OR DELETE ON {schema}.instances
    FOR EACH ROW EXECUTE FUNCTION {schema}.note_change();
"""

_STATE = """
SELECT jsonb_build_object(
    'rows', (SELECT coalesce(jsonb_agg(to_jsonb(e) - '{created_at,expires_at,trace}'::text[] || jsonb_build_object(
                        'eligible_at', e.eligible_at <= clock_timestamp(), 'deadline', e.deadline <= clock_timestamp(),
                        'finished_at', e.finished_at IS NOT NULL)), '[]')
             FROM (SELECT 'live' AS place, * FROM {schema}.instances
                   UNION ALL SELECT 'history', * FROM {schema}.history) AS e),
    'signals', (SELECT coalesce(jsonb_agg(to_jsonb(s) - '{created_at,trace}'::text[]), '[]')
                FROM {schema}.signals AS s),
    'workers', (SELECT jsonb_agg(jsonb_build_object('id', id, 'dead', dead_at IS NOT NULL, 'entered', entered,
                                                    'live', expires_at > clock_timestamp())) FROM {schema}.workers),
    'queues', (SELECT coalesce(jsonb_agg(jsonb_build_object('name', name, 'paused', paused_at IS NOT NULL)), '[]')
               FROM {schema}.queues),
    'limits', (SELECT coalesce(jsonb_agg(to_jsonb(l) - 'updated_at'), '[]') FROM {schema}.limits AS l),
    'gates', (SELECT coalesce(jsonb_agg(to_jsonb(g)), '[]') FROM {schema}.gates AS g),
    'buckets', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                    'bucket', bucket, 'shard', shard, 'opens_at', opens_at <= clock_timestamp(),
                    'drawn', greatest(0, round(extract(epoch FROM full_at - clock_timestamp()) / 3600)))), '[]')
                FROM {schema}.buckets),
    'changes', (SELECT coalesce(jsonb_agg(to_jsonb(c) ORDER BY n), '[]') FROM {schema}.changes AS c))
"""


@dataclass(frozen=True)
class Scene:
    """What one operation of a meeting has before it: the world's traits, the row that both are about, its own place."""

    traits: Traits = frozenset()
    target: int = EXECUTING
    side: int = 0

    @property
    def worker(self) -> int:
        """A worker of its own."""
        return CLAIMERS[self.side]

    @property
    def claimed(self) -> Claimed:
        """EXECUTING as OWNER claimed it."""
        row = next(row for row in _instances(self.traits) if row["id"] == EXECUTING)
        return Claimed(
            EXECUTING,
            TOKEN,
            VERSION,
            0,
            datetime.fromisoformat(LONG_AGO),
            "task",
            1,
            "run",
            0,
            0,
            "json",
            b"{}",
            None,
            row["correlation_key"],
            "kept" in self.traits,
            None,
            "default",
            parent_id=PARENT,
            children_round=1,
            inbox=max(SHOWN),
            parent_round=1,
            concurrency_key=row.get("concurrency_key"),
            gate_shard=row.get("gate_shard"),
        )


@dataclass
class State:
    """Everything there is at the end of a meeting."""

    rows: list[Row]
    signals: list[Row]
    workers: list[Row]
    queues: list[Row]
    limits: list[Row]
    gates: list[Row]
    buckets: list[Row]
    changes: list[Row] = field(compare=False)

    @property
    def live(self) -> list[Row]:
        """Rows of the live table."""
        return [row for row in self.rows if row["place"] == "live"]

    def shape(self, *, whoever: bool = False) -> Shape:
        """What two ends that are the same have in common: no id that an operation drew, nothing of the way there.

        whoever  which of the two claiming workers got a row does not count either
        """
        drawn = {"worker_id": CLAIMERS} if whoever else {}
        return {
            name: sorted(json.dumps(_nameless(row, drawn), sort_keys=True) for row in rows)
            for name, rows in vars(self).items()
            if name != "changes"
        }


def _nameless(row: Row, drawn: Mapping[str, Sequence[int]]) -> Row:
    return {
        name: "new" if (name in _IDS and (value or 0) >= NEW) or value in drawn.get(name, ()) else value
        for name, value in row.items()
        if value is not None and value is not False  # else nobody could read a difference
    }


class Producer(Session):
    """A session without the hot statements' settings, as those of producers and administrators are."""

    def __init__(self, dsn: str) -> None:
        self.sql = Statements(SCHEMA)
        self.connection = connect(dsn, "test")


class World(Session):
    """The session that makes the world and reads it."""

    def __init__(self, dsn: str) -> None:
        self.sql = Statements(SCHEMA)
        self.connection = connect(dsn, "test")
        migrations.migrate(self.connection, SCHEMA)
        self.connection.execute(self.sql.render(_LOG).encode())
        tomorrow = datetime.now(UTC).date() + timedelta(days=1)
        for day in partitions.days(self.connection, self.sql):
            if day > tomorrow:  # each is a table more to empty and to read, thousands of times
                execute(self.connection, self.sql, "drop_partition", {"day": day})
        # What makes the world is nothing that happens in it.
        self.connection.execute("SET session_replication_role = replica")
        self._made = 0
        self._makers: set[str] = set()

    def make(self, traits: Traits) -> None:
        """Put everything in its place."""
        self._made += 1
        if self._made % 200 == 0:
            self.connection.execute(
                self.sql.render("VACUUM " + ", ".join(f"{{schema}}.{name}" for name in _TABLES)).encode()
            )
        if "old" in traits and OLD_DAY not in partitions.days(self.connection, self.sql):
            execute(self.connection, self.sql, "make_partition", {"day": OLD_DAY})
        name = "make_" + "_".join(sorted(traits))
        if name not in self._makers:
            self._makers.add(name)
            self.connection.execute(self.sql.render(_maker(name, traits)).encode())
        self.connection.execute(self.sql.render(f"SELECT {{schema}}.{name}()").encode())

    def run_on(self) -> None:
        """Let the clock run on until every lane that has a time to open is due."""
        self.fetch("UPDATE {schema}.buckets SET opens_at = %s WHERE opens_at IS NOT NULL", [LONG_AGO])

    def state(self) -> State:
        """Read everything."""
        (row,) = self.connection.execute(self.sql.render(_STATE).encode())
        return State(**row[0])


def _maker(name: str, traits: Traits) -> str:
    """A function, whose plans are made once."""
    tables = {
        "instances": _instances(traits),
        "history": [_failed(), *(_old() if "old" in traits else ())],
        "signals": [
            {**_SIGNAL, "id": 1, "target_id": EXECUTING, "name": "go", "dedup_key": "once"},
            {**_SIGNAL, "id": 2, "target_id": EXECUTING, "name": "go"},
            {**_SIGNAL, "id": 3, "target_id": KEPT, "name": "go"},
        ],
        "workers": [
            {
                **_WORKER,
                "id": OWNER,
                **({"expires_at": LONG_AGO} if "expired" in traits else {}),
                **({"dead_at": LONG_AGO} if "dead" in traits else {}),
            },
            *({**_WORKER, "id": claimer} for claimer in CLAIMERS),
            {**_WORKER, "id": DEAD, "dead_at": LONG_AGO},
        ],
        "queues": [{"name": "default", "paused_at": LONG_AGO, "updated_at": LONG_AGO}] if "paused" in traits else [],
        **(_limits(traits) if traits & {"gated", "keyed"} else {}),
    }
    statements = [
        *(f"DELETE FROM {{schema}}.{table}" for table in _TABLES),
        "PERFORM setval('{schema}.instance_ids', 1000), setval('{schema}.signals_id_seq', 1000)",
        *(_insert(table, rows) for table, rows in tables.items() if rows),
    ]
    body = "; ".join(statements)
    return f"CREATE FUNCTION {{schema}}.{name}() RETURNS void LANGUAGE plpgsql AS $$ BEGIN {body}; END $$"


def _insert(table: str, rows: Sequence[Row]) -> str:
    values = json.dumps(rows).replace("'", "''")
    return (
        f"INSERT INTO {{schema}}.{table} OVERRIDING SYSTEM VALUE "
        f"SELECT * FROM jsonb_populate_recordset(NULL::{{schema}}.{table}, '{values}')"
    )


def _failed() -> Row:
    return {
        **_INSTANCE,
        "id": FAILED,
        "status": "failed",
        "token": 1,
        "version": 1,
        "finished_at": datetime.now(UTC).isoformat(),
        "correlation_key": f"k{FAILED}",
    }


def _old() -> list[Row]:
    over = {**_INSTANCE, "status": "done", "token": 1, "version": 1, "finished_at": f"{OLD_DAY}T12:00:00+00:00"}
    return [{**over, "id": OLD_CHILD}, {**over, "id": OLD, **_ORPHAN}]


@cache
def _instances(traits: Traits) -> list[Row]:
    claimed = {"status": "executing", "worker_id": OWNER}
    over = {"status": "done", "token": 1, "version": 1, "finished_at": LONG_AGO, "correlation_scope": ["done"]}
    key = {"gated": "gate:k", "keyed": "solo"}.get(next(iter(traits & {"gated", "keyed"}), ""))
    executing: Row = {
        "token": TOKEN,
        "version": VERSION,
        "inbox": max(SHOWN),
        "children_round": 1,
        "cancel_requested": "asked" in traits,
        "correlation_scope": ["executing", "done", "failed"] if "kept" in traits else None,
    }
    if key is not None:
        executing |= {"concurrency_key": key, "gate_shard": 0 if "gated" in traits else None}
    rows: list[Row] = [
        {"id": EXECUTING, **claimed, **executing},
        {"id": RUNNABLE},
        {"id": DUE, "status": "scheduled"},
        {"id": PARKED, "status": "awaiting_signal", "awaits": ["other", "late"], "deadline": LONG_AGO, "version": 1},
        {"id": SUSPECT, "crashes": 1, "token": 1},
        {"id": SECOND, **claimed, "token": 1},
        {"id": KEPT, **over, **_ORPHAN},
        {"id": HEIR, **over, "parent_id": EXECUTING},
    ]
    if key is not None:
        rows += [
            {"id": CANDIDATE, "concurrency_key": key},
            {"id": WAITING, "concurrency_key": key, "lane": f"key {key}"},
            {"id": RATED, "rate_limit": "bucket", **({"lane": "rate bucket"} if "rated" in traits else {})},
            {"id": RATED_WAITING, "rate_limit": "bucket", "lane": "rate bucket"},
        ]
    pending = sum(row.get("parent_id", PARENT) == PARENT for row in rows)
    rows.append({"id": PARENT, "status": "awaiting_children", "children_round": 1, "version": 1, **_ORPHAN})
    rows[-1]["children_pending"] = pending
    # The last comes first in the table: whoever locks in the order of the table does not lock in the order of ids.
    return [{**_INSTANCE, "correlation_key": f"k{row['id']}", **row} for row in reversed(rows[-1:] + rows[:-1])]


def _limits(traits: Traits) -> dict[str, list[Row]]:
    common = {"pinned": False, "updated_at": LONG_AGO, "shards": 1, "allowed": 1}
    gated = "gated" in traits
    return {
        "limits": [
            {**common, "kind": "rate", "name": "bucket", "period": "1 hour", "burst": 2},
            *([{**common, "kind": "concurrency", "name": "gate"}] if gated else []),
        ],
        "gates": [{"key": "gate:k", "shard": 0, "wanted": 1, "capacity": 1, "used": 1}] if gated else [],
        "buckets": [{"bucket": "bucket", "shard": 0, "full_at": LONG_AGO, "opens_at": LONG_AGO}],
    }
