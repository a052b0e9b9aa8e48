"""Creating and upgrading the schema: once whoever asks, by hand as well, and never on what does not fit."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql

from durable import Durable
from durable.errors import SchemaError
from durable.sql import Statements
from durable.storage import migrations, partitions
from tests import fix_db

Connection = psycopg.Connection[Any]
schema = fix_db.schema  # one of its own for each test, since these change it


@pytest.fixture
def connect(database: str) -> Iterator[Callable[[], Connection]]:
    opened: list[Connection] = []

    def open_one() -> Connection:
        opened.append(psycopg.connect(database, autocommit=True))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


def structure(connection: Connection, schema: str) -> list[tuple[Any, ...]]:
    """Every column, constraint, index, view and comment of a schema, without its name and without partitions."""
    rows = connection.execute(
        """
        SELECT 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum)
        FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = %(schema)s::text::regnamespace AND c.relkind IN ('r', 'p', 'v') AND NOT c.relispartition
        UNION ALL
        SELECT 'constraint', c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated, NULL, NULL
        FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid
        WHERE c.relnamespace = %(schema)s::text::regnamespace AND NOT c.relispartition
        UNION ALL
        SELECT 'index', tablename, indexname, indexdef, NULL, NULL, NULL
        FROM pg_indexes WHERE schemaname = %(schema)s AND indexname NOT LIKE 'history\\_2%%'
        UNION ALL
        SELECT 'view', viewname, NULL, definition, NULL, NULL, NULL FROM pg_views WHERE schemaname = %(schema)s
        UNION ALL
        SELECT 'migration', id::text, name, checksum, breaking, NULL, NULL FROM {}.migrations
        ORDER BY 1, 2, 3
        """.replace("{}", schema),
        {"schema": schema},
    ).fetchall()
    return [tuple(str(value).replace(schema, "SCHEMA") for value in row) for row in rows]


def test_migrating_twice_applies_once(connect: Callable[[], Connection], schema: str) -> None:
    connection = connect()
    first = migrations.migrate(connection, schema)
    assert [migration.id for migration in first] == [migration.id for migration in migrations.known()]
    before = structure(connection, schema)
    assert migrations.migrate(connection, schema) == []
    assert structure(connection, schema) == before
    assert len(before) > 80


def test_an_app_migrates_its_own_schema(app: Durable) -> None:
    assert app.migrate() == []


def test_eight_at_once_apply_once_and_all_succeed(connect: Callable[[], Connection], schema: str) -> None:
    start = threading.Barrier(8)

    def migrate(connection: Connection) -> int:
        start.wait()
        return len(migrations.migrate(connection, schema))

    with ThreadPoolExecutor(8) as pool:
        applied = list(pool.map(migrate, [connect() for _ in range(8)]))
    assert sorted(applied) == [0] * 7 + [len(migrations.known())]
    names = connect().execute(f"SELECT count(*) FROM {schema}.migrations").fetchone()
    assert names == (len(migrations.known()),)


def test_pending_shows_what_is_missing_before_and_nothing_after(connect: Callable[[], Connection], schema: str) -> None:
    connection = connect()
    assert migrations.applied(connection, schema) == {}
    assert migrations.pending(connection, schema) == list(migrations.known())
    migrations.migrate(connection, schema)
    assert migrations.pending(connection, schema) == []
    assert set(migrations.applied(connection, schema)) == {migration.id for migration in migrations.known()}
    assert migrations.check(connection, schema) is None


def test_the_script_applied_by_hand_makes_the_same_schema(connect: Callable[[], Connection], schema: str) -> None:
    connection = connect()
    migrations.migrate(connection, schema)
    by_hand = f"h_{uuid.uuid4().hex[:10]}"
    connection.execute(migrations.script(by_hand).encode())
    try:
        assert structure(connection, by_hand) == structure(connection, schema)
        assert migrations.migrate(connection, by_hand) == []
        assert migrations.check(connection, by_hand) is None
        assert partitions.ensure(connection, Statements(by_hand)) == 0, "migrate made them"
    finally:
        connection.execute(f"DROP SCHEMA {by_hand} CASCADE")


def test_a_migration_that_was_applied_with_another_text_is_refused(
    connect: Callable[[], Connection], schema: str
) -> None:
    connection = connect()
    migrations.migrate(connection, schema)
    connection.execute(f"UPDATE {schema}.migrations SET checksum = 'other' WHERE id = 1")
    with pytest.raises(SchemaError, match=f"migration 1 of schema '{schema}' was applied with another text"):
        migrations.migrate(connection, schema)
    with pytest.raises(SchemaError, match="the code and the database are of different builds"):
        migrations.check(connection, schema)


@pytest.mark.parametrize("breaking", [True, False])
def test_a_newer_schema_stops_this_code_only_when_it_says_so(
    connect: Callable[[], Connection], schema: str, breaking: bool
) -> None:
    connection = connect()
    migrations.migrate(connection, schema)
    connection.execute(
        f"INSERT INTO {schema}.migrations (id, name, checksum, breaking) VALUES (9999, 'future', 'x', {breaking})"
    )
    if breaking:
        with pytest.raises(SchemaError, match=r"this code is older than schema .* \(\d+ < 9999\); upgrade the code"):
            migrations.check(connection, schema)
    else:
        assert "newer than this code (9999 >" in (migrations.check(connection, schema) or "")


def test_a_missing_or_incomplete_schema_names_the_command(connect: Callable[[], Connection], schema: str) -> None:
    connection = connect()
    with pytest.raises(SchemaError, match=r"isn't there; run `durable migrate`|run `durable migrate`"):
        migrations.check(connection, schema)
    migrations.migrate(connection, schema)
    connection.execute(f"DELETE FROM {schema}.migrations")
    with pytest.raises(SchemaError, match="run `durable migrate`"):
        migrations.check(connection, schema)


def test_an_app_without_its_schema_says_so(database: str, schema: str) -> None:
    app = Durable("test", dsn=database, schema=schema)
    try:
        with pytest.raises(SchemaError, match=f"schema '{schema}'.*run `durable migrate`"):
            app.task(name="t")(lambda: None).delay()
        with pytest.raises(SchemaError, match="durable migrate"):
            app.result(1).status
    finally:
        app.close()


def test_a_failing_migration_leaves_nothing_behind(
    connect: Callable[[], Connection], schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect()
    bad = migrations.Migration(9998, "bad", "CREATE TABLE {schema}.half (x int); SELECT 1 / 0;", False)
    known = migrations.known()
    monkeypatch.setattr(migrations, "known", lambda: (*known, bad))
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrations.migrate(connection, schema)
    assert connection.execute("SELECT to_regnamespace(%s)", (schema,)).fetchone() == (None,)


def test_several_apps_share_a_database_by_schema(
    app: Durable, database: str, connect: Callable[[], Connection]
) -> None:
    name = f"h_{uuid.uuid4().hex[:10]}"
    other = Durable("other", dsn=database, schema=name)
    try:
        assert other.migrate()
        mine = app.task(name="t")(lambda: None).apply_async(correlation_key="k")
        theirs = other.task(name="t")(lambda: None).apply_async(correlation_key="k")
        assert mine.status == theirs.status == "runnable"
        assert app.cancel("k")
        assert (mine.status, theirs.status) == ("cancelled", "runnable")
    finally:
        other.close()
        connect().execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(name)))


def test_file_names_are_numbered_without_gaps() -> None:
    assert [migration.id for migration in migrations.known()] == list(range(1, len(migrations.known()) + 1))
    assert all(migration.text.startswith("-- breaking: ") for migration in migrations.known())
