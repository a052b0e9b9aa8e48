"""transaction: everything an app does in this process, in one transaction that is rolled back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from durable.app import Durable
from durable.callers import accept
from durable.errors import NotFoundError, ResultTimeout, SchemaError
from durable.instance import TERMINAL, Snapshot
from durable.result import Watcher
from durable.storage import arrays, migrations, partitions, testing
from durable.storage.session import Connection, run
from durable.testing import seams

_OTHERWISE = "transaction() runs everything on one sync connection, in async tests too"


class _AtOnce(Watcher):
    """Answers a wait at once: what is in a transaction nobody else can see, so nobody else will finish it."""

    def __init__(self, app: Durable) -> None:
        super().__init__(lambda ids: [], app.fetch, lambda: None)
        self._fetch = app.fetch

    def wait_for(self, instance_id: int) -> Future[Snapshot]:
        future: Future[Snapshot] = Future()
        snapshot = self._fetch(instance_id)
        if snapshot is None:
            future.set_exception(NotFoundError(f"there is no instance {instance_id}"))
        elif snapshot.status in TERMINAL:
            future.set_result(snapshot)
        else:
            future.set_exception(
                ResultTimeout(
                    f"instance {instance_id} is {snapshot.status}, and nobody else can finish it: it is in this "
                    "test's transaction. Call durable.testing.drain(app) first"
                )
            )
        return future


@contextmanager
def transaction(app: Durable, connection: Any = None) -> Iterator[Connection]:
    """Run every call of the app in this process on one connection, in a transaction that is rolled back at the end.

    That holds for the producer's calls, results, `drain`, the assertions, `fire_timeouts` and `travel`; what is atomic
    by itself becomes a savepoint. Workers and other processes see nothing of it, and `get` does not wait: it raises
    ResultTimeout at once for what is not finished. `ctx.connection` is that connection too, but not in async steps.
    Yields the psycopg Connection, for statements of your own.

    connection  your own, whose test transaction is open: psycopg's, SQLAlchemy's (or its session) or Django's, as for
                `connection=` everywhere; None: a new one to the app's database
    Raises ConnectionUsageError for a connection that can't be used; SchemaError when the schema, or the history's
    partition for today, is not there yet: `app.migrate()` makes both.
    """
    pool = seams.pool_of(app)
    if connection is None:
        with seams.connected(app, "test") as own:
            if pool.borrowed is None:
                migrations.check(own, app.schema)
                partitions.ensure(own, app.sql)
                if not app.conf.pooler:
                    own.execute("RESET search_path")  # the caller's statements run here, and those of steps
            with own.transaction(force_rollback=True), pool.borrowing(own), seams.watched_by(app, _AtOnce(app)):
                yield own
        return
    theirs = accept(connection, _OTHERWISE).connection
    arrays.register(theirs.adapters)
    with theirs.transaction(force_rollback=True):
        migrations.check(theirs, app.schema)
        if not run(theirs, app.sql, testing.history_ready()):
            raise SchemaError(
                f"the history of schema {app.schema!r} has no partition for today, and a test's transaction is no "
                "place to make one; run `app.migrate()` before it"
            )
        with pool.borrowing(theirs), seams.watched_by(app, _AtOnce(app)):
            yield theirs
