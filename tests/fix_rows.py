"""Sessions on a migrated schema, driven by hand: statements one at a time, transactions held open, locks looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

import psycopg
import pytest
from psycopg.rows import dict_row

from durable import Durable
from durable.instance import Claimed, NewInstance, Payload
from durable.runtime.picker import HIGHEST, LOWEST
from durable.sql import Statements
from durable.storage import claims, instances, migrations, workers
from durable.storage.admission import Admitted, Demand, claim_limited
from durable.storage.claims import Commit
from durable.storage.session import Operation, connect, run, run_atomically
from durable.storage.workers import Identity
from tests.fix_db import wait_until

T = TypeVar("T")
HEAD = (LOWEST, datetime(1970, 1, 1, tzinfo=UTC))
DONE = Payload("json", b'"ok"')


def new(**options: Any) -> NewInstance:
    """A row to insert, of a task that does not exist."""
    return NewInstance(**{"machine": "task", "state": Payload("json", b"{}"), **options})


def done(claimed: Claimed, **options: Any) -> Commit:
    """The outcome of a claimed row: done unless told."""
    return Commit(**{"claimed": claimed, "status": "done", "result": DONE, **options})


class Session:
    """One connection with a worker's settings."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.sql = Statements(schema)
        self.connection = connect(dsn, "test", pinned=True)

    @property
    def pid(self) -> int:
        """Of its server process."""
        return self.connection.info.backend_pid

    def run(self, operation: Operation[T]) -> T:
        """Each statement by itself, or in the transaction that is open."""
        return run(self.connection, self.sql, operation)

    def atomically(self, operation: Operation[T]) -> T:
        """All statements in one transaction."""
        return run_atomically(self.connection, self.sql, operation)

    def fetch(self, query: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of a query in which {schema} stands for the schema."""
        cursor = psycopg.Cursor(self.connection, row_factory=dict_row)
        cursor.execute(self.sql.render(query).encode(), parameters)
        return cursor.fetchall() if cursor.description is not None else []

    def claim(
        self, worker: int, limit: int = 100, queue: str = "default", unknown: Sequence[str] = ()
    ) -> list[Claimed]:
        """Claim from the head."""
        return self.run(claims.claim(worker, queue, limit, HEAD, HIGHEST, unknown))

    def claim_limited(self, worker: int, limit: int = 100, slots: int = 1, **demand: Any) -> Admitted:
        """Claim limited rows, in one transaction (or the one that is open)."""
        demand = {"queue": "default", "alone": True, **demand}
        return self.atomically(claim_limited(Demand(worker, limit=limit, slots=slots, **demand)))

    def flush(self, worker: int, *commits: Commit) -> set[int]:
        """Commit outcomes, as a worker does."""
        return claims.flush(self.connection, self.sql, worker, commits).committed

    def release(self, worker: int, *claimed: Claimed, reason: str | None = None) -> dict[str, int]:
        """Give claims back."""
        return self.atomically(claims.release(worker, [(row.id, row.token) for row in claimed], reason))

    def cancel(self, instance_id: int, reason: str = "enough") -> bool:
        """Cancel an instance; return whether there was anything to cancel."""
        return self.atomically(instances.cancel(instance_id, reason)).found


class Rows(Session):
    """The test's main session, with short cuts; `other()` opens more."""

    def __init__(self, dsn: str, schema: str) -> None:
        super().__init__(dsn, schema)
        self.dsn, self.schema = dsn, schema
        self._others: list[Session] = []
        self._threads = ThreadPoolExecutor(8)

    def other(self) -> Session:
        """Another session, closed when the test ends."""
        self._others.append(Session(self.dsn, self.schema))
        return self._others[-1]

    def insert(self, count: int = 1, **options: Any) -> list[int]:
        """Insert equal rows; return their ids."""
        ids = self.atomically(instances.insert_many([new(**options) for _ in range(count)]))
        assert None not in ids
        return [instance_id for instance_id in ids if instance_id is not None]

    def worker(self, ttl: float = 600.0, kind: str = "worker") -> int:
        """A lease; a negative `ttl` is one that has run out."""
        return self.run(workers.register(Identity(kind, "test", "host", "boot", 1, 1, "start", "default"), ttl))

    def claimed(self, worker: int, count: int = 1, **options: Any) -> list[Claimed]:
        """Insert rows and claim them."""
        ids = self.insert(count, **options)
        rows = self.claim(worker, count, options.get("queue", "default"))
        assert [row.id for row in rows] == ids
        return rows

    def live(self, instance_id: int) -> dict[str, Any] | None:
        """The row in the live table."""
        return next(iter(self.fetch("SELECT * FROM {schema}.instances WHERE id = %s", [instance_id])), None)

    def history(self, instance_id: int) -> dict[str, Any] | None:
        """The row in the history."""
        return next(iter(self.fetch("SELECT * FROM {schema}.history WHERE id = %s", [instance_id])), None)

    def status(self, instance_id: int) -> str | None:
        """Where it stands, live or finished; in both places at once is an error."""
        found = [row for row in (self.live(instance_id), self.history(instance_id)) if row]
        assert len(found) < 2, "an instance is in one place"
        return found[0]["status"] if found else None

    def bury(self, worker: int) -> None:
        """End a lease."""
        self.run(workers.bury([worker]))

    def reclaim(
        self, worker: int, entered: Sequence[tuple[int, int]] | None = None, most: int = 3
    ) -> workers.Reclaimed:
        """Take back what a worker holds."""
        return self.atomically(workers.reclaim(worker, entered, most, "it died"))

    def background(self, action: Callable[[], T]) -> Future[T]:
        """Run something that may block in a thread."""
        return self._threads.submit(action)

    def is_blocked(self, session: Session) -> bool:
        """Whether a session's statement waits for another's lock."""
        (row,) = self.fetch("SELECT cardinality(pg_blocking_pids(%s)) > 0 AS blocked", [session.pid])
        return bool(row["blocked"])

    def wait_blocked(self, session: Session, future: Future[Any]) -> None:
        """Wait until a session waits for a lock; fail if it went through."""
        wait_until(lambda: future.done() or self.is_blocked(session), what="a wait for a lock")
        assert not future.done(), f"it did not wait: {future.result()!r}"

    def lose(self, session: Session) -> None:
        """End a session as a death does; return when its server process has undone what was open."""
        pid = session.pid
        session.connection.close()
        query = "SELECT FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: self.connection.execute(query, [pid]).rowcount == 0, what="the end of its server process")

    def close(self) -> None:
        """Close every session; whatever still waits for a lock gets it."""
        for session in [*self._others, self]:
            if not self._waits(session):
                session.connection.close()
        self._threads.shutdown(wait=True)
        for session in self._others:
            session.connection.close()

    def _waits(self, session: Session) -> bool:
        return session.connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    """A migrated schema, and a worker's session on it."""
    rows = Rows(database, schema)
    yield rows
    rows.close()


@pytest.fixture(scope="session")
def shared_schema(database: str) -> str:
    """A migrated schema for every test of this process that does not change it; dropped with its database."""
    with psycopg.connect(database, autocommit=True) as connection:
        migrations.migrate(connection, "t_shared")
    return "t_shared"


@pytest.fixture
def schema(database: str, shared_schema: str) -> Iterator[str]:
    """The shared schema, emptied afterwards: a tenth of the time that making and dropping one takes.

    For folders whose tests leave tables as they are; `tests.fix_db.schema` is for the others.
    """
    yield shared_schema
    with psycopg.connect(database, autocommit=True, options="-c lock_timeout=10s") as connection:
        for table in (
            "instances",
            "history",
            "workers",
            "schedules",
            "limits",
            "gates",
            "buckets",
            "queues",
            "signals",
            "cascades",
        ):
            connection.execute(f"DELETE FROM {shared_schema}.{table}")
        connection.execute(f"UPDATE {shared_schema}.duties SET ran_at = '-infinity'")
