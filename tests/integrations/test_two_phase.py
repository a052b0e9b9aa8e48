"""Two-phase commit of a caller's transaction, and a server whose queue of notifications is full."""

from __future__ import annotations

import asyncio
import logging
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from durable import Context, Durable, Machine, Task, step, wakeups
from durable.errors import ConnectionUsageError, ResultTimeout
from durable.wakeups import queue_channel
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.integrations.conftest import Ear
from tests.machines.driver import Driver
from tests.surroundings.server import OwnServer


@pytest.fixture(scope="module")
def own() -> Iterator[OwnServer]:
    """A server that prepares transactions and has the shortest queue of notifications that there is, half a MiB."""
    server = OwnServer(max_prepared_transactions=4, max_notify_queue_pages=64)
    server.prepare()
    yield server
    server.close()


@pytest.fixture
def app(own: OwnServer, schema: str) -> Iterator[Durable]:
    """An app on that server, on a schema that it drops."""
    app = Durable("test", dsn=own.dsn, schema=schema)
    app.migrate()
    yield app
    app.close()
    own.run(f'DROP SCHEMA "{schema}" CASCADE')


@pytest.fixture
def schema() -> str:
    """No schema of the shared server: `app` makes and drops it on its own."""
    return f"t_{time.monotonic_ns()}"


@pytest.fixture
def task(app: Durable) -> Task[..., Any]:
    return app.task(name="task")(lambda: None)


@pytest.fixture
def ear(own: OwnServer, schema: str) -> Iterator[Ear]:
    ear = Ear(own.dsn, schema)
    yield ear
    ear.connection.close()


def test_a_prepared_transaction_commits(app: Durable, task: Task[..., Any], own: OwnServer, ear: Ear) -> None:
    with psycopg.connect(own.dsn) as connection:
        connection.tpc_begin("gtrid")
        result = task.apply_async(connection=connection)
        app.insert_many([(task, {}), (task, {"schedule_in": 60})], connection=connection)
        app.signal(result.id, "go", connection=connection)
        connection.tpc_prepare()
        with pytest.raises(ConnectionUsageError, match="in a prepared transaction"):
            task.apply_async(connection=connection)
        assert result.status == "not_found"
        connection.tpc_commit()
    assert (result.status, ear.heard()) == ("runnable", [])
    with psycopg.connect(own.dsn) as connection:
        task.apply_async(connection=connection)
    assert ear.heard() == ["*"], "the next transaction of a connection notifies"


def test_a_prepared_transaction_rolls_back(task: Task[..., Any], own: OwnServer) -> None:
    with psycopg.connect(own.dsn) as connection:
        connection.tpc_begin("gtrid")
        result = task.apply_async(connection=connection)
        connection.tpc_prepare()
        connection.tpc_rollback()
    assert result.status == "not_found"


async def _in_coroutines(app: Durable, task: Task[..., Any], dsn: str) -> list[Any]:
    results = []
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        await connection.tpc_begin("gtrid")
        results.append(await task.aapply_async(connection=connection))
        await connection.tpc_prepare()
        await connection.tpc_commit()
    engine = create_async_engine("postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(dsn))
    async with AsyncSession(engine, twophase=True) as session:
        results.append(await task.aapply_async(connection=session))
        await session.commit()
    await engine.dispose()
    await app.aclose()
    return results


def test_coroutines_prepare_too(app: Durable, task: Task[..., Any], own: OwnServer) -> None:
    results = asyncio.run(_in_coroutines(app, task, own.dsn))
    assert [result.status for result in results] == ["runnable"] * 2


@pytest.mark.parametrize("how", ["connection", "session", "bound session", "savepoint"])
def test_sqlalchemys_two_phases_commit(task: Task[..., Any], own: OwnServer, ear: Ear, how: str) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(own.dsn))
    if how == "session":
        with Session(engine, twophase=True) as session:
            result = task.apply_async(connection=session)
            session.prepare()
            session.commit()
    else:
        with engine.connect() as connection:
            transaction = connection.begin_twophase()
            if how == "savepoint":
                with connection.begin_nested():
                    result = task.apply_async(connection=connection)
            else:
                given: Any = Session(bind=connection) if how == "bound session" else connection
                result = task.apply_async(connection=given)
            transaction.prepare()
            transaction.commit()
    engine.dispose()
    assert result.status == "runnable"
    assert ear.heard() == (["default:1:0"] if how == "session" else [])


