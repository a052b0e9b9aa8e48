"""Settings of the server and of our role that hurt: `doctor` names them, `worker` and `beat` say so or refuse."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from durable import Durable
from durable.config import Config
from durable_cli import surroundings
from tests.cli.conftest import Ran
from tests.fix_db import wait_until


@pytest.fixture
def role(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """A role of the test's own, which may do everything."""
    name = f"hurt_{os.urandom(4).hex()}"
    connection.execute(f"CREATE ROLE {name} LOGIN SUPERUSER")
    yield name
    connection.execute(f"DROP ROLE {name}")


@pytest.fixture
def judged(durable: Callable[..., Ran]) -> Callable[[str, str], list[dict[str, str]]]:
    """What `durable doctor` says of settings."""

    def judge(dsn: str, schema: str) -> list[dict[str, str]]:
        found = durable("doctor", "--dsn", dsn, "--schema", schema, "--json").json["findings"]
        return [finding for finding in found if finding["finding"] == "settings"]

    return judge


@pytest.mark.parametrize(
    ("setting", "severity", "cause"),
    [
        ("statement_timeout = '50ms'", "warning", "statement_timeout is 50 ms for this role"),
        ("lock_timeout = '999ms'", "warning", "lock_timeout is 999 ms for this role"),
        ("idle_in_transaction_session_timeout = '50ms'", "warning", "a step with ctx.connection is in a transaction"),
        ("synchronous_commit = off", "warning", "synchronous_commit is off"),
        ("standard_conforming_strings = off", "warning", "standard_conforming_strings is off"),
        ("default_transaction_read_only = on", "error", "nothing can be claimed or committed"),
    ],
    ids=["statement", "lock", "idle", "commit", "strings", "read only"],
)
def test_a_setting_of_the_role_that_hurts_is_named_with_its_value(
    app: Durable,
    judged: Callable[[str, str], list[dict[str, str]]],
    connection: psycopg.Connection[Any],
    database: str,
    role: str,
    setting: str,
    severity: str,
    cause: str,
) -> None:
    dsn = make_conninfo(database, user=role)
    connection.execute(f"ALTER ROLE {role} SET {setting}")
    (finding,) = judged(dsn, app.schema)
    assert finding["severity"] == severity
    assert cause in finding["cause"]
    connection.execute(f"ALTER ROLE {role} RESET ALL")
    connection.execute(f"ALTER ROLE {role} SET statement_timeout = '1s'")
    assert judged(dsn, app.schema) == []


def test_a_database_whose_encoding_lacks_letters_is_named(
    judged: Callable[[str, str], list[dict[str, str]]], connection: psycopg.Connection[Any], database: str
) -> None:
    name = f"narrow_{os.urandom(4).hex()}"
    connection.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C'")
    try:
        dsn = make_conninfo(database, dbname=name)
        app = Durable("narrow", dsn=dsn)
        app.migrate()
        app.close()
        (finding,) = judged(dsn, "durable")
        assert "the database's encoding is LATIN1" in finding["cause"]
    finally:
        connection.execute(f"DROP DATABASE {name}")


def test_a_server_older_than_what_is_supported_is_an_error() -> None:
    settings = {
        "server_version": "14.9",
        "server_version_num": "140009",
        "server_encoding": "UTF8",
        "standard_conforming_strings": "on",
        "default_transaction_read_only": "off",
        "synchronous_commit": "on",
    }
    (finding,) = surroundings.settings(settings, Config())
    assert (finding.severity, finding.cause.partition(",")[0]) == ("error", "the server is PostgreSQL 14.9")
    assert list(surroundings.settings({**settings, "server_version_num": "150000"}, Config())) == []


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_a_role_that_may_not_write_ends_a_command_and_one_with_little_time_is_warned_of(
    process: Callable[..., Ran],
    durable_worker: Callable[..., Any],
    app: Durable,
    tasks_module: Callable[[str], Path],
    connection: psycopg.Connection[Any],
    database: str,
    role: str,
    command: str,
) -> None:
    tasks = tasks_module("") / "tasks.py"
    tasks.write_text(tasks.read_text().replace(repr(database), repr(make_conninfo(database, user=role))))
    connection.execute(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    ran = process(command)
    assert ran.code == 3
    assert "default_transaction_read_only is on for this role or database" in ran.error

    connection.execute(f"ALTER ROLE {role} RESET ALL")
    connection.execute(f"ALTER ROLE {role} SET idle_in_transaction_session_timeout = '500ms'")
    started = durable_worker(command, "--json", "--log-format", "json")
    said = "idle_in_transaction_session_timeout is 500 ms for this role"
    wait_until(lambda: said in started.output(), what="a warning")
    wait_until(lambda: "starts" in started.output() or started.children("durable:default"), what="a start")
    assert started.stop() == 0
