"""SQLAlchemy's AsyncConnection and AsyncSession in the async calls; their wake-ups never hold up a commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.ext.asyncio import create_async_engine as create
from sqlalchemy.orm import Session

from durable import DuplicateError, Durable, Task
from durable.errors import ConnectionUsageError, DatabaseUnavailableError
from tests.fix_rows import Rows
from tests.integrations.conftest import Ear, count

Main = Callable[[AsyncEngine], Awaitable[None]]


@pytest.fixture
def run(database: str) -> Callable[[Main], None]:
    """Run a coroutine function on an engine; notifications have been sent, or have failed, when it returns."""

    def run(main: Main) -> None:
        async def all_of_it() -> None:
            engine = create("postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(database))
            try:
                await main(engine)
            finally:
                await engine.dispose()

        asyncio.run(all_of_it())

    return run


def test_an_async_session_s_commit_makes_it_exist_and_then_notifies(
    app: Durable, task: Task[..., Any], run: Callable[[Main], None], rows: Rows, ear: Ear
) -> None:
    async def main(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await task.aapply_async(connection=session)
            async with app.batch(connection=session):
                await task.adelay()
            assert session.in_transaction()
            assert (count(rows), ear.heard()) == (0, [])
            await session.commit()
            assert count(rows) == 2

    run(main)
    assert ear.heard() == ["default:1:0"]


def test_an_async_session_rolled_back_or_closed_leaves_nothing_and_sends_nothing(
    task: Task[..., Any], run: Callable[[Main], None], rows: Rows, ear: Ear
) -> None:
    async def main(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await task.aapply_async(connection=session)
            await session.rollback()
            await task.aapply_async(connection=session)
        async with AsyncSession(engine) as session, session.begin():
            async with session.begin_nested() as savepoint:
                await task.aapply_async(connection=session)
                await savepoint.rollback()
            await session.execute(text("SELECT 1"))

    run(main)
    assert (count(rows), ear.heard()) == (0, [])


def test_a_scoped_async_session_is_its_session(
    app: Durable, task: Task[..., Any], run: Callable[[Main], None], rows: Rows, ear: Ear
) -> None:
    async def main(engine: AsyncEngine) -> None:
        registry = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        await app.ainsert_many([(task, {})] * 2, connection=registry)
        await registry.commit()
        await registry.remove()

    run(main)
    assert (count(rows), ear.heard()) == (2, ["default:2:0"])


def test_an_async_connection_s_commit_makes_it_exist_and_notifies(
    task: Task[..., Any], run: Callable[[Main], None], rows: Rows, ear: Ear
) -> None:
    async def main(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            result = await task.aapply_async(connection=connection)
            assert connection.in_transaction()
            assert (count(rows), ear.heard()) == (0, [])
            await connection.commit()
            assert (result.status, ear.heard()) == ("runnable", ["*"])
            await task.aapply_async(connection=connection)
            await connection.rollback()
            await task.aapply_async(connection=connection)
        assert (count(rows), ear.heard()) == (1, [])

    run(main)


def test_an_async_autocommit_connection_commits_and_notifies_at_once(
    app: Durable, task: Task[..., Any], run: Callable[[Main], None], rows: Rows, ear: Ear
) -> None:
    async def main(engine: AsyncEngine) -> None:
        async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await app.ainsert_many([(task, {})] * 2, connection=connection)
            assert (count(rows), ear.heard()) == (2, ["default:2:0"])

    run(main)


def test_an_occupied_key_leaves_the_async_transaction_usable(
    task: Task[..., Any], run: Callable[[Main], None], rows: Rows
) -> None:
    async def main(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            first = await task.aapply_async(correlation_key="k", connection=session)
            with pytest.raises(DuplicateError):
                await task.aapply_async(correlation_key="k", connection=session)
            same = await task.aapply_async(correlation_key="k", on_conflict="return", connection=session)
            assert same.id == first.id
            await session.commit()

    run(main)
    assert count(rows) == 1


def test_a_commit_does_not_wait_for_its_notification_whose_failure_is_logged(
    away: Durable, run: Callable[[Main], None], rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    task = away.task(name="task")(lambda: None)

    async def main(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await task.aapply_async(connection=session)
            await session.commit()
            assert "could not be notified" not in caplog.text
            assert (await session.execute(text("SELECT 1"))).scalar() == 1

    with caplog.at_level(logging.ERROR, "durable.writer"):
        run(main)
    assert count(rows) == 1
    assert "workers could not be notified after a commit" in caplog.text


def test_the_other_colour_and_other_drivers_are_named(
    app: Durable, task: Task[..., Any], run: Callable[[Main], None]
) -> None:
    async def main(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session, engine.connect() as connection:
            with pytest.raises(ConnectionUsageError, match="is sqlalchemy's AsyncSession: await the async twin"):
                task.apply_async(connection=session)
            with pytest.raises(ConnectionUsageError, match="is sqlalchemy's AsyncConnection: await the async twin"):
                task.apply_async(connection=connection)
            with pytest.raises(ConnectionUsageError, match="is sqlalchemy's Session: make the sync call"):
                await task.aapply_async(connection=Session())
            await session.run_sync(refuse)
        with pytest.raises(ConnectionUsageError, match="connection= is closed"):
            await task.aapply_async(connection=connection)

    def refuse(session: Session) -> None:
        with pytest.raises(ConnectionUsageError, match="Session of an async engine: await the async twin"):
            task.apply_async(connection=session)

    run(main)


def test_an_async_engine_that_can_t_connect_is_the_database_away(
    task: Task[..., Any], run: Callable[[Main], None]
) -> None:
    async def main(engine: AsyncEngine) -> None:
        async with AsyncSession(create("postgresql+psycopg://127.0.0.1:1/none")) as session:
            with pytest.raises(DatabaseUnavailableError, match="refused"):
                await task.aapply_async(connection=session)

    run(main)
