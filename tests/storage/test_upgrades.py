"""From every released schema to this one: what lived there lives on and is finished, whatever the upgrade meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from durable import Durable
from durable.errors import SchemaError
from durable.sql import Statements
from durable.storage import migrations
from tests import fix_db
from tests.cli.conftest import Ran, durable, here, process
from tests.fix_app import Command
from tests.fix_db import wait_until

__all__ = ["durable", "here", "process"]

Connection = psycopg.Connection[Any]
schema = fix_db.schema  # one of its own for each test, since these change it
NEWEST = migrations.known()[-1].id
every_release = pytest.mark.parametrize("release", range(1, NEWEST))
AN_HOUR_AGO = datetime.now(UTC) - timedelta(hours=1)

TASKS = """
from durable import Await, Done, Machine, step

@app.task(name="work")
def work():
    return "worked"

@app.machine(name="order")
class Order(Machine):
    @step(initial=True)
    def begin(self, ctx):
        return Await(["paid"], then=self.paid)

    @step
    def paid(self, ctx):
        return Done([signal.name for signal in ctx.awaited])

    @step
    def join(self, ctx):
        return Done(sorted(child.result for child in ctx.children))
"""


class Old:
    """A schema as the code of a release left it, with live rows in every status that it knows."""

    def __init__(self, connection: Connection, schema: str, release: int) -> None:
        self.connection, self.schema, self.release = connection, schema, release
        statements = Statements(schema)
        connection.execute(migrations._head(statements).encode())
        for migration in migrations.known()[:release]:
            connection.execute(statements.render(migration.text).encode())
            connection.execute(statements.render(migrations._record(migration)).encode())
        today = datetime.now(UTC).date()
        for day in (today, today + timedelta(days=1)):
            connection.execute(
                f"CREATE TABLE {schema}.history_{day:%Y%m%d} PARTITION OF {schema}.history"
                f" FOR VALUES FROM ('{day} 00:00:00+00') TO ('{day + timedelta(days=1)} 00:00:00+00')"
            )
        self.ends: dict[int, Any] = {}
        """What each live instance is to end with."""
        self._fill()

    def _put(self, table: str, **columns: Any) -> int:
        query = sql.SQL("INSERT INTO {} ({}) VALUES ({}) RETURNING *").format(
            sql.Identifier(self.schema, table),
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
        )
        row = self.connection.execute(query, list(columns.values())).fetchone()
        assert row is not None
        return row[0]  # type: ignore[no-any-return]

    def instance(self, end: Any = "worked", **columns: Any) -> int:
        values: dict[str, Any] = {
            "status": "runnable",
            "machine": "work",
            "step": "run",
            "state": b'{"args": [], "kwargs": {}}',
        }
        if columns.get("machine") == "order":
            values["state"] = b"{}"
        given = {**values, "queue": "default", "state_type": "json", "eligible_at": AN_HOUR_AGO, **columns}
        instance = self._put("instances", **given)
        if "finished_at" not in columns:
            self.ends[instance] = end
        return instance

    def _fill(self) -> None:
        dead = self._put("workers", kind="worker", name="old", host="moon", boot_id="b", pid=1, command_pid=1,
                         command_start="0", queue="default", expires_at=AN_HOUR_AGO)  # fmt: skip
        self.instance()
        self.instance(status="scheduled")
        self.instance(status="executing", worker_id=dead, token=1)
        self.instance(priority=5, attempt=2, version=2, crashes=1, correlation_key="taken")
        self.over = [
            self.instance(status="done", finished_at=datetime.now(UTC), correlation_key="kept",
                          correlation_scope="{done}", result_type="json", result=b"1"),
            self.instance(status="failed", finished_at=datetime.now(UTC), error='{"type": "E", "message": "m"}'),
        ]  # fmt: skip
        self.connection.execute(
            f"WITH gone AS (DELETE FROM {self.schema}.instances WHERE status = 'failed' RETURNING *)"
            f" INSERT INTO {self.schema}.history SELECT * FROM gone"
        )
        if self.release >= 2:
            order = {"machine": "order", "version": 1}
            waits = {**order, "status": "awaiting_signal", "step": "paid", "awaits": "{paid}"}
            self.awaiting = self.instance(["paid"], **waits)
            self.instance([], deadline=AN_HOUR_AGO, **waits)
            inbox = True if self.release < 12 else 1
            shown = self.instance(["paid"], step="paid", inbox=inbox, awaits="{paid}", **order)
            self._put("signals", target_id=shown, name="paid", payload_type="json", payload=b"null")
            parent = self.instance(["worked", "worked"], status="awaiting_children", step="join", children_round=1,
                                   children_pending=2, **order)  # fmt: skip
            for _ in range(2):
                self.instance(parent_id=parent, parent_round=1)
        if self.release >= 7:
            self._put("limits", kind="rate", name="mails", allowed=1000, period=timedelta(seconds=1), burst=1000)
            self.instance(rate_limit="mails")
            self.instance(concurrency_key="k", status="executing", worker_id=dead, token=1)
            self.instance(concurrency_key="k", lane="key k")

    def live(self) -> list[int]:
        rows = self.connection.execute(
            f"SELECT id FROM {self.schema}.instances WHERE finished_at IS NULL ORDER BY id"
        ).fetchall()
        return [row[0] for row in rows]

    def applied(self) -> set[int]:
        return set(migrations.applied(self.connection, self.schema))


@pytest.fixture
def old(connection: Connection, schema: str) -> Callable[[int], Old]:
    return lambda release: Old(connection, schema, release)


@every_release
def test_what_lived_in_an_older_schema_is_finished_by_a_worker_of_this_one(
    old: Callable[[int], Old],
    release: int,
    tasks_module: Callable[[str], Path],
    durable: Callable[..., Ran],
    durable_worker: Callable[..., Command],
    database: str,
    schema: str,
) -> None:
    made = old(release)
    assert made.live() == sorted(made.ends)
    tasks_module(TASKS)
    refused = durable("list")
    assert refused.code == 3
    assert f"lacks migration {release + 1}; run `durable migrate`" in refused.error
    migrated = durable("migrate")
    assert migrated.out.count("applied 00") == NEWEST - release
    assert made.live() == sorted(made.ends)
    assert durable("migrate").out == f"schema {schema!r} is up to date\n"

    durable_worker("worker", "-B", "-c", "2", wait=False)
    app = Durable("test", dsn=database, schema=schema)
    try:
        if release >= 2:
            app.signal(made.awaiting, "paid")
        for instance, end in made.ends.items():
            assert app.result(instance).get(timeout=30) == end
        assert made.live() == []
        assert [app.result(instance).status for instance in made.over] == ["done", "failed"]
    finally:
        app.close()


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_on_an_older_schema_nothing_starts(
    old: Callable[[int], Old], tasks_module: Callable[[str], Path], process: Callable[..., Ran], command: str
) -> None:
    made = old(NEWEST - 1)
    tasks_module(TASKS)
    ran = process(command)
    assert ran.code == 3
    assert ran.error == f"Error: schema {made.schema!r} lacks migration {NEWEST}; run `durable migrate`"
    assert made.live() == sorted(made.ends)


def test_a_worker_goes_on_and_another_starts_on_a_newer_schema_that_breaks_nothing(
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    connection: Connection,
    app: Durable,
    schema: str,
) -> None:
    tasks_module(TASKS)
    running = durable_worker("worker", "-c", "1")
    for table in ("instances", "history"):
        connection.execute(f"ALTER TABLE {schema}.{table} ADD COLUMN later text")
    connection.execute(f"INSERT INTO {schema}.migrations VALUES (9999, 'later', 'x', false)")
    work = app.task(name="work")(lambda: None)
    assert work.delay().get(timeout=20) == "worked"
    assert running.stop() == 0
    started = durable_worker("worker", "-c", "1")
    assert work.delay().get(timeout=20) == "worked"
    assert f"is newer than this code (9999 > {NEWEST}), harmlessly" in started.output()


def waiting_for(connection: Connection, holder: Connection) -> int:
    """Wait until a session waits for a lock of another; return its pid."""
    query = "SELECT pid FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
    found = wait_until(lambda: connection.execute(query, [holder.info.backend_pid]).fetchone(), what="the migration")
    return int(found[0])  # type: ignore[index]


def test_rivals_upgrade_an_older_schema_once(old: Callable[[int], Old], database: str, schema: str) -> None:
    made = old(1)
    start = threading.Barrier(4)

    def migrate() -> int:
        with psycopg.connect(database, autocommit=True) as connection:
            start.wait()
            return len(migrations.migrate(connection, schema))

    with ThreadPoolExecutor(4) as pool:
        applied = [future.result() for future in [pool.submit(migrate) for _ in range(4)]]
    assert sorted(applied) == [0, 0, 0, NEWEST - 1]
    assert made.live() == sorted(made.ends)


def test_a_migrate_that_is_killed_half_way_leaves_the_older_schema_whole(
    old: Callable[[int], Old], database: str, schema: str, connection: Connection, tmp_path: Path
) -> None:
    made = old(2)
    command = [sys.executable, "-m", "durable_cli", "migrate", "--dsn", database, "--schema", schema]
    with psycopg.connect(database) as reader:
        reader.execute(f"SELECT count(*) FROM {schema}.history")  # which migration 3 waits for, half done
        killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pid = waiting_for(connection, reader)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(10)
    gone = "SELECT FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: connection.execute(gone, [pid]).rowcount == 0, what="the end of its server process")
    assert made.applied() == {1, 2}
    assert made.live() == sorted(made.ends)
    assert len(migrations.migrate(connection, schema)) == NEWEST - 2
    assert made.live() == sorted(made.ends)


def test_whoever_waits_behind_an_upgrade_that_waits_gets_through_and_then_the_upgrade_does(
    old: Callable[[int], Old], database: str, schema: str, connection: Connection
) -> None:
    made = old(2)
    connection.execute("SET statement_timeout = '30s'")
    with (
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(database) as reader,
        psycopg.connect(database, autocommit=True) as upgrading,
    ):
        reader.execute(f"SELECT count(*) FROM {schema}.history")
        upgrade = pool.submit(migrations.migrate, upgrading, schema)
        assert waiting_for(connection, reader) == upgrading.info.backend_pid
        connection.execute(f"SELECT count(*) FROM {schema}.history")
        assert not upgrade.done()
        reader.rollback()
        assert len(upgrade.result(30)) == NEWEST - 2
    assert made.live() == sorted(made.ends)


def test_an_upgrade_that_does_not_come_by_its_locks_names_who_has_them(
    old: Callable[[int], Old], database: str, schema: str
) -> None:
    made = old(2)
    with (
        psycopg.connect(database, application_name="a report") as reader,
        psycopg.connect(database, autocommit=True) as upgrading,
    ):
        reader.execute(f"SELECT count(*) FROM {schema}.history")
        with pytest.raises(SchemaError, match=rf"in use by session {reader.info.backend_pid} \(a report, .*end their"):
            migrations.migrate(upgrading, schema, patience=0)
    assert made.applied() == {1, 2}
    assert made.live() == sorted(made.ends)
