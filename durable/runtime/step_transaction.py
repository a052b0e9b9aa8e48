"""`ctx.connection`: what a step writes there commits together with the step's outcome.

Which rows, which locks, who may die where: the step's own statements run in a transaction that begins when the step
first asks for its connection. After the step that transaction locks the instance's row (and the parent it reports to),
looks whether the claim still stands, writes the outcome with all its riders as a group commit does, and one COMMIT ends
both. Death before that COMMIT leaves nothing of either; the step runs again. Then:

* The claim is gone: everything is rolled back, the outcome is stale.
* A cancel was asked for: the writes are rolled back, the outcome goes the usual way and becomes `cancelled`.
* The machine has on_unread="rerun" and a signal came: the writes are rolled back, and the step runs again with it.
* Deadlock, serialization failure, connection lost, no connection to be had, no room on the server's disk, a timeout of
  the server in the outcome's statements: all is rolled back and the step runs again (`StepAgain`); it costs no attempt.
* The answer to COMMIT was lost: the row is asked what became of it, under its lock, so that a COMMIT still under way
  is waited for.
* Any other error of the outcome's statements or of COMMIT (a deferred constraint of the user's) is the step's error.

A connection is used by one step at a time, from the slot's thread; `StepConnections` belongs to the process.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import psycopg
from psycopg.rows import tuple_row

from durable import forks
from durable.app import Durable
from durable.errors import ConnectionUsageError, DurableError
from durable.instance import Claimed
from durable.outcomes import StepAgain as StepAgain
from durable.runtime import reporting
from durable.runtime.backoff import Backoff
from durable.runtime.coroutines import CoroutineRunner
from durable.sql import Statements
from durable.storage import claims, partitions
from durable.storage.claims import Commit, Flushed
from durable.storage.session import Operation, arun, connect, describe, run
from durable.storage.step_connection import (
    BEGIN,
    AsyncStepConnection,
    StepConnection,
    aopen_step_connection,
    open_step_connection,
    run_beside,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

CANCEL_SECONDS = 2.0
"""Seconds that the server is given to take a request to cancel a statement."""
IDLE_SECONDS = 60.0
"""Seconds after which an unused step connection is closed."""
_AGAIN = ("40001", "40P01", "53100")  # serialization failure, deadlock, disk full
_TOO_LONG = ("25P03", "25P04")  # the server's idle_in_transaction_session_timeout, transaction_timeout
_STATUS = psycopg.pq.TransactionStatus
_NO_PIPELINE = psycopg.pq.PipelineStatus.OFF


Begin = Callable[[Claimed, bool], "StepTransaction"]
"""Opens the transaction of a step: its claim, whether it is `async def`."""


class Lent(Protocol):
    """A step connection as the runtime uses it."""

    connection: Any

    def begin(self) -> None: ...
    def run(self, sql: Statements, operation: Operation[T]) -> T: ...
    def end(self) -> None: ...
    def undo(self) -> None: ...


class _Sync:
    """The step's own statements may take as long as they like; the runtime's have `patience`."""

    def __init__(self, connection: StepConnection, patience: float) -> None:
        self.connection = connection
        self._patience = patience

    def begin(self) -> None:
        self.connection.patience = self._patience
        self.connection.row_factory = tuple_row
        self.connection.cursor_factory = psycopg.Cursor
        self.connection.wakeups = []
        self.connection.execute(BEGIN, prepare=False)
        self.connection.patience = math.inf

    def run(self, sql: Statements, operation: Operation[T]) -> T:
        self.connection.patience = self._patience
        return run(self.connection, sql, operation)

    def end(self) -> None:
        self.connection.patience = self._patience
        self.connection.end()

    def undo(self) -> None:
        self.connection.patience = self._patience
        self.connection.undo()


class _Async:
    """`begin` is called while the step's loop runs, everything else when it does not."""

    def __init__(self, connection: AsyncStepConnection, coroutines: CoroutineRunner, patience: float) -> None:
        self.connection = connection
        self._coroutines = coroutines
        self._patience = patience

    def begin(self) -> None:
        self.connection.patience = self._patience
        self.connection.row_factory = tuple_row
        self.connection.cursor_factory = psycopg.AsyncCursor
        self.connection.wakeups = []
        run_beside(self._begin())
        self.connection.patience = math.inf

    async def _begin(self) -> None:
        await self.connection.execute(BEGIN, prepare=False)

    def run(self, sql: Statements, operation: Operation[T]) -> T:
        self.connection.patience = self._patience
        return self._coroutines.run(arun(self.connection, sql, operation))  # type: ignore[no-any-return]

    def end(self) -> None:
        self.connection.patience = self._patience
        self._coroutines.run(self.connection.end())

    def undo(self) -> None:
        self.connection.patience = self._patience
        self._coroutines.run(self.connection.undo())