@pytest.fixture
def full(own: OwnServer, app: Durable, schema: str) -> Iterator[Callable[[], None]]:
    """Fill the queue: a listener that stays in a transaction reads nothing of it."""
    if not own.run("SELECT 1 FROM pg_settings WHERE name = 'max_notify_queue_pages'"):
        pytest.skip("a queue of 8 GB, before Postgres 17, is not filled here")
    listener = psycopg.connect(own.admin)
    channel = sql.Identifier(queue_channel(schema))
    listener.execute(sql.SQL("LISTEN {}").format(channel))
    listener.commit()
    listener.execute("SELECT 1")

    def fill() -> None:
        with psycopg.connect(own.admin, autocommit=True) as connection:
            for length in (7000, 0):
                with suppress(psycopg.errors.ProgramLimitExceeded):
                    while True:
                        connection.execute("SELECT pg_notify('other', repeat('x', %s))", [length])

    yield fill
    listener.close()
    # Asking for its usage is what forgets entries that nobody has yet to read.
    wait_until(lambda: own.run("SELECT pg_notification_queue_usage()")[0][0] < 0.5, what="an empty queue")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_survives_a_full_notify_queue(
    app: Durable, full: Callable[[], None], is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    task = app.task(name="task", queue="other")(lambda: None)
    if is_async:

        @app.task(name="enqueue", bind=True)
        async def enqueue(ctx: Context) -> Any:
            return (await task.aapply_async(connection=ctx.connection)).id

    else:

        @app.task(name="enqueue", bind=True)  # type: ignore[no-redef]
        def enqueue(ctx: Context) -> Any:
            return task.apply_async(connection=ctx.connection).id

    driver = Driver(app)
    result = enqueue.delay()
    full()
    with caplog.at_level(logging.WARNING):
        assert driver.step().flushed is not None
    driver.close()
    assert (result.status, result.attempts) == ("done", 1)
    assert app.result(result.get(timeout=5)).status == "runnable"
    assert any("could not be notified" in record.getMessage() for record in caplog.records)


def test_a_full_queue_undoes_no_insert(
    app: Durable,
    full: Callable[[], None],
    own: OwnServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wakeups, "INTERVAL", 60.0)
    monkeypatch.setattr(wakeups, "QUICKLY", 0)  # so that the second one is saved
    task = app.task(name="task")(lambda: None)
    full()
    assert task.delay().status == "runnable"
    with pytest.raises(ResultTimeout):
        task.delay().get(timeout=0.3)  # a wait sends the notification that was saved
    logged = [record.getMessage() for record in caplog.records]
    assert any("could not be notified, their next poll finds" in text for text in logged)
    assert not any("results can't be read" in text for text in logged)
    with psycopg.connect(own.dsn) as connection:
        result = task.apply_async(connection=connection, notify_in_transaction=False)
    assert result.status == "runnable"


WORK = """
    from durable import Await, Done, Machine, Next, ScheduleChildren, step

    @app.task(name="one_at_a_time")
    def one_at_a_time(): return "ran"

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def start(self, ctx): return Next(self.wait, delay=0.2)
        @step
        def wait(self, ctx): return Await("never", then=self.split, timeout=0.2)
        @step
        def split(self, ctx): return ScheduleChildren([one_at_a_time] * 3, then=self.end)
        @step
        def end(self, ctx): return Done([child.result for child in ctx.children])
"""


def test_workers_go_on_with_a_full_queue(
    app: Durable, full: Callable[[], None], tmp_path: Path, durable_worker: Callable[..., Command]
) -> None:
    head = f"from durable import Durable\napp = Durable('test', dsn={app.dsn()!r}, schema={app.schema!r})\n"
    (tmp_path / "tasks.py").write_text(head + textwrap.dedent(WORK))
    task = app.task(name="one_at_a_time")(lambda: None)

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> None: ...

    full()
    worker = durable_worker("worker", "-c", "2", "-B")
    limited = [task.apply_async(concurrency_key="k") for _ in range(10)]
    machine = app.insert("parent")
    assert [result.get(timeout=30) for result in limited] == ["ran"] * 10
    assert machine.get(timeout=30) == ["ran"] * 3
    assert {result.attempts for result in limited} == {1}
    assert "notifications are not sent" in worker.output()
    assert "a statement failed" not in worker.output()


def test_a_step_notifies_after_its_commit(app: Durable, ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "QUICKLY", 0)  # so that the second one is saved
    task = app.task(name="task", queue="other")(lambda: None)

    @app.task(name="enqueue", bind=True)
    def enqueue(ctx: Context) -> None:
        task.apply_async(connection=ctx.connection)
        task.apply_async(connection=ctx.connection)
        with ctx.connection.transaction() as savepoint:
            task.apply_async(connection=ctx.connection)
            raise psycopg.Rollback(savepoint)

    driver = Driver(app)
    enqueue.delay()
    ear.heard()
    driver.step()
    assert ear.heard() == ["other:1:0"]
    driver.close()
