"""A worker in the calling process that moves only when told: one row at a time, through the production parts.

It shares the picker, the executor and the flusher with the worker processes; it has no threads, no buffer, sends no
heartbeats and no notifications.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from durable.app import Durable
from durable.errors import ConnectionUsageError, DatabaseUnavailableError
from durable.instance import Claimed
from durable.runtime import identity, reporting
from durable.runtime.backoff import Backoff
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.executor import Executor
from durable.runtime.flusher import Flusher
from durable.runtime.link import Link, Stopped
from durable.runtime.picker import Picker
from durable.runtime.step_transaction import StepAgain, StepConnections
from durable.storage import claims, inspection, instances, signals, workers
from durable.storage.admission import Demand, claim_limited
from durable.storage.claims import Commit, Flushed
from durable.storage.session import Connection
from durable.testing.seams import is_usable

log = logging.getLogger(__name__)

LEASE = 3600.0
"""Seconds a step may take; nobody sends heartbeats."""
PATIENCE = 10.0
"""Seconds a commit that the database refuses for now is tried again."""
_INERROR = psycopg.pq.TransactionStatus.INERROR
_IDLE = psycopg.pq.TransactionStatus.IDLE
_KINDS = {"children": "schedule_children"}


class OpenLink(Link):
    """A link over one open connection that is not replaced when it breaks."""

    def __init__(self, connection: Connection, app: Durable) -> None:
        super().__init__(app.dsn, app.sql, "drain", pooler=app.conf.pooler, most_wait=1.0, pause=lambda _: True)
        self.open = connection

    @property
    def connection(self) -> Connection:
        """The connection. Raises DatabaseUnavailableError when it is closed."""
        if self.open.closed:
            raise DatabaseUnavailableError("the connection to the database was lost")
        return self.open


class BorrowedTransaction:
    """What `ctx.connection` has begun where everything runs on a borrowed connection: a savepoint on that one.

    Undoing it undoes the step's other calls of the app too, which in production have connections of their own.
    """

    def __init__(self, link: OpenLink, worker: Callable[[], int], claimed: Claimed, asynchronous: bool) -> None:
        if asynchronous:
            raise ConnectionUsageError(
                "an async step has no ctx.connection inside of durable.testing.transaction, whose connection is sync; "
                "test it on a schema of its own: durable.testing.on_schema, or the fixture durable_app"
            )
        self.connection = link.connection
        self._link = link
        self._worker = worker
        self._claimed = claimed
        self._block = self.connection.transaction()
        self._savepoint = self._block.__enter__()

    def commit(self, commit: Commit) -> Commit:
        """Keep what the step wrote, unless its claim is lost or cancelled; the outcome goes the usual way."""
        if self.connection.info.transaction_status == _INERROR:
            raise ConnectionUsageError(
                "a statement on ctx.connection failed and the step went on, so its transaction can't commit; let the "
                "error out, or use `with ctx.connection.transaction():` around what may fail"
            )
        instance_id = self._claimed.id
        standing = self._link.run(claims.hold(self._worker(), self._claimed, commit.rerun))
        if standing == "owned":
            self._block.__exit__(None, None, None)
            return commit
        asked = self._link.run(inspection.show(instance_id))
        self._undo()
        if standing == "cancelled" and asked is not None:  # maybe by the step itself, within the savepoint
            reason = (asked.error or {}).get("message", "cancelled")
            self._link.run_atomically(instances.cancel(instance_id, reason))
        return commit

    def abandon(self, error: BaseException) -> None:
        """Undo what the step wrote."""
        self._undo()

    def _undo(self) -> None:
        self._block.__exit__(psycopg.Rollback, psycopg.Rollback(self._savepoint), None)


class LocalWorker:
    """Claims rows one by one, runs their step, commits the outcome.

    unknown  "name:version" of rows it met whose task the app does not have; they are left to others
    """

    def __init__(self, app: Durable, connection: Connection) -> None:
        self._app = app
        self._link = OpenLink(connection, app)
        self._flusher = Flusher(self._link, self._pause)
        self._coroutines = CoroutineRunner()
        self._step_connections = StepConnections(
            app, f"durable {app.name} drain step", self._coroutines, lambda: self._worker, lambda: False
        )
        borrowed = connection.info.transaction_status != _IDLE
        self._executor = Executor(app, self._coroutines, self._borrow if borrowed else self._step_connections.begin)
        self._pickers: dict[str, Picker] = {}
        self._worker = 0
        self._waited = 0.0
        self.unknown: list[str] = []

    def claim(self, queue: str, suspect: bool, limited: bool) -> Claimed | None:
        """Claim the next row of a queue, its inbox loaded; None when it went elsewhere: taken, expired, unknown."""
        if not self._worker:
            me = identity.own("worker", "durable.testing", queue)
            self._worker = self._link.run(workers.register(me, LEASE))
        picker = self._pickers.setdefault(queue, Picker(self._link, queue))
        picker.rescan()
        if limited:
            demand = Demand(self._worker, queue, limit=1, slots=1, alone=True, unknown=picker.unknown)
            rows = self._link.run_atomically(claim_limited(demand)).rows
        else:
            rows = picker.claim_suspect(self._worker) if suspect else picker.claim(self._worker, 1)
        if not rows:
            return None
        (row,) = rows
        pair = [(row.id, row.token)]
        if row.expired:
            self._link.run_atomically(claims.expire(self._worker, pair))
            return None
        if (row.machine, row.machine_version) not in self._app.definitions:
            self.unknown.append(f"{row.machine}:{row.machine_version}")
            for known in self._pickers.values():
                known.hide(row.machine, row.machine_version)
            reason = f"a drain does not know {row.machine} version {row.machine_version}"
            self._link.run_atomically(claims.release(self._worker, pair, reason))
            return None
        return self._with_inbox(row)

    def execute(self, claimed: Claimed) -> Commit:
        """Run its step, again as long as it did not happen: a deadlock on `ctx.connection`, for instance."""
        self._waited = 0.0
        backoff = Backoff(first=0.02, most=1.0)
        while True:
            try:
                return self._execute(claimed)
            except StepAgain as again:
                log.warning("the step of instance %d is run again: %s", claimed.id, again)
                if self._pause(backoff.next()):
                    raise Stopped from again

    def _execute(self, claimed: Claimed) -> Commit:
        """What the step did to a borrowed connection, its failed statements too, is contained."""
        connection = self._link.connection
        if connection.info.transaction_status == _IDLE:
            return self._executor.execute(claimed)
        with connection.transaction() as savepoint:
            commit = self._executor.execute(claimed)
            if connection.info.transaction_status == _INERROR:
                raise psycopg.Rollback(savepoint)
        return commit

    def commit(self, commit: Commit) -> tuple[str | None, Claimed | None]:
        """Commit an outcome; return what became of the instance (None: stale), and its claim if it goes on inline."""
        self._waited = 0.0
        flushed = commit.flushed or Flushed()
        if commit.flushed is None:  # else it was committed together with what its step wrote
            flushed = self._flusher.flush(self._worker, [commit])
            while flushed.locked:  # only where the connection has a lock_timeout
                if self._pause(0.05):
                    raise Stopped
                flushed = self._flusher.flush_again(self._worker, [commit])
        claimed = commit.claimed
        if claimed.id not in flushed.committed:
            return None, None
        if flushed.unread or flushed.rerun:
            reporting.unread([commit], flushed)
        if claimed.id in flushed.rerun:
            return "rerun", None
        if commit.kind == "end" or claimed.id in flushed.ended:
            # A cancel may have overruled the outcome, or the database refused it.
            end = self._link.run(instances.snapshot(claimed.id))
            return (commit.status if end is None else end.status), None
        return _KINDS.get(commit.kind, commit.kind), self._next(commit, flushed)

    def leave(self) -> None:
        """Give back what is still held, end the lease and the event loop of async steps."""
        try:
            if self._worker and is_usable(self._link.open):
                there = self._link.run(claims.held(self._worker))
                if there:
                    self._link.run_atomically(claims.release(self._worker, list(there.items()), "its drain ended"))
                self._link.run(workers.bury([self._worker]))
        finally:
            self._step_connections.close_idle(0.0)
            self._coroutines.close(self._app.aclose)

    def _borrow(self, claimed: Claimed, asynchronous: bool) -> Any:
        return BorrowedTransaction(self._link, lambda: self._worker, claimed, asynchronous)

    def _next(self, commit: Commit, flushed: Flushed) -> Claimed | None:
        if commit.status != "executing":
            return None
        return self._with_inbox(commit.next_claim(flushed.inboxes.get(commit.claimed.id)))

    def _with_inbox(self, row: Claimed) -> Claimed:
        if not row.inbox:
            return row
        return row._replace(signals=self._link.run(signals.inbox([row.id])).get(row.id, ()))

    def _pause(self, seconds: float) -> bool:
        time.sleep(seconds)
        self._waited += seconds
        return self._waited > PATIENCE or self._link.open.closed


@contextmanager
def hired(app: Durable, connection: Connection) -> Iterator[LocalWorker]:
    """Lend a worker; at the end it holds nothing any more."""
    worker = LocalWorker(app, connection)
    try:
        yield worker
    finally:
        worker.leave()
