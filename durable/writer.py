"""Running a producer's writes: on a connection of our own, or inside the caller's transaction; sync or async.

Ours: the write commits first, then the wake-ups it is due go out. The caller's: the write is part of the caller's
transaction. Where somebody tells of its commit, the wake-ups go out after that, on a connection of ours; a raw
connection has no such hook, so that its transaction carries them itself (constant payloads, which Postgres sends
once), or none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import psycopg

from durable import interruption
from durable.callers import aaccept, accept
from durable.errors import ValidationError
from durable.sql import Statements
from durable.storage.pool import ProducerPool
from durable.storage.session import ATTEMPTS, UNDONE, Operation, arun, pause_before_repeat, run, translated

T = TypeVar("T")
_IDLE = psycopg.pq.TransactionStatus.IDLE

log = logging.getLogger(__name__)
_NOT_NOTIFIED = "workers could not be notified after a commit; they will find the rows at their next poll"


@dataclass(frozen=True, slots=True)
class Write(Generic[T]):
    """One write.

    operation  makes what is written; called again when a deadlock has undone the write
    wakeups    from what the operation returned: the notifications to send after a commit
    inside     likewise: those that a caller's transaction carries
    atomic     whether it is more than one statement
    timeout    seconds that it may take in all, connecting included; None: the app's `call_timeout`
    """

    operation: Callable[[], Operation[T]]
    wakeups: Callable[[T], Sequence[Operation[Any]]]
    inside: Callable[[T], Sequence[Operation[Any]]]
    atomic: bool = True
    timeout: float | None = None


class Writer:
    """Runs writes of one app."""

    def __init__(self, pool: ProducerPool, sql: Statements) -> None:
        self._pool = pool
        self._sql = sql

    def write(self, write: Write[T], connection: Any = None, notify_in_transaction: bool = True) -> T:
        """Run a write and return what its operation returns; `connection` is the caller's: see `callers`.

        Raises ConnectionUsageError, DatabaseUnavailableError, SchemaError, and what the operation raises.
        """
        if connection is None:
            with self._pool.connection(timeout=write.timeout) as own:
                inside = own.info.transaction_status != _IDLE  # a borrowed one: an error must not end its transaction
                for left in reversed(range(ATTEMPTS)):
                    try:
                        with own.transaction() if write.atomic or inside else nullcontext():
                            value = run(own, self._sql, write.operation())
                        break
                    except UNDONE:
                        if inside or not left:
                            raise
                    time.sleep(pause_before_repeat(ATTEMPTS - left))
                try:
                    for wakeup in write.wakeups(value):
                        run(own, self._sql, wakeup)
                except psycopg.Error:
                    if inside:
                        raise
                    log.warning(_NOT_NOTIFIED, exc_info=True)  # it is committed: an error would have it done twice
            if interruption.late:
                interruption.raise_late()
            return value
        _refuse_timeout(write)
        with translated(self._sql.schema, callers=True):
            caller = accept(connection)
            theirs = caller.connection
            with theirs.transaction() if write.atomic and theirs.autocommit else nullcontext():
                value = run(theirs, self._sql, write.operation(), foreign=True)
            wakeups: Sequence[Operation[Any]] = ()
            if theirs.info.transaction_status == _IDLE:
                wakeups = write.wakeups(value)  # it has committed already
            elif caller.notify_later is not None:
                caller.notify_later(partial(write.wakeups, value))
            elif caller.after_commit is not None:
                caller.after_commit(partial(self._notify, write, value))
            elif notify_in_transaction and caller.may_notify:
                wakeups = write.inside(value)
            for wakeup in wakeups:
                run(theirs, self._sql, wakeup, foreign=True)
        if interruption.late:
            interruption.raise_late()
        return value

    async def awrite(self, write: Write[T], connection: Any = None, notify_in_transaction: bool = True) -> T:
        """`write` for coroutines; `connection` is one for coroutines."""
        if connection is None:
            if self._pool.borrowed is not None:
                return self.write(write)
            async with self._pool.aconnection(timeout=write.timeout) as own:
                for left in reversed(range(ATTEMPTS)):
                    try:
                        async with own.transaction() if write.atomic else nullcontext():
                            value = await arun(own, self._sql, write.operation())
                        break
                    except UNDONE:
                        if not left:
                            raise
                    await asyncio.sleep(pause_before_repeat(ATTEMPTS - left))
                try:
                    for wakeup in write.wakeups(value):
                        await arun(own, self._sql, wakeup)
                except psycopg.Error:
                    log.warning(_NOT_NOTIFIED, exc_info=True)
            if interruption.late:
                interruption.araise_late()
            return value
        _refuse_timeout(write)
        with translated(self._sql.schema, callers=True):
            caller = await aaccept(connection)
            theirs = caller.connection
            async with theirs.transaction() if write.atomic and theirs.autocommit else nullcontext():
                value = await arun(theirs, self._sql, write.operation(), foreign=True)
            wakeups: Sequence[Operation[Any]] = ()
            if theirs.info.transaction_status == _IDLE:
                wakeups = write.wakeups(value)  # it has committed already
            elif caller.notify_later is not None:
                caller.notify_later(partial(write.wakeups, value))
            elif caller.after_commit is not None:
                caller.after_commit(partial(self._notify_aside, write, value))
            elif notify_in_transaction and caller.may_notify:
                wakeups = write.inside(value)
            for wakeup in wakeups:
                await arun(theirs, self._sql, wakeup, foreign=True)
        if interruption.late:
            interruption.araise_late()
        return value

    def _notify(self, write: Write[T], value: T) -> None:
        """After a caller's commit: send the wake-ups of what it has made visible."""
        self._send(write.wakeups(value))

    def _notify_aside(self, write: Write[T], value: T) -> None:
        """`_notify` in the middle of a coroutine's commit, which must not wait for a connection of ours.

        By the sync pool in a thread of the event loop's executor, which the end of the loop waits for. A task on the
        loop would be cut off there, and would open an async pool in a program that may never close one.
        """
        wakeups = write.wakeups(value)
        if wakeups:
            try:
                asyncio.get_running_loop().run_in_executor(None, self._send, wakeups)
            except RuntimeError:  # the loop is going down
                log.exception(_NOT_NOTIFIED)

    def _send(self, wakeups: Sequence[Operation[Any]]) -> None:
        """Send wake-ups for a commit of somebody else, who must not fail for them."""
        if wakeups:
            try:
                with self._pool.connection() as own:
                    for wakeup in wakeups:
                        run(own, self._sql, wakeup)
            except Exception:
                log.exception(_NOT_NOTIFIED)


def _refuse_timeout(write: Write[Any]) -> None:
    if write.timeout is not None:
        raise ValidationError(
            f"timeout={write.timeout:g} is for connections of the app; with connection= the statement_timeout and the "
            "network settings of that connection decide"
        )
