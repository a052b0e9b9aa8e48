"""A process's connection to the database: opened when needed, replaced when it broke.

One thread uses it. `reconnect` waits with full-jitter backoff and never gives up by itself; the caller's `stopping`
ends it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from psycopg import errors as pg_errors

from durable.errors import DurableError
from durable.runtime.backoff import Backoff
from durable.sql import Statements
from durable.storage import maintenance
from durable.storage.bounded import BoundedConnection, hurry
from durable.storage.session import PATIENCE, Connection, Operation, connect, describe, run, run_atomically

T = TypeVar("T")
log = logging.getLogger(__name__)

LOCK_WAIT = 0.1
"""Seconds for which a statement of a worker, an agent or a beat waits for another session's lock.

Then the work that needs the lock is put aside and the rest goes on: see "What another session's lock does" in
docs/operations.md.
"""
LOCKED = (pg_errors.LockNotAvailable, pg_errors.DeadlockDetected)
"""Errors of a statement that another session's lock kept waiting."""

WARN_EVERY = 60.0
"""Seconds between two warnings that notifications are not sent."""


class Stopped(Exception):
    """The process was asked to stop while the database was away."""


class Link:
    """One connection.

    dsn       asked for each new connection (and so may restart an embedded server)
    pause     waits that many seconds, or less when the process is asked to stop; returns whether it is
    patience  seconds that each wait for the server may take; the connection counts as lost after that
    """

    def __init__(
        self,
        dsn: Callable[[], str],
        sql: Statements,
        name: str,
        *,
        pooler: bool,
        most_wait: float,
        pause: Callable[[float], bool],
        patience: float = PATIENCE,
    ) -> None:
        self._dsn = dsn
        self.sql = sql
        self._name = name
        self._pooler = pooler
        self._pause = pause
        self._patience = patience
        self._backoff = Backoff(most=most_wait)
        self._connection: BoundedConnection | None = None
        self._deadline = math.inf
        self._warn_at = 0.0
        self.connected_since: datetime | None = None
        """The database's clock when the present connection was made."""

    @property
    def connection(self) -> Connection:
        """The open connection, made now if there is none. Raises Stopped."""
        if self._connection is None or self._connection.closed:
            self._connection = self._open()
        return self._connection

    def run(self, operation: Operation[T]) -> T:
        """Drive an operation, each statement by itself. Raises psycopg.Error, Stopped."""
        return run(self.connection, self.sql, operation)

    def run_atomically(self, operation: Operation[T]) -> T:
        """Drive an operation in one transaction. Raises psycopg.Error, Stopped."""
        return run_atomically(self.connection, self.sql, operation)

    def run_around_locks(self, operation_of: Callable[[bool], Operation[T]]) -> tuple[T, bool]:
        """Drive an operation in one transaction; when it waits for a lock too long, once more without waiting.

        operation_of  makes the operation; its argument says whether it may wait for locks. If not, it leaves out the
                      rows that other sessions hold.
        Returns the operation's result, and whether it was the whole of it. Raises psycopg.Error, Stopped.
        """
        try:
            return self.run_atomically(operation_of(True)), True
        except LOCKED:
            return self.run_atomically(operation_of(False)), False

    def notify(self, wakeups: Sequence[Operation[Any]]) -> bool:
        """Send notifications of what has been committed; return whether they were sent.

        A server whose queue of notifications is full refuses them. The work goes on: polls find the rows.

        Raises:
            psycopg.Error: They failed for another reason.
            Stopped: The process was asked to stop while the database was away.
        """
        try:
            for operation in wakeups:
                self.run(operation)
        except pg_errors.ProgramLimitExceeded as error:
            now = time.monotonic()
            if now >= self._warn_at:
                self._warn_at = now + WARN_EVERY
                log.warning(
                    "%s: notifications are not sent, workers poll meanwhile: %s; end the session that listens and "
                    "stays in a transaction (the oldest in pg_stat_activity), then call pg_notification_queue_usage()",
                    self._name,
                    describe(error),
                )
            return False
        return True

    def _open(self) -> BoundedConnection:
        told = False
        while True:
            try:
                connection = connect(
                    self._dsn(),
                    self._name,
                    pinned=True,
                    pooler=self._pooler,
                    patience=self._patience,
                    lock_timeout=LOCK_WAIT,
                    deadline=self._deadline,
                )
                self.connected_since = run(connection, self.sql, maintenance.now())
            except (psycopg.Error, DurableError) as error:
                if not told:
                    log.warning("%s: the database can't be reached: %s; trying on", self._name, describe(error))
                    told = True
                if self._pause(self._backoff.next()):
                    raise Stopped from error
                continue
            if told:
                log.warning("%s: the database is back", self._name)
            self._backoff.reset()
            return connection

    def end_by(self, deadline: float) -> None:
        """Let every wait end by that `time.monotonic()`, the present one included; for a signal handler."""
        self._deadline = deadline
        hurry(deadline)
        if self._connection is not None:
            self._connection.deadline = deadline

    def drop(self) -> None:
        """Close the connection; the next use opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def broken(self, error: BaseException) -> bool:
        """Whether an error left the connection useless; it is dropped then."""
        lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and (
            self._connection is None or self._connection.closed or self._connection.broken
        )
        if lost:
            self.drop()
        return lost
