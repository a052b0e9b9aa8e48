"""The connections that steps write on: psycopg's own, with a transaction that is not theirs to end.

A step connection is inside a transaction from the moment a step gets it until the runtime ends both, the transaction
and the step. What would end it earlier is refused; savepoints (`with connection.transaction()`) are the step's.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

from durable.errors import ConnectionUsageError
from durable.storage import arrays
from durable.storage.bounded import AsyncBoundedConnection, BoundedConnection, NoAnswerError, open_bounded
from durable.storage.opened import opened
from durable.storage.session import PATIENCE, Operation, connection_defaults

T = TypeVar("T")
Wakeups = Callable[[], Sequence[Operation[Any]]]
"""Makes the notifications that are due after a commit; often none."""

# What a step before this one has left in the session is not this one's. In a transaction of its own, since a step may
# still choose its isolation level, which only the first statement of a transaction can.
BEGIN = (
    "BEGIN; SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; "
    "SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; COMMIT; BEGIN"
)


def _refuse(what: str) -> NoReturn:
    raise ConnectionUsageError(
        f"{what} on ctx.connection: its transaction ends with the step; raise to roll back, "
        "or use `with ctx.connection.transaction():` for a savepoint"
    )


class StepConnection(BoundedConnection):
    """What `ctx.connection` is in a step."""

    wakeups: list[Wakeups]
    """The runtime's: notifications for after the commit. In the transaction, a full NOTIFY queue would undo it."""

    def commit(self) -> None:
        _refuse("commit()")

    def rollback(self) -> None:
        _refuse("rollback()")

    def close(self) -> None:
        _refuse("close()")

    def set_autocommit(self, value: bool) -> None:
        _refuse("autocommit")

    def __enter__(self) -> NoReturn:
        _refuse("`with`")

    def end(self) -> None:
        """Commit: the runtime's."""
        super().commit()

    def undo(self) -> None:
        """Roll back: the runtime's."""
        super().rollback()


class AsyncStepConnection(AsyncBoundedConnection):
    """What `ctx.connection` is in an `async def` step."""

    wakeups: list[Wakeups]

    async def commit(self) -> None:
        _refuse("commit()")

    async def rollback(self) -> None:
        _refuse("rollback()")

    async def close(self) -> None:
        _refuse("close()")

    async def set_autocommit(self, value: bool) -> None:
        _refuse("autocommit")

    async def __aenter__(self) -> NoReturn:
        _refuse("`async with`")

    async def end(self) -> None:
        """Commit: the runtime's."""
        await super().commit()

    async def undo(self) -> None:
        """Roll back: the runtime's."""
        await super().rollback()


def open_step_connection(
    dsn: str, name: str, timeout: float, *, pooler: bool, patience: float = PATIENCE
) -> StepConnection:
    """Open one; `timeout` is for each host of the DSN, `patience` for all. Raises psycopg.OperationalError."""
    connection = open_bounded(
        StepConnection,
        dsn,
        time.monotonic() + max(timeout, patience),
        application_name=name[:60],
        **connection_defaults(timeout, pooler=pooler),
    )
    arrays.register(opened(connection).adapters)
    return connection


async def aopen_step_connection(
    dsn: str, name: str, timeout: float, *, pooler: bool, patience: float = PATIENCE
) -> AsyncStepConnection:
    """`open_step_connection` for coroutines."""
    defaults = connection_defaults(timeout, pooler=pooler)
    try:
        async with asyncio.timeout(max(timeout, patience)):
            connection = await AsyncStepConnection.connect(dsn, application_name=name[:60], **defaults)
    except TimeoutError as error:
        raise NoAnswerError(f"connection timeout: no answer within {max(timeout, patience):g} s") from error
    arrays.register(opened(connection).adapters)
    return connection


def run_beside(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end although this thread's event loop is running: on a loop of its own, in a thread."""
    outcome: list[T] = []
    problem: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=body, name="durable-step-connection")
    thread.start()
    thread.join()
    if problem:
        raise problem[0]
    return outcome[0]
