"""Running a producer's writes: on a connection of our own, or inside the caller's transaction; sync or async.

Ours: the write commits first, then the wake-ups it is due go out. The caller's: the write is part of the caller's
transaction, and a raw connection has no after-commit hook, so that transaction carries the wake-ups itself (constant
payloads, which Postgres sends once), or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import psycopg

from durable.errors import ConnectionUsageError
from durable.sql import Statements
from durable.storage.pool import ProducerPool
from durable.storage.session import Operation, arun, run, translated

T = TypeVar("T")
_IDLE = psycopg.pq.TransactionStatus.IDLE


@dataclass(frozen=True, slots=True)
class Write(Generic[T]):
    """One write.

    operation  what is written
    wakeups    from what the operation returned: the notifications to send after a commit
    inside     likewise: those that a caller's transaction carries
    atomic     whether it is more than one statement
    """

    operation: Operation[T]
    wakeups: Callable[[T], Sequence[Operation[Any]]]
    inside: Callable[[T], Sequence[Operation[Any]]]
    atomic: bool = True


class Writer:
    """Runs writes of one app."""

    def __init__(self, pool: ProducerPool, sql: Statements) -> None:
        self._pool = pool
        self._sql = sql

    def write(self, write: Write[T], connection: Any = None, notify_in_transaction: bool = True) -> T:
        """Run a write and return what its operation returns; `connection` is the caller's psycopg Connection.

        Raises ConnectionUsageError, DatabaseUnavailableError, SchemaError, and what the operation raises.
        """
        if connection is None:
            with self._pool.connection() as own:
                with own.transaction() if write.atomic else nullcontext():
                    value = run(own, self._sql, write.operation)
                for wakeup in write.wakeups(value):
                    run(own, self._sql, wakeup)
            return value
        _usable(connection, psycopg.Connection)
        with translated(self._sql.schema):
            with connection.transaction() if write.atomic and connection.autocommit else nullcontext():
                value = run(connection, self._sql, write.operation, foreign=True)
            for wakeup in _foreign_wakeups(connection, write, value, notify_in_transaction):
                run(connection, self._sql, wakeup, foreign=True)
        return value

    async def awrite(self, write: Write[T], connection: Any = None, notify_in_transaction: bool = True) -> T:
        """`write` for coroutines; `connection` is a psycopg AsyncConnection."""
        if connection is None:
            async with self._pool.aconnection() as own:
                async with own.transaction() if write.atomic else nullcontext():
                    value = await arun(own, self._sql, write.operation)
                for wakeup in write.wakeups(value):
                    await arun(own, self._sql, wakeup)
            return value
        _usable(connection, psycopg.AsyncConnection)
        with translated(self._sql.schema):
            async with connection.transaction() if write.atomic and connection.autocommit else nullcontext():
                value = await arun(connection, self._sql, write.operation, foreign=True)
            for wakeup in _foreign_wakeups(connection, write, value, notify_in_transaction):
                await arun(connection, self._sql, wakeup, foreign=True)
        return value


def _foreign_wakeups(
    connection: Any, write: Write[T], value: T, notify_in_transaction: bool
) -> Sequence[Operation[Any]]:
    if connection.info.transaction_status == _IDLE:
        return write.wakeups(value)  # it has committed already
    return write.inside(value) if notify_in_transaction else ()


def _usable(connection: Any, kind: type[Any]) -> None:
    if not isinstance(connection, kind):
        raise ConnectionUsageError(
            f"connection= must be a {kind.__module__}.{kind.__name__}, got {type(connection).__name__}"
        )
    if connection.closed:
        raise ConnectionUsageError("connection= is closed")
    if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
        raise ConnectionUsageError("connection= is in a failed transaction; roll it back first")
    if connection.info.encoding != "utf-8":
        raise ConnectionUsageError(
            f"connection= has client_encoding {connection.info.encoding}; open it with client_encoding='utf8'"
        )