class StepConnections:
    """A process's connections for steps, opened when a step asks, closed when none did for a minute.

    name      of its sessions
    most      how many there may be unless the setting says
    worker    returns the process's present worker id
    stopping  returns whether the process was asked to stop
    """

    def __init__(
        self,
        app: Durable,
        name: str,
        coroutines: CoroutineRunner,
        worker: Callable[[], int],
        stopping: Callable[[], bool],
        most: int = 1,
    ) -> None:
        self._dsn = app.dsn
        self.sql = app.sql
        self._name = name
        self._coroutines = coroutines
        self.worker = worker
        self.stopping = stopping
        self._pooler = app.conf.pooler
        self._timeout = app.conf.connect_timeout
        self._patience = app.conf.worker_patience
        self._free = threading.BoundedSemaphore(app.conf.step_connections or most)
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Lent]] = []

    def begin(self, claimed: Claimed, asynchronous: bool, *, wait: bool = True) -> StepTransaction:
        """Open the transaction of a step. Raises StepAgain when no connection is to be had."""
        return StepTransaction(self, claimed, self.lend(asynchronous, wait=wait))

    def lend(self, asynchronous: bool, *, wait: bool = True) -> Lent:
        """Lend a connection inside a fresh transaction; waits for one. Raises StepAgain when none is to be had."""
        if forks.strayed:
            raise ConnectionUsageError(
                "ctx.connection belongs to the process that runs the step, not to one that the step has forked: "
                "open a connection of your own here"
            )
        if not self._free.acquire(blocking=wait):
            raise StepAgain("no step connection is free")
        try:
            while True:
                lent = self._take(_Async if asynchronous else _Sync)
                new = lent is None
                lent = lent or self._open(asynchronous)
                try:
                    lent.begin()
                    return lent
                except psycopg.Error:
                    self._close(lent)
                    if new:
                        raise
        except (psycopg.Error, DurableError) as error:
            self._free.release()
            raise StepAgain(f"no step connection: {describe(error)}") from error
        except BaseException:
            self._free.release()
            raise

    def give_back(self, lent: Lent) -> None:
        """Take a connection back; one that is not out of its transaction is closed."""
        if not usable(lent) or lent.connection.info.transaction_status != _STATUS.IDLE:
            self._close(lent)
        else:
            with self._lock:
                self._idle.append((time.monotonic(), lent))
        self._free.release()

    @property
    def idle_since(self) -> float:
        """time.monotonic() since when the longest unused connection is unused; infinite when there is none."""
        with self._lock:
            return min((since for since, _ in self._idle), default=math.inf)

    def close_idle(self, idle_seconds: float = IDLE_SECONDS) -> None:
        """Close the connections that nobody has used for that long."""
        until = time.monotonic() - idle_seconds
        with self._lock:
            old = [entry for entry in self._idle if entry[0] <= until]
            self._idle = [entry for entry in self._idle if entry[0] > until]
        for _, lent in old:
            self._close(lent)

    def make_partitions(self) -> None:
        """Make the history's missing partitions. Raises psycopg.Error."""
        with self.plain() as connection:
            partitions.ensure(connection, self.sql)

    def plain(self) -> psycopg.Connection[Any]:
        """Return a new connection for the runtime's own questions. Raises psycopg.Error, DurableError."""
        return connect(self._dsn(), self._name, pooler=self._pooler, timeout=self._timeout, patience=self._patience)

    def _take(self, kind: type[Any]) -> Lent | None:
        """Return an idle connection of that kind; one of the other kind makes room for a new one."""
        with self._lock:
            for index in reversed(range(len(self._idle))):
                if isinstance(self._idle[index][1], kind):
                    return self._idle.pop(index)[1]
            other = self._idle.pop(0)[1] if self._idle else None
        if other is not None:
            self._close(other)
        return None

    def _open(self, asynchronous: bool) -> Lent:
        if not asynchronous:
            connection = open_step_connection(
                self._dsn(), self._name, self._timeout, pooler=self._pooler, patience=self._patience
            )
            return _Sync(connection, self._patience)
        opening = aopen_step_connection(
            self._dsn(), self._name, self._timeout, pooler=self._pooler, patience=self._patience
        )
        return _Async(run_beside(opening), self._coroutines, self._patience)

    @staticmethod
    def _close(lent: Lent) -> None:
        # Without asking the loop of an async one, which may be running.
        if lent.connection.pgconn.transaction_status == _STATUS.ACTIVE:
            try:
                # Else the statement, and its locks, would outlive the connection.
                if isinstance(lent.connection, AsyncStepConnection):
                    run_beside(lent.connection.cancel_safe(timeout=CANCEL_SECONDS))
                else:
                    lent.connection.cancel_safe(timeout=CANCEL_SECONDS)
            except psycopg.Error as error:
                log.warning("a statement that a step left running could not be cancelled: %s", describe(error))
        lent.connection.pgconn.finish()


