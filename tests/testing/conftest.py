"""A migrated schema per process, emptied after each test."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from durable.sql import Statements
from durable.storage import migrations, testing
from durable.storage.session import run
from tests.machines.driver import view  # noqa: F401


@pytest.fixture(scope="session")
def testing_schema(database: str) -> str:
    """A migrated schema; dropped with its database."""
    with psycopg.connect(database, autocommit=True) as connection:
        migrations.migrate(connection, "t_testing")
    return "t_testing"


@pytest.fixture
def schema(database: str, testing_schema: str) -> Iterator[str]:
    """The schema of this folder's tests, emptied afterwards."""
    yield testing_schema
    with psycopg.connect(database, autocommit=True, options="-c lock_timeout=10s") as connection:
        run(connection, Statements(testing_schema), testing.wipe())
