"""`migrate`, and what every command says of a database that is not as it must be."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from durable.storage import migrations
from tests.cli.conftest import NO_SERVER, Ran


@pytest.fixture
def at(database: str, schema: str) -> tuple[str, ...]:
    """Options for this test's database and schema."""
    return ("--dsn", database, "--schema", schema)


def test_migrate_makes_the_schema_and_says_so_once(durable: Callable[..., Ran], at: tuple[str, ...]) -> None:
    names = [f"{migration.id:04}_{migration.name}" for migration in migrations.known()]
    assert durable("migrate", "--status", *at).code == 1
    before = durable("migrate", "--status", "--json", *at)
    assert before.code == 1
    assert before.json["pending"] == len(names)
    first = durable("migrate", "--json", *at)
    assert first.code == 0
    assert first.json["applied"] == names
    again = durable("migrate", *at)
    assert again.code == 0
    assert "is up to date" in again.out
    after = durable("migrate", "--status", "--json", *at)
    assert after.code == 0
    assert [row["state"] for row in after.json["migrations"]] == ["applied"] * len(names)


def test_the_printed_sql_makes_the_same_schema_without_connecting(
    durable: Callable[..., Ran], at: tuple[str, ...], schema: str, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    ran = durable("migrate", "--sql", "--dsn", NO_SERVER, "--schema", schema)
    assert ran.code == 0
    connection.execute(ran.out.encode())
    assert durable("migrate", "--status", *at).code == 0
    assert durable("migrate", "--sql", "--json", "--dsn", NO_SERVER, "--schema", schema).json["sql"] + "\n" == ran.out


def test_rivals_migrate_at_once(process: Callable[..., Ran], at: tuple[str, ...]) -> None:
    with ThreadPoolExecutor(3) as threads:
        ran = list(threads.map(lambda _: process("migrate", "--json", *at), range(3)))
    assert [one.code for one in ran] == [0, 0, 0], [one.err for one in ran]
    assert sorted(len(one.json["applied"]) for one in ran) == [0, 0, len(migrations.known())]


READERS = ["list", "status", "queues", "workers", "purge", "result 1", "show 1", "cancel 1", "retry 1"]


@pytest.mark.parametrize("command", READERS)
def test_a_missing_schema_ends_with_3_and_is_not_made(
    durable: Callable[..., Ran], at: tuple[str, ...], command: str, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    ran = durable(*command.split(), *at)
    assert ran.code == 3
    assert "run `durable migrate`" in ran.error
    row = connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (at[3],)).fetchone()
    assert row == (0,)


@pytest.mark.parametrize("command", [*READERS, "migrate", "migrate --status"])
def test_an_unreachable_database_ends_with_3_at_once(durable: Callable[..., Ran], here: Path, command: str) -> None:
    ran = durable(*command.split(), "--dsn", NO_SERVER)
    assert ran.code == 3
    assert "the database can't be reached" in ran.error
    assert "sesame" not in ran.err


def test_different_causes_read_differently(durable: Callable[..., Ran], database: str, here: Path) -> None:
    wrong = {
        "Connection refused": NO_SERVER,
        "does not exist": psycopg.conninfo.make_conninfo(database, dbname="no_such_database"),
        "resolve host": "postgresql://somebody@no-such-host.invalid/x",
    }
    for said, dsn in wrong.items():
        ran = durable("list", "--dsn", dsn)
        assert ran.code == 3
        assert said in ran.error


def test_a_schema_of_newer_code_that_breaks_this_one_is_refused(
    durable: Callable[..., Ran], at: tuple[str, ...], schema: str, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    durable("migrate", *at)
    connection.execute(
        f"INSERT INTO {schema}.migrations (id, name, checksum, breaking) VALUES (9999, 'later', 'x', true)"
    )
    ran = durable("list", *at)
    assert ran.code == 3
    assert "this code is older than schema" in ran.error
    shown = durable("migrate", "--status", "--json", *at)
    assert shown.json["migrations"][-1]["state"] == "applied by newer code"


def test_other_text_under_an_applied_number_is_an_error(
    durable: Callable[..., Ran], at: tuple[str, ...], schema: str, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    durable("migrate", *at)
    connection.execute(f"UPDATE {schema}.migrations SET checksum = 'x' WHERE id = 1")
    for command in ("migrate", "list", "doctor --fix --yes"):
        ran = durable(*command.split(), *at)
        assert ran.code == 3
        assert "another text" in ran.error
