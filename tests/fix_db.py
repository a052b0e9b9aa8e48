"""A real Postgres for the tests: DURABLE_TEST_DSN, or our own embedded server in a home of its own.

DURABLE_TEST_PG=system takes the distribution's server instead of the wheel's. All xdist workers share the server; each
has a database, each test a schema. fsync is off here and only here: nothing these tests kill is the machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from durable.embedded import Server

FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "on",
    "deadlock_timeout": "200ms",
    "autovacuum": "off",  # its transactions would be counted among an idle worker's
}


def wait_until(condition: Callable[[], object], seconds: float = 20.0, what: str = "the condition") -> object:
    """Wait for a condition and return its value; fail loudly when it does not come."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            pytest.fail(f"{what} did not come true within {seconds:g} s")
        time.sleep(0.01)
    return value


def _system_bindir() -> Path | None:
    if os.environ.get("DURABLE_TEST_PG") != "system":
        return None
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.fail("DURABLE_TEST_PG=system, but there is no /usr/lib/postgresql/*/bin/postgres")
    return found[-1].parent


@pytest.fixture(scope="session")
def server_dsn(testrun_uid: str) -> Iterator[str]:
    """DSN of the server's maintenance database."""
    given = os.environ.get("DURABLE_TEST_DSN")
    if given:
        yield given
        return
    home = Path(tempfile.gettempdir()) / f"durable-tests-{testrun_uid[:12]}"
    home.mkdir(exist_ok=True)
    home.chmod(0o755)
    server = Server(home, bindir=_system_bindir(), settings=FAST)
    dsn = server.ensure()
    yield dsn
    # The last one to leave stops it: the keeper would, ten seconds later, but then its files stay.
    server.release()
    if not server.status().holders:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def database(server_dsn: str, worker_id: str) -> Iterator[str]:
    """DSN of this test process's own database."""
    name = f"test_{worker_id}_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield psycopg.conninfo.make_conninfo(server_dsn, dbname=name)
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def schema(database: str) -> Iterator[str]:
    """The name of a schema nobody else uses."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    yield name
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A plain autocommit connection, to look at rows with."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection
