"""What people give as `connection=` that can't be used: what it is and what to give instead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import psycopg
import psycopg_pool
import pytest
import sqlalchemy
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from durable import Context, Durable, Task
from durable.errors import ConnectionUsageError
from durable.testing import assert_failed, drain, transaction

SECRET = "postgresql://user:hunter2@host/db"
Given = Callable[[str], Any]


def _sync_engine(dsn: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))


def _async_engine(dsn: str) -> Any:
    return create_async_engine("postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(dsn))


class _psycopg2:
    """A connection as psycopg2 makes it, which is no dependency of the tests."""

    connection = type("connection", (), {"__module__": "psycopg2.extensions"})
    cursor = type("cursor", (), {"__module__": "psycopg2.extensions"})


TABLE: dict[str, tuple[Given, str, str]] = {
    "dsn": (lambda dsn: SECRET, r"is a str; a DSN must be opened first", r"is a str; a DSN must be opened first"),
    "number": (lambda dsn: 7, "must be a psycopg Connection, .*got int", "must be a psycopg AsyncConn"),
    "psycopg async": (
        lambda dsn: asyncio.run(psycopg.AsyncConnection.connect(dsn)),
        r"is psycopg's AsyncConnection: await the async twin of this call \(aapply_async",
        "",
    ),
    "psycopg sync": (psycopg.connect, "", r"is psycopg's Connection: make the sync call \(apply_async"),
    "cursor": (
        lambda dsn: psycopg.connect(dsn).cursor(),
        r"is a cursor \(psycopg's Cursor\): give the connection that it belongs to",
        r"is a cursor \(psycopg's Cursor\)",
    ),
    "pool": (
        lambda dsn: psycopg_pool.ConnectionPool(dsn, open=False),
        r"is a pool \(psycopg_pool's ConnectionPool\), which has no transaction: give a connection of it",
        r"is a pool \(psycopg_pool's ConnectionPool\)",
    ),
    "async pool": (
        lambda dsn: psycopg_pool.AsyncConnectionPool(dsn, open=False),
        r"is a pool \(psycopg_pool's AsyncConnectionPool\)",
        r"is a pool \(psycopg_pool's AsyncConnectionPool\)",
    ),
    "engine": (
        _sync_engine,
        "is an Engine, which has no transaction: give a connection or session of it",
        "Engine, which has no transaction",
    ),
    "async engine": (_async_engine, "AsyncEngine, which has no transaction", "AsyncEngine, which has no transaction"),
    "sessionmaker": (
        lambda dsn: sessionmaker(_sync_engine(dsn)),
        "sessionmaker, which has no transaction",
        "sessionmaker, which has no transaction",
    ),
    "async sessionmaker": (
        lambda dsn: async_sessionmaker(_async_engine(dsn)),
        "async_sessionmaker, which has no transaction",
        "async_sessionmaker, which has no transaction",
    ),
    "session": (lambda dsn: Session(_sync_engine(dsn)), "", "is sqlalchemy's Session: make the sync call"),
    "async session": (
        lambda dsn: AsyncSession(_async_engine(dsn)),
        "is sqlalchemy's AsyncSession: await the async twin of this call",
        "",
    ),
    "async connection": (
        lambda dsn: AsyncConnection(_async_engine(dsn)),
        "is sqlalchemy's AsyncConnection: await the async twin of this call",
        "AsyncConnection",
    ),
    "psycopg2": (
        lambda dsn: _psycopg2.connection(),
        "is psycopg2's connection, and a transaction belongs to one driver: durable speaks psycopg 3; run .* psycopg",
        "is psycopg2's connection",
    ),
    "psycopg2 cursor": (lambda dsn: _psycopg2.cursor(), r"is a cursor \(psycopg2's cursor\)", "is a cursor"),
}


@pytest.fixture
def task(app: Durable) -> Task[..., Any]:
    return app.task(name="task")(lambda: None)


@contextmanager
def given(kind: str, dsn: str) -> Iterator[Any]:
    """What a caller gives, closed at the end."""
    value = TABLE[kind][0](dsn)
    yield value
    connection = value.connection if isinstance(value, psycopg.Cursor) else value
    if isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        connection.pgconn.finish()


@pytest.mark.parametrize("kind", [kind for kind, (_, sync, _a) in TABLE.items() if sync])
def test_sync_calls_say_what_to_give(task: Task[..., Any], database: str, kind: str) -> None:
    message = TABLE[kind][1]
    with given(kind, database) as value, pytest.raises(ConnectionUsageError, match=message) as raised:
        task.apply_async(connection=value)
    assert "hunter2" not in str(raised.value)
    assert str(raised.value).startswith("connection= ")


@pytest.mark.parametrize("kind", [kind for kind, (_, _s, asynchronous) in TABLE.items() if asynchronous])
def test_async_calls_say_what_to_give(task: Task[..., Any], database: str, kind: str) -> None:
    message = TABLE[kind][2]
    with given(kind, database) as value, pytest.raises(ConnectionUsageError, match=message):
        asyncio.run(task.aapply_async(connection=value))


def test_asyncpg_is_refused_with_the_remedy(task: Task[..., Any], database: str) -> None:
    async def main() -> None:
        parts = conninfo_to_dict(database)
        names = {"host": "host", "port": "port", "user": "user", "password": "password", "dbname": "database"}
        named = {ours: parts[name] for name, ours in names.items() if parts.get(name)}
        pool = await asyncpg.create_pool(**named, min_size=1, max_size=1)
        async with pool.acquire() as lent:
            for value in (pool, lent):
                name = type(value).__name__
                for call in (
                    lambda value=value: task.aapply_async(connection=value),
                    lambda value=value: asyncio.to_thread(task.apply_async, connection=value),
                ):
                    with pytest.raises(
                        ConnectionUsageError, match=f"is asyncpg's {name}, and a transaction .*speaks psycopg 3; run"
                    ):
                        await call()
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["psycopg async", "async session", "async connection", "engine", "dsn", "pool"])
def test_a_tests_transaction_says_what_to_give(app: Durable, database: str, kind: str) -> None:
    message = TABLE[kind][1]
    if "await the async twin" in message:
        message = r"transaction\(\) runs everything on one sync connection, in async tests too; .*psycopg Connection"
    with (
        given(kind, database) as value,
        pytest.raises(ConnectionUsageError, match=message),
        transaction(app, value),
    ):
        pass


def test_the_steps_context_is_no_connection(app: Durable, task: Task[..., Any]) -> None:
    @app.task(name="outer", bind=True, max_attempts=1)
    def outer(ctx: Context) -> None:
        task.apply_async(connection=ctx)

    result = outer.delay()
    drain(app)
    assert_failed(app, result, ConnectionUsageError, match=r"give ctx\.connection")
