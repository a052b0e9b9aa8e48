"""Calls from where, on what and of which kind they should not come: what they get (18, 41, 42, 43)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from durable import Await, Context, Done, Durable, Machine, ScheduleChildren, step
from durable.errors import ConnectionUsageError, DatabaseUnavailableError
from durable.task import Task
from tests.fix_rows import Rows, schema, shared_schema
from tests.machines.driver import Driver, driver, drivers

__all__ = ["driver", "drivers", "schema", "shared_schema"]


@pytest.fixture
def task(app: Durable) -> Task[..., Any]:
    return app.task(name="task")(lambda: None)


def test_a_child_that_wants_its_parents_own_key_is_dropped_and_nobody_waits_for_it(
    app: Durable, driver: Driver, rows: Rows
) -> None:
    @app.machine(name="ouroboros")
    class Ouroboros(Machine):
        @step(initial=True)
        def bite(self, ctx: Context) -> Any:
            return ScheduleChildren([(Ouroboros, {"correlation_key": "tail"})], then=self.swallow)

        @step
        def swallow(self, ctx: Context) -> Any:
            return Done(len(ctx.children))

    ring = app.insert("ouroboros", correlation_key="tail")
    driver.drain()
    assert ring.result == 0
    assert rows.fetch("SELECT count(*) AS count FROM {schema}.instance_view") == [{"count": 1}]


def from_a_thread(app: Durable, task: Task[..., Any]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({future.result().id for future in [pool.submit(task.delay) for _ in range(8)]}) == 8


def from_loops_of_many_threads(app: Durable, task: Task[..., Any]) -> None:
    async def main() -> int:
        made = await task.adelay()
        await app.aclose()
        return int(made.id)

    with ThreadPoolExecutor(4) as pool:
        assert len({future.result() for future in [pool.submit(asyncio.run, main()) for _ in range(4)]}) == 4


def from_a_loop_without_await(app: Durable, task: Task[..., Any]) -> None:
    async def main() -> int:
        return int(task.delay().id)

    assert asyncio.run(main())


def after_close(app: Durable, task: Task[..., Any]) -> None:
    app.close()
    assert task.delay().id


def from_a_forked_child(app: Durable, task: Task[..., Any]) -> None:
    task.delay()
    pid = os.fork()
    if pid == 0:
        try:
            task.delay()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    task.delay()


PLACES: dict[str, tuple[Callable[[Durable, Task[..., Any]], None], int]] = {
    "threads": (from_a_thread, 8),
    "loops": (from_loops_of_many_threads, 4),
    "a loop, sync": (from_a_loop_without_await, 1),
    "after close": (after_close, 1),
    "a forked child": (from_a_forked_child, 3),
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("place", PLACES)
def test_an_app_is_usable_from(app: Durable, task: Task[..., Any], rows: Rows, place: str) -> None:
    call, made = PLACES[place]
    call(app, task)
    assert rows.fetch("SELECT count(*) AS count FROM {schema}.instances") == [{"count": made}]


COROUTINES: dict[str, Callable[[Durable, Task[..., Any]], Any]] = {
    "adelay": lambda app, task: task.adelay(),
    "aapply_async": lambda app, task: task.aapply_async(),
    "ainsert": lambda app, task: app.ainsert(task),
    "ainsert_many": lambda app, task: app.ainsert_many([(task, {})]),
    "asignal": lambda app, task: app.asignal(1, "x"),
    "acancel": lambda app, task: app.acancel(1),
    "aretry": lambda app, task: app.aretry(1),
    "aget": lambda app, task: app.result(1).aget(),
}


@pytest.mark.parametrize("name", COROUTINES)
def test_a_coroutine_that_is_not_awaited_does_nothing_and_python_names_it(
    app: Durable, task: Task[..., Any], rows: Rows, name: str
) -> None:
    with pytest.warns(RuntimeWarning, match=f"{name}' was never awaited"):
        COROUTINES[name](app, task)
    assert rows.fetch("SELECT FROM {schema}.instances") == []


def closed(connection: psycopg.Connection[Any]) -> None:
    connection.close()


def failed(connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute("SELECT * FROM nothing")


def read_only(connection: psycopg.Connection[Any]) -> None:
    connection.execute("SET TRANSACTION READ ONLY")


def standby(connection: psycopg.Connection[Any]) -> None:
    connection.execute("SET default_transaction_read_only = on")
    connection.commit()


def cut(connection: psycopg.Connection[Any]) -> None:
    with psycopg.connect(connection.info.dsn, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])


STATES: list[tuple[Callable[[psycopg.Connection[Any]], None], type[Exception], str]] = [
    (closed, ConnectionUsageError, "connection= is closed"),
    (failed, ConnectionUsageError, "connection= is in a failed transaction; roll it back first"),
    (read_only, DatabaseUnavailableError, "read-only"),
    (standby, DatabaseUnavailableError, r"read-only \(a standby\?\): .*; point the DSN at the primary"),
    (cut, DatabaseUnavailableError, "the server ended the session: terminating connection"),
]
WRITES: dict[str, Callable[[Durable, Task[..., Any], Any], Any]] = {
    "delay": lambda app, task, connection: task.apply_async(connection=connection),
    "insert_many": lambda app, task, connection: app.insert_many([(task, {})] * 3, connection=connection),
    "batch": lambda app, task, connection: _batch(app, task, connection),
    "signal": lambda app, task, connection: app.signal("sleeper", "paid", connection=connection),
    "signal_many": lambda app, task, connection: app.signal_many(
        [{"target": "sleeper", "name": "paid"}], connection=connection
    ),
}


def _batch(app: Durable, task: Task[..., Any], connection: Any) -> None:
    with app.batch(connection=connection):
        task.delay()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("state", "error", "says"), STATES, ids=[state.__name__ for state, _, _ in STATES])
def test_a_callers_connection_that_cannot_be_used_is_named_by_its_state(
    app: Durable,
    task: Task[..., Any],
    rows: Rows,
    database: str,
    write: str,
    state: Callable[[psycopg.Connection[Any]], None],
    error: type[Exception],
    says: str,
) -> None:
    @app.machine(name="sleeper")
    class Sleeper(Machine):
        @step(initial=True)
        def sleep(self, ctx: Context) -> Any:
            return Await(["paid"], then=self.sleep)

    app.insert("sleeper", correlation_key="sleeper")
    theirs = psycopg.connect(database)
    try:
        state(theirs)
        with pytest.raises(error, match=says):
            WRITES[write](app, task, theirs)
    finally:
        theirs.close()
    assert rows.fetch("SELECT count(*) AS count FROM {schema}.instances") == [{"count": 1}]
    assert rows.fetch("SELECT FROM {schema}.signals") == []
