"""Identifiers are quoted whatever they hold, and a hostile search_path changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from durable import Durable
from durable.errors import ValidationError
from durable.limits import RateLimit
from durable.storage import grants, inspection, limits, migrations, partitions
from tests.fix_rows import Rows, done

WEIRD = 'weird "Schema"'
EVIL = """
CREATE SCHEMA {evil};
CREATE FUNCTION {evil}.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS 'BEGIN RAISE ''hijacked''; END';
CREATE FUNCTION {evil}.now() RETURNS timestamptz LANGUAGE plpgsql AS 'BEGIN RAISE ''hijacked''; END';
CREATE FUNCTION {evil}.int8eq(bigint, bigint) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE ''hijacked''; END';
CREATE OPERATOR {evil}.= (leftarg = bigint, rightarg = bigint, function = {evil}.int8eq);
CREATE FUNCTION {evil}.unnest(text[]) RETURNS SETOF text LANGUAGE plpgsql AS 'BEGIN RAISE ''hijacked''; END';
CREATE FUNCTION {evil}.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS 'BEGIN RAISE ''hijacked''; END';
CREATE TABLE {evil}.instances (id int);
CREATE TABLE {evil}.history (id int);
"""


@pytest.fixture
def weird(database: str) -> Iterator[str]:
    with psycopg.connect(database, autocommit=True) as connection:
        migrations.migrate(connection, WEIRD)
    yield WEIRD
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(WEIRD)))


def test_an_app_refuses_a_schema_that_needs_quoting_and_storage_quotes_it_all_the_same(
    database: str, weird: str
) -> None:
    with pytest.raises(ValidationError, match="schema must be"):
        Durable("x", dsn=database, schema=weird)
    rows = Rows(database, weird)
    try:
        worker = rows.worker()
        (claimed,) = rows.claimed(worker)
        assert rows.flush(worker, done(claimed)) == {claimed.id}
        assert rows.status(claimed.id) == "done"
        assert [row.id for row in rows.run(inspection.listing(None, None, None, None))] == [claimed.id]
        rows.atomically(limits.put({("rate", "r"): RateLimit(5)}))
        rows.insert(2, rate_limit="r")
        assert len(rows.claim_limited(worker).rows) == 1
        rows.run(inspection.history_end())
        assert partitions.drop_before(rows.connection, rows.sql, 0) != []
        assert migrations.check(rows.connection, weird) is None
        grants.grant(rows.connection, weird, [("admin", "durable")])
    finally:
        rows.close()


@pytest.fixture
def hostile(database: str, schema: str) -> Iterator[str]:
    """A DSN whose sessions find another schema's functions, operators and tables before Postgres' own."""
    evil = f"{schema}_evil"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(EVIL.format(evil=evil).encode())
        yield make_conninfo(database, options=f"-c search_path={evil},pg_catalog")
        connection.execute(f"DROP SCHEMA {evil} CASCADE".encode())


def test_a_hostile_search_path_hijacks_nothing(
    hostile: str, schema: str, tmp_path: Path, durable_worker: Callable[..., Any]
) -> None:
    with psycopg.connect(hostile) as connection, pytest.raises(psycopg.errors.RaiseException, match="hijacked"):
        connection.execute("SELECT clock_timestamp()")
    app = Durable("test", dsn=hostile, schema=schema)
    try:
        app.migrate()
        add = app.task(name="add")(lambda_free_add)
        (tmp_path / "tasks.py").write_text(
            f"from durable import Durable\napp = Durable('test', dsn={hostile!r}, schema={schema!r})\n"
            "@app.task(name='add')\ndef add(a, b=1):\n    return a + b\n"
        )
        command = durable_worker("worker", "-B")
        results = [add.delay(2), add.apply_async((2,), countdown=0.2)]
        assert [result.get(timeout=20) for result in results] == [3, 3]
        assert app.cancel(add.apply_async((1,), countdown=100).id)
        assert command.stop() == 0
        assert "hijacked" not in command.output()
    finally:
        app.close()


def lambda_free_add(a: int, b: int = 1) -> int:
    return a + b