def usable(lent: Lent) -> bool:
    """Whether statements can be sent: it is open, and no statement, COPY or pipeline is under way."""
    connection = lent.connection
    return not (
        connection.closed
        or connection.info.transaction_status == _STATUS.ACTIVE
        or connection.pgconn.pipeline_status != _NO_PIPELINE
    )


class StepTransaction:
    """The transaction of one execution of a step."""

    def __init__(self, connections: StepConnections, claimed: Claimed, lent: Lent) -> None:
        self._connections = connections
        self._claimed = claimed
        self._lent: Lent | None = lent
        self.connection = lent.connection

    def commit(self, commit: Commit) -> Commit:
        """End the transaction with the step's outcome.

        Returns the outcome: with `flushed` set when it is durable or stale, without when it must go the usual way.
        Raises StepAgain, or the error that makes the step fail; `abandon` is called then.
        """
        lent = self._lent
        assert lent is not None, "a transaction ends once"
        self._check_open(lent)
        sql = self._connections.sql
        # One id for both statements: the process may get another lease while the first one waits for a lock.
        worker = self._connections.worker()
        try:
            standing = lent.run(sql, claims.hold(worker, self._claimed, commit.rerun))
            if standing != "owned":
                lent.undo()
                commit.flushed = Flushed() if standing == "lost" else None
                self._give_back()
                return commit
            flushed = lent.run(sql, claims.flush_one(worker, commit))
            if self._claimed.id not in flushed.committed:  # its writes must not be committed without it
                raise StepAgain("its outcome was stale, although its row is locked")
        except psycopg.errors.CheckViolation as error:
            if error.diag.schema_name != sql.schema or error.diag.table_name != "history":
                raise
            self._give_back(undo=True)
            try:
                self._connections.make_partitions()
            except psycopg.Error as problem:
                raise StepAgain(f"today's partition of the history can't be made: {describe(problem)}") from problem
            raise StepAgain("the history had no partition for today") from error
        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:
            # Ours was cut short by the server's timeouts: the step itself has come to its end.
            raise StepAgain(describe(error)) from error
        try:
            lent.end()
        except psycopg.Error as error:
            if not (lent.connection.closed or lent.connection.broken):
                raise
            self._give_back()
            log.warning("the answer to a COMMIT was lost: %s", describe(error), extra=reporting.fields(self._claimed))
            return self._find_out(worker, commit, flushed)
        commit.flushed = flushed
        if lent.connection.wakeups:
            self._notify(lent)
        self._give_back()
        return commit

    def _notify(self, lent: Lent) -> None:
        """Tell workers what the step has enqueued on its connection, now that it is committed."""
        try:
            for due in lent.connection.wakeups:
                for operation in due():
                    lent.run(self._connections.sql, operation)
        except psycopg.Error as error:
            log.warning(
                "instance %d: workers could not be notified after its commit: %s; their next poll finds the rows",
                self._claimed.id,
                describe(error),
                extra=reporting.fields(self._claimed),
            )

    def abandon(self, error: BaseException) -> None:
        """Roll everything back after the step raised. Raises StepAgain when that was not the step's fault."""
        lent = self._lent
        if lent is None:
            return
        lost = lent.connection.closed or lent.connection.broken
        self._give_back(undo=not lost)
        if isinstance(error, StepAgain):
            return
        cause: BaseException | None = error
        seen: set[int] = set()
        while cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            if isinstance(cause, psycopg.Error):
                if cause.sqlstate in _TOO_LONG:
                    return  # the step's doing: it would take as long the next time
                if cause.sqlstate in _AGAIN:
                    raise StepAgain(describe(cause)) from error
            cause = cause.__cause__ or cause.__context__
        if lost:
            raise StepAgain("the step's connection was lost") from error

    def _check_open(self, lent: Lent) -> None:
        if lent.connection.closed or lent.connection.broken:
            raise StepAgain("the step's connection was lost")
        status = lent.connection.info.transaction_status
        if status == _STATUS.INERROR:
            raise ConnectionUsageError(
                "a statement on ctx.connection failed and the step went on, so its transaction can't commit; let the "
                "error out, or use `with ctx.connection.transaction():` around what may fail"
            )
        if status != _STATUS.INTRANS or lent.connection.pgconn.pipeline_status != _NO_PIPELINE:
            raise ConnectionUsageError(
                f"the step left ctx.connection {status.name if status != _STATUS.INTRANS else 'in a pipeline'}; "
                "its transaction ends with the step, by the runtime"
            )

    def _give_back(self, *, undo: bool = False) -> None:
        lent, self._lent = self._lent, None
        assert lent is not None, "given back once"
        if undo and usable(lent):
            try:
                lent.undo()
            except psycopg.Error as error:
                log.warning("a rollback failed, its connection is dropped: %s", describe(error))
        self._connections.give_back(lent)

    def _find_out(self, worker: int, commit: Commit, flushed: Flushed) -> Commit:
        """Ask until the database says what became of the COMMIT; `flushed` is what it would have done."""
        backoff = Backoff(first=0.02, most=2.0)
        while True:
            try:
                with self._connections.plain() as connection:
                    with connection.transaction():
                        standing = run(connection, self._connections.sql, claims.hold(worker, self._claimed))
                    if standing == "cancelled":
                        return commit
                    if standing == "owned":
                        raise StepAgain("the COMMIT did not take place")
                    found = run(connection, self._connections.sql, claims.resolve([commit]))
                if found.committed:
                    found.ready += flushed.ready
                commit.flushed = found
                return commit
            except (psycopg.Error, DurableError) as error:
                if self._connections.stopping():
                    raise StepAgain("the process stops before the database says what became of a COMMIT") from error
            time.sleep(backoff.next())
