"""What a producer is told when its write has committed and the notification after it fails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from durable import Durable

NOTIFY = "EXECUTE ON FUNCTION pg_catalog.pg_notify(text, text)"


@pytest.fixture
def silenced(app: Durable, database: str, connection: psycopg.Connection[Any]) -> Iterator[Durable]:
    """An app whose role may write and not notify."""
    role = f"silent_{os.urandom(4).hex()}"
    connection.execute(f"CREATE ROLE {role} LOGIN")
    connection.execute(f"GRANT USAGE ON SCHEMA {app.schema} TO {role}")
    for kind in ("TABLES", "SEQUENCES", "FUNCTIONS"):
        connection.execute(f"GRANT ALL ON ALL {kind} IN SCHEMA {app.schema} TO {role}")
    connection.execute(f"REVOKE {NOTIFY} FROM PUBLIC")
    theirs = Durable("silent", dsn=make_conninfo(database, user=role), schema=app.schema)
    theirs.task(name="task")(lambda: None)
    yield theirs
    theirs.close()
    connection.execute(f"GRANT {NOTIFY} TO PUBLIC")
    connection.execute(f"DROP OWNED BY {role}")
    connection.execute(f"DROP ROLE {role}")


def test_a_write_that_committed_is_acknowledged_though_nobody_could_be_notified(
    silenced: Durable, caplog: pytest.LogCaptureFixture
) -> None:
    assert silenced.insert("task").status == "runnable"
    assert "workers could not be notified after a commit" in caplog.text


def test_the_same_for_coroutines(silenced: Durable, caplog: pytest.LogCaptureFixture) -> None:
    async def produce() -> str:
        status = await (await silenced.ainsert("task")).astatus()
        await silenced.aclose()
        return status

    assert asyncio.run(produce()) == "runnable"
    assert "workers could not be notified after a commit" in caplog.text
