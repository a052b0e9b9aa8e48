"""A producer process holds no more connections than it has used at once."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from durable import Durable
from durable.errors import DatabaseUnavailableError
from durable.storage import lending, migrations, thread_pool
from tests.fix_db import wait_until


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


def cut(connection: psycopg.Connection[Any], app: Durable) -> None:
    """End every session of an app, as a restart of the server does."""
    query = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s"
    connection.execute(query, [f"durable {app.name}"])


def test_cut_connections_are_replaced_at_once(quiet: Durable, connection: psycopg.Connection[Any]) -> None:
    task = quiet.task(name="noop")(lambda: None)
    with ExitStack() as lent:
        pids = {lent.enter_context(quiet._pool.connection()).info.backend_pid for _ in range(3)}
    cut(connection, quiet)
    began = time.monotonic()
    task.delay()
    assert time.monotonic() - began < 1.0
    with quiet._pool.connection() as own:
        assert own.info.backend_pid not in pids
    assert backends(connection, quiet) == 1


def test_notice_does_not_cost_a_connection(quiet: Durable, connection: psycopg.Connection[Any]) -> None:
    quiet.task(name="noop")(lambda: None)
    pids, readable = set(), select.poll()
    for _ in range(2):
        with quiet._pool.connection() as own:
            pids.add(own.info.backend_pid)
            own.execute("LISTEN for_a_test")
            readable.register(own.fileno(), select.POLLIN)
        connection.execute("NOTIFY for_a_test")
        assert readable.poll(5000)
    assert len(pids) == 1


def test_calls_that_wait_for_a_dead_server_say_so() -> None:
    app = Durable("away", dsn="postgresql://nobody@127.0.0.1:1/none", pool_size=1, connect_timeout=0.5)
    task = app.task(name="task")(lambda: None)
    errors: list[Exception] = []

    def call() -> None:
        try:
            task.delay()
        except DatabaseUnavailableError as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 3
    assert all("can't be reached" in str(error) for error in errors), "only one of them held the pool's connection"
    app.close()


def test_unused_connections_are_closed(
    quiet: Durable, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_pool, "IDLE_SECONDS", 0.3)
    before = set(threading.enumerate())
    quiet.task(name="noop")(lambda: None).delay()
    wait_until(lambda: backends(connection, quiet) == 0, what="the end of an unused connection")
    wait_until(lambda: set(threading.enumerate()) <= before, what="the end of the thread that closed it")
    with quiet._pool.connection():
        assert backends(connection, quiet) == 1


def test_old_connections_are_not_kept(
    quiet: Durable, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet._pool.connection() as own:
        first = own.info.backend_pid
    monkeypatch.setattr(lending, "LIFETIME", 0.0)
    with quiet._pool.connection() as own:
        assert own.info.backend_pid == first
    with quiet._pool.connection() as own:
        assert own.info.backend_pid != first


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
