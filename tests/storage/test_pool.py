"""A producer process holds no more connections than it has used at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from durable import Durable
from durable.storage import migrations


@pytest.fixture
def quiet(database: str, app: Durable) -> Iterator[Durable]:
    """Another app on the migrated schema of `app`, with a name of its own, that has not connected yet."""
    quiet = Durable(f"quiet_{uuid4().hex[:8]}", dsn=database, schema=app.schema, pool_size=3)
    yield quiet
    quiet.close()


def backends(connection: psycopg.Connection[Any], app: Durable) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    (found,) = connection.execute(query, [f"durable {app.name}"]).fetchone() or (0,)
    return int(found)


def test_who_sends_one_task_after_the_other_has_one_connection(
    quiet: Durable, connection: psycopg.Connection[Any]
) -> None:
    task = quiet.task(name="noop")(lambda: None)
    assert backends(connection, quiet) == 0
    pids = set()
    for _ in range(20):
        task.delay()
        with quiet._pool.connection() as own:
            pids.add(own.info.backend_pid)
    assert len(pids) == 1
    assert backends(connection, quiet) == 1


def test_who_needs_several_at_once_has_so_many(quiet: Durable, connection: psycopg.Connection[Any]) -> None:
    with ExitStack() as lent:
        pids = {lent.enter_context(quiet._pool.connection()).info.backend_pid for _ in range(3)}
        assert len(pids) == 3
    assert backends(connection, quiet) == 3


def test_a_schema_that_could_not_be_made_is_made_at_the_next_call(
    database: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Durable("embedded", dsn=database, schema=schema)
    monkeypatch.setattr(type(app.database), "embedded", True)

    def fails(*_: object) -> None:
        raise psycopg.OperationalError("the server is starting up")

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "migrate", fails)
        with pytest.raises(psycopg.OperationalError):
            app.dsn()
    assert not app.embedded_schema_made
    with psycopg.connect(app.dsn()) as connection:
        assert connection.execute(f"SELECT count(*) FROM {schema}.instances").fetchone() == (0,)
