"""`durable doctor`: each finding on a condition that is really there, and none where nothing is wrong.

On a server of this file's own, since half of the conditions are the server's.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import pq
from psycopg.conninfo import make_conninfo

from durable import Durable
from durable.embedded import Server
from durable.storage import workers
from durable.storage.workers import Identity
from tests.cli.conftest import NO_SERVER, Ran
from tests.fix_db import FAST, wait_until
from tests.fix_pgbouncer import PgBouncer
from tests.fix_rows import Rows

SETTINGS = {**FAST, "max_connections": "30", "max_prepared_transactions": "5", "wal_level": "replica"}


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    home = Path(tempfile.gettempdir()) / f"durable-doctor-{uuid.uuid4().hex[:8]}"
    home.mkdir()
    home.chmod(0o755)
    server = Server(home, settings=SETTINGS)
    yield server.ensure()
    server.release()
    server.stop()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    rows = Rows(database, schema)
    yield rows
    rows.close()


Doctor = Callable[..., list[dict[str, str]]]


@pytest.fixture
def doctor(app: Durable, durable: Callable[..., Ran], database: str, schema: str) -> Doctor:
    """What it finds, by `durable doctor --json`."""

    def examine(*arguments: str, dsn: str = database, **environment: str) -> list[dict[str, str]]:
        ran = durable("doctor", "--dsn", dsn, "--schema", schema, "--json", *arguments, **environment)
        assert ran.code == bool(ran.json["findings"]), ran.err
        assert ran.json["healthy"] is (not ran.json["findings"])
        found: list[dict[str, str]] = ran.json["findings"]
        return found

    return examine


def the_one(found: list[dict[str, str]], name: str) -> dict[str, str]:
    (one,) = [finding for finding in found if finding["finding"] == name]
    assert [finding["finding"] for finding in found] == [name]
    assert one["severity"] in ("error", "warning")
    assert one["remedy"]
    return one


def lease(rows: Rows, kind: str = "worker", ttl: float = 600.0, queue: str = "default", *tasks: str) -> int:
    return rows.run(workers.register(Identity(kind, "w@moon", "moon", "b", 7, 6, "s", queue, tasks=tasks), ttl))


def test_where_nothing_is_wrong_it_finds_nothing(
    doctor: Doctor, durable: Callable[..., Ran], rows: Rows, database: str, schema: str
) -> None:
    lease(rows, "worker", 600.0, "default", "task:1")
    rows.insert(3)
    assert doctor() == []
    ran = durable("doctor", "--dsn", database, "--schema", schema)
    assert (ran.code, ran.out, ran.err) == (0, "healthy: nothing is wrong\n", "")


def test_people_get_a_table(
    doctor: Doctor, durable: Callable[..., Ran], rows: Rows, database: str, schema: str
) -> None:
    rows.claimed(lease(rows))
    rows.fetch("UPDATE {schema}.workers SET expires_at = now() - interval '1 hour'")
    ran = durable("doctor", "--dsn", database, "--schema", schema)
    assert ran.code == 1
    assert ran.out.split("\n")[0].split() == ["SEVERITY", "FINDING", "CAUSE", "REMEDY"]
    assert "stuck lease" in ran.out


def test_a_session_that_holds_back_vacuum_is_named_with_its_pid_application_and_age(
    doctor: Doctor, database: str
) -> None:
    with psycopg.connect(database, application_name="reports") as other:
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT count(*) FROM pg_class")
        assert doctor() == []
        finding = the_one(doctor("--max-age", "0.001"), "vacuum held back")
        assert f"session {other.info.backend_pid} (application 'reports'" in finding["cause"]
        assert "idle in transaction" in finding["cause"]
        assert " has had a transaction open for " in finding["cause"]
        assert f"pg_terminate_backend({other.info.backend_pid})" in finding["remedy"]
    assert doctor("--max-age", "0.001") == []


def test_session_that_holds_locks_is_named(doctor: Doctor, app: Durable, rows: Rows, database: str) -> None:
    lease(rows, "worker", 600.0, "default", "task:1")
    ids = rows.insert(2)
    with psycopg.connect(database, application_name="shop") as other:
        app.signal(ids[1], "note", connection=other)
        assert doctor() == []
        finding = the_one(doctor("--max-lock", "0.001"), "locks held")
        who = f"session {other.info.backend_pid} (application 'shop', role "
        assert finding["cause"].startswith(who)
        assert "idle in transaction) has held locks for " in finding["cause"]
        assert f" in instances, signals; of instances {ids[1]}: outcomes, signals and cancels" in finding["cause"]
        assert f"pg_terminate_backend({other.info.backend_pid})" in finding["remedy"]
    assert doctor("--max-lock", "0.001") == []


def test_dead_rows_are_counted_beside_who_holds_them(doctor: Doctor, rows: Rows, database: str) -> None:
    with psycopg.connect(database, application_name="reports") as other:
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT 1 FROM pg_class")
        rows.insert(500, delay=1000.0)
        rows.fetch("DELETE FROM {schema}.instances")
        wait_until(lambda: "500 dead rows" in str(doctor("--max-age", "0.001", "--max-dead", "1")), what="the count")
        finding = the_one(doctor("--max-age", "0.001", "--max-dead", "400"), "vacuum held back")
        assert finding["severity"] == "error"
    finding = the_one(doctor("--max-age", "0.001", "--max-dead", "400"), "dead rows")
    assert "table instances has 500 dead rows beside 0; it was vacuumed never" in finding["cause"]
    rows.fetch("VACUUM {schema}.instances")
    wait_until(lambda: doctor("--max-dead", "400") == [], what="the count after vacuum")


def test_a_forgotten_prepared_transaction_is_named(doctor: Doctor, app: Durable, database: str) -> None:
    with closing(psycopg.connect(database)) as other:
        other.execute("SELECT pg_current_xact_id()")
        other.execute("PREPARE TRANSACTION 'forgotten'")
    try:
        finding = the_one(doctor("--max-age", "0.001"), "vacuum held back")
        assert "prepared transaction 'forgotten' of role durable has waited for" in finding["cause"]
        assert "ROLLBACK PREPARED 'forgotten'" in finding["remedy"]
    finally:
        with psycopg.connect(database, autocommit=True) as another:
            another.execute("ROLLBACK PREPARED 'forgotten'")


@contextmanager
def standby(database: str, slot: str | None, xmin: int) -> Iterator[None]:
    """What a standby with hot_standby_feedback says to its primary, in the replication protocol."""
    dsn = make_conninfo(database, application_name="replica7", replication="true")
    connection = pq.PGconn.connect(dsn.encode())
    try:
        assert connection.status == pq.ConnStatus.OK, connection.error_message
        start = connection.exec_(b"IDENTIFY_SYSTEM").get_value(0, 2)
        assert start is not None
        named = f"SLOT {slot} " if slot else ""
        result = connection.exec_(f"START_REPLICATION {named}PHYSICAL {start.decode()}".encode())
        assert result.status == pq.ExecStatus.COPY_BOTH, connection.error_message
        connection.put_copy_data(b"h" + struct.pack("!qIIII", 0, xmin, 0, 0, 0))
        connection.flush()
        yield
    finally:
        connection.finish()


def oldest_xmin(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint").fetchone()
    assert row is not None
    return int(row[0]) % 2**32


def test_a_standby_that_sends_feedback_is_named(
    doctor: Doctor, database: str, connection: psycopg.Connection[Any]
) -> None:
    with standby(database, None, oldest_xmin(connection)):
        found = wait_until(lambda: doctor("--max-xids", "0"), what="the standby's feedback")
        finding = the_one(found, "vacuum held back")  # type: ignore[arg-type]
        assert "standby 'replica7' (pid " in finding["cause"]
        assert "hot_standby_feedback" in finding["remedy"]


def test_a_slot_whose_standby_is_gone_is_named(
    doctor: Doctor, database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("SELECT pg_create_physical_replication_slot('old_replica', true)")
    try:
        assert doctor("--max-xids", "0") == []
        with standby(database, "old_replica", oldest_xmin(connection)):
            wait_until(lambda: doctor("--max-xids", "0"), what="the standby's feedback")
        wait_until(lambda: "(inactive)" in str(doctor("--max-xids", "0")), what="the standby's end")
        finding = the_one(doctor("--max-xids", "0"), "vacuum held back")
        assert "replication slot 'old_replica' (inactive)" in finding["cause"]
        assert "pg_drop_replication_slot('old_replica')" in finding["remedy"]
        assert doctor() == []
    finally:
        wait_until(lambda: _dropped(connection, "old_replica"))


def _dropped(connection: psycopg.Connection[Any], slot: str) -> bool:
    try:
        connection.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
    except psycopg.errors.ObjectInUse:
        return False
    return True


def test_rows_of_a_worker_that_is_gone_are_stuck(doctor: Doctor, rows: Rows) -> None:
    worker = lease(rows)
    (first, _) = rows.claimed(worker, 2)
    assert doctor() == []
    rows.fetch("UPDATE {schema}.workers SET expires_at = now() - interval '1 hour'")
    finding = the_one(doctor(), "stuck lease")
    assert f"process 7 of w@moon on moon, gone for 60 min, still holds 2 instances (id {first.id})" in finding["cause"]
    rows.fetch("DELETE FROM {schema}.workers")
    assert f"worker {worker}, which has no lease" in the_one(doctor(), "stuck lease")["cause"]


def test_a_task_that_no_worker_of_its_queue_knows_is_named(doctor: Doctor, rows: Rows) -> None:
    lease(rows, "worker", 600.0, "default", "task:1")
    lease(rows, "worker", 600.0, "other", "task:1", "task:2", "ship:1")
    (old, _) = rows.insert(2, machine="ship")
    rows.insert(1, machine="ship", queue="other")
    finding = the_one(doctor(), "unknown task")
    assert f"no live worker of queue default knows 'ship' version 1; 2 instances (id {old}) wait" in finding["cause"]


def test_a_queue_without_a_worker_is_named_once_work_waits_for_long(doctor: Doctor, rows: Rows) -> None:
    rows.insert(2, queue="mails")
    assert doctor() == []
    finding = the_one(doctor("--max-wait", "0.001"), "queue without worker")
    assert "no worker serves queue mails; 2 instances wait" in finding["cause"]
    assert finding["remedy"] == "durable worker -Q mails"


def test_a_paused_queue_in_which_work_waits_is_named(doctor: Doctor, app: Durable, rows: Rows) -> None:
    app.pause("mails", "provider is down")
    assert doctor() == []
    rows.insert(2, queue="mails")
    finding = the_one(doctor(), "paused queue")
    assert "queue mails is paused since" in finding["cause"]
    assert "(provider is down); 2 instances wait" in finding["cause"]


def test_a_rate_limit_that_is_gone_is_named_with_who_waits_for_it(doctor: Doctor, rows: Rows) -> None:
    (first, _) = rows.insert(2, rate_limit="smtp:eu")
    finding = the_one(doctor(), "unknown limit")
    assert f"rate limit 'smtp' is not in the database; 2 instances (id {first}) wait for it" in finding["cause"]


def test_a_limit_of_the_app_that_was_never_stored_is_named(
    here: Path, durable: Callable[..., Ran], app: Durable, database: str, schema: str
) -> None:
    (here / "tasks.py").write_text(
        "from durable import Durable, RateLimit\n"
        f"app = Durable('test', dsn={database!r}, schema={schema!r}, rate_limits={{'smtp': RateLimit(5)}})\n"
    )
    found = durable("doctor", "-A", "tasks", "--json").json["findings"]
    assert "rate limit 'smtp' is not in the database" in the_one(found, "unknown limit")["cause"]


def test_schedules_and_waiting_rows_without_a_beat_are_named(doctor: Doctor, rows: Rows) -> None:
    rows.insert(1, delay=3600.0)
    assert the_one(doctor(), "no beat")["severity"] == "error"
    lease(rows, "worker", 600.0, "default", "task:1")
    finding = the_one(doctor(), "no beat")
    assert finding["severity"] == "warning"
    assert "no beat runs for 0 schedules and 1 waiting instances" in finding["cause"]
    lease(rows, "beat")
    assert doctor() == []


def test_partitions_past_retention_are_named_unless_a_live_parent_wants_their_children(
    doctor: Doctor, rows: Rows, app: Durable
) -> None:
    day = datetime.now(UTC).date() - timedelta(days=9)
    rows.fetch(
        f"CREATE TABLE {{schema}}.history_{day:%Y%m%d} PARTITION OF {{schema}}.history "
        f"FOR VALUES FROM ('{day} 00:00:00+00') TO ('{day + timedelta(days=1)} 00:00:00+00')"
    )
    finding = the_one(doctor(), "partitions not dropped")
    assert f"1 partitions of the history are past retention (24 h), the oldest of {day}" in finding["cause"]
    (parent,) = rows.insert(1, delay=0.0)
    rows.fetch(
        "INSERT INTO {schema}.history (id, eligible_at, created_at, finished_at, status, token, version, attempt,"
        " machine_version, priority, crashes, cancel_requested, queue, machine, step, state_type, state, parent_id)"
        " VALUES (999999, now(), now(), %s, 'done', 1, 1, 0, 1, 0, 0, false, 'default', 'task', 'run', 'json', '', %s)",
        [datetime(day.year, day.month, day.day, 12, tzinfo=UTC), parent],
    )
    assert doctor() == []


def test_a_partition_that_is_missing_for_tomorrow_is_named(doctor: Doctor, rows: Rows) -> None:
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    rows.fetch(f"DROP TABLE {{schema}}.history_{tomorrow:%Y%m%d}")
    assert str(tomorrow) in the_one(doctor(), "partitions missing")["cause"]


def test_a_server_that_runs_out_of_connections_is_named_with_who_has_them(doctor: Doctor, database: str) -> None:
    held = []
    try:
        for _ in range(21):
            held.append(psycopg.connect(database, application_name="greedy"))
        finding = the_one(doctor(), "connections")
        assert " of 27 connections are in use, most by greedy (21)" in finding["cause"]
    finally:
        for connection in held:
            connection.close()


def test_a_schema_that_is_missing_behind_ahead_or_of_another_build_is_named(
    durable: Callable[..., Ran], doctor: Doctor, rows: Rows, database: str
) -> None:
    ran = durable("doctor", "--dsn", database, "--schema", "nowhere", "--json")
    assert ran.code == 1
    assert "schema 'nowhere' isn't there" in the_one(ran.json["findings"], "schema")["cause"]
    rows.fetch("INSERT INTO {schema}.migrations VALUES (99, 'later', 'x', false)")
    assert the_one(doctor(), "schema")["severity"] == "warning"
    rows.fetch("UPDATE {schema}.migrations SET breaking = true WHERE id = 99")
    finding = the_one(doctor(), "schema")
    assert finding["severity"] == "error"
    assert finding["remedy"] == "deploy code of the schema's version"
    rows.fetch("DELETE FROM {schema}.migrations WHERE id >= 8")
    assert "lacks migration 8" in the_one(doctor(), "schema")["cause"]


def test_a_database_that_is_away_is_no_finding_but_an_error(durable: Callable[..., Ran]) -> None:
    ran = durable("doctor", "--dsn", NO_SERVER)
    assert ran.code == 3
    assert "can't be reached" in ran.error
    assert "sesame" not in ran.err


# Behind PgBouncer


def test_a_pooler_in_transaction_mode_is_recognized_and_what_it_needs_is_said(
    doctor: Doctor, pgbouncer: Callable[..., PgBouncer], database: str
) -> None:
    dsn = pgbouncer(database, "transaction").dsn
    finding = the_one(doctor(dsn=dsn), "pooler")
    assert finding["severity"] == "error"
    assert "pooler in transaction mode" in finding["cause"]
    with psycopg.connect(dsn) as one, psycopg.connect(dsn) as two:
        for client in (one, two):
            assert client.execute("SHOW search_path").fetchone() == ('"$user", public',)
    finding = the_one(doctor(dsn=dsn, DURABLE_POOLER="1"), "listen_dsn")
    assert "nothing can LISTEN" in finding["cause"]
    assert doctor(dsn=dsn, DURABLE_POOLER="1", DURABLE_NOTIFY="0") == []
    assert doctor(dsn=dsn, DURABLE_POOLER="1", DURABLE_LISTEN_DSN=database) == []
    finding = the_one(doctor(dsn=dsn, DURABLE_POOLER="1", DURABLE_LISTEN_DSN=dsn), "listen_dsn")
    assert "where LISTEN does not hold" in finding["cause"]
    finding = the_one(doctor(dsn=dsn, DURABLE_POOLER="1", DURABLE_LISTEN_DSN=NO_SERVER), "listen_dsn")
    assert "can't be reached" in finding["cause"]
    assert "sesame" not in str(finding)


def test_a_pooler_in_session_mode_is_told_from_one_in_transaction_mode(
    doctor: Doctor, pgbouncer: Callable[..., PgBouncer], database: str
) -> None:
    finding = the_one(doctor(dsn=pgbouncer(database, "session").dsn), "pooler")
    assert finding["severity"] == "warning"
    assert "session mode" in finding["cause"]


def test_the_setting_pooler_without_a_pooler_is_named(doctor: Doctor) -> None:
    assert "leads to the server itself" in the_one(doctor(DURABLE_POOLER="1"), "pooler")["cause"]


# By a role that sees less


def test_a_role_without_pg_monitor_is_told_that_it_sees_less(
    durable: Callable[..., Ran], rows: Rows, database: str, schema: str
) -> None:
    rows.fetch("CREATE ROLE looker LOGIN")
    try:
        rows.fetch("GRANT USAGE ON SCHEMA {schema} TO looker")
        rows.fetch("GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO looker")
        dsn = make_conninfo(database, user="looker")
        ran = durable("doctor", "--dsn", dsn, "--schema", schema)
        assert (ran.code, ran.out) == (0, "healthy: nothing is wrong\n")
        assert "sees only its own sessions" in ran.err
    finally:
        rows.fetch("DROP OWNED BY looker")
        rows.fetch("DROP ROLE looker")
