"""`connection=` that can't be used: said at once, by name, with nothing written; the database away likewise."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from durable import Durable, Task
from durable.errors import ConnectionUsageError, DatabaseUnavailableError, SchemaError
from tests.fix_rows import Rows

Connection = psycopg.Connection[Any]


@pytest.fixture
def task(app: Durable) -> Task[..., Any]:
    return app.task(name="task")(lambda: None)


@pytest.fixture
def theirs(database: str) -> Iterator[Connection]:
    with psycopg.connect(database) as connection:
        yield connection


def refused(app: Durable, task: Task[..., Any], connection: Any, message: str) -> None:
    """Every call that takes a connection refuses this one."""
    with pytest.raises(ConnectionUsageError, match=message):
        task.apply_async(connection=connection)
    with pytest.raises(ConnectionUsageError, match=message):
        app.insert(task, connection=connection)
    with pytest.raises(ConnectionUsageError, match=message):
        app.insert_many([(task, {})], connection=connection)
    with pytest.raises(ConnectionUsageError, match=message), app.batch(connection=connection):
        task.delay()


def test_a_closed_connection_is_named(app: Durable, task: Task[..., Any], theirs: Connection, rows: Rows) -> None:
    theirs.close()
    refused(app, task, theirs, "connection= is closed")
    assert rows.fetch("SELECT FROM {schema}.instances") == []


def test_a_failed_transaction_is_named(app: Durable, task: Task[..., Any], theirs: Connection) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        theirs.execute("SELECT 1 / 0")
    refused(app, task, theirs, "connection= is in a failed transaction; roll it back first")
    theirs.rollback()
    assert task.apply_async(connection=theirs).id


@pytest.mark.parametrize("wrong", [5, object(), sqlite3.Connection], ids=lambda wrong: str(type(wrong)))
def test_the_wrong_kind_is_named(app: Durable, task: Task[..., Any], wrong: Any) -> None:
    refused(app, task, wrong, r"connection= must be a psycopg Connection, SQLAlchemy Connection or Session, got \w+")


def test_an_async_connection_in_a_sync_call_and_the_reverse_are_named(
    app: Durable, task: Task[..., Any], theirs: Connection, database: str
) -> None:
    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(database) as connection:
            refused(app, task, connection, "is psycopg's AsyncConnection: await the async twin")
        for call in (
            task.aapply_async(connection=theirs),
            app.ainsert(task, connection=theirs),
            app.ainsert_many([(task, {})], connection=theirs),
        ):
            with pytest.raises(ConnectionUsageError, match="is psycopg's Connection: make the sync call"):
                await call
        with pytest.raises(ConnectionUsageError, match="is closed"):
            await task.aapply_async(connection=connection)

    asyncio.run(main())


def test_a_connection_that_would_change_text_is_refused(
    app: Durable, task: Task[..., Any], database: str, rows: Rows
) -> None:
    with psycopg.connect(database, client_encoding="latin1") as theirs:
        refused(app, task, theirs, "client_encoding iso8859-1; open it with client_encoding='utf8'")
    assert rows.fetch("SELECT FROM {schema}.instances") == []


def test_our_own_connections_speak_utf8_whatever_the_environment_says(
    app: Durable, monkeypatch: pytest.MonkeyPatch, rows: Rows, task: Task[..., Any]
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    app.close()
    app.insert_many([(task, {"correlation_key": "é"})])
    assert rows.fetch("SELECT correlation_key FROM {schema}.instances") == [{"correlation_key": "é"}]


def test_a_connection_to_a_database_without_the_schema_says_what_is_missing(
    task: Task[..., Any], server_dsn: str, schema: str
) -> None:
    with (
        psycopg.connect(server_dsn) as elsewhere,
        pytest.raises(SchemaError, match=f"schema '{schema}'.*run `durable migrate`"),
    ):
        task.apply_async(connection=elsewhere)


def test_a_read_only_session_is_named(task: Task[..., Any], theirs: Connection) -> None:
    theirs.read_only = True
    with pytest.raises(DatabaseUnavailableError, match="read-only"):
        task.apply_async(connection=theirs)


def test_a_database_away_is_one_typed_error_without_the_password() -> None:
    app = Durable("away", dsn="postgresql://user:hunter2@127.0.0.1:1/none", connect_timeout=0.5)
    task = app.task(name="task")(lambda: None)

    async def main() -> None:
        try:
            await task.adelay()
        finally:
            await app.aclose()

    try:
        for call in (task.delay, lambda: asyncio.run(main())):
            with pytest.raises(DatabaseUnavailableError, match=r"can't be reached: .*refused") as caught:
                call()
            assert "hunter2" not in str(caught.value)
    finally:
        app.close()


def test_a_pool_that_is_used_up_says_so_and_names_the_settings(database: str, schema: str) -> None:
    app = Durable("small", dsn=database, schema=schema, pool_size=1, connect_timeout=0.3)
    try:
        with (
            app._pool.connection(),
            pytest.raises(DatabaseUnavailableError, match=r"connect_timeout = 0\.3 s; pool_size = 1"),
        ):
            app.migrate()
    finally:
        app.close()


def test_connections_cut_while_idle_are_replaced_unnoticed(app: Durable, task: Task[..., Any], rows: Rows) -> None:
    task.delay()
    rows.fetch(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'durable test' "
        "AND datname = current_database()"
    )
    for _ in range(5):
        task.delay()


def test_a_closed_app_can_be_used_again(app: Durable, task: Task[..., Any]) -> None:
    task.delay()
    app.close()
    app.close()
    assert task.delay().status == "runnable"


def test_a_callers_commit_waits_for_the_disk(app: Durable, task: Task[..., Any], theirs: Connection) -> None:
    """Our own notifications do not wait for it; those that a transaction carries must not change that of it."""
    task.apply_async(connection=theirs)
    task.apply_async(connection=theirs, countdown=60)
    assert theirs.execute("SHOW synchronous_commit").fetchone() == ("on",)
