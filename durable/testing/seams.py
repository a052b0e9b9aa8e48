"""The one place that knows an app from inside: its pool, its writer, and what of it belongs to its schema."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import psycopg

from durable.app import Durable
from durable.dsn import Database
from durable.result import Watcher
from durable.sql import Statements
from durable.storage.pool import ProducerPool
from durable.storage.session import Connection, Operation, connect, translated
from durable.writer import Write, Writer

T = TypeVar("T")
_OF_ITS_SCHEMA = ("schema", "sql", "_pool", "_writer", "wakeups", "_watchers", "embedded_schema_made")
_MADE_WHEN_NEEDED = ("_pool", "_writer", "wakeups")


def pool_of(app: Durable) -> ProducerPool:
    """Return the app's connections."""
    return app._pool


def write(app: Durable, operation: Callable[[], Operation[T]]) -> T:
    """Run a write in a transaction, as the app runs its own; it notifies nobody."""
    return app._writer.write(Write(operation, lambda _: (), lambda _: ()))


def set_writer(app: Durable, make: Callable[[ProducerPool, Statements], Writer]) -> None:
    """Replace the app's writer for good."""
    app.__dict__["_writer"] = make(app._pool, app.sql)


def pin_dsn(app: Durable, dsn: str) -> None:
    """Let the app use this DSN for good, whatever it was given."""
    app.database = Database(dsn)


@contextmanager
def watched_by(app: Durable, watcher: Watcher) -> Iterator[None]:
    """Let this process's `get` wait by `watcher` until the block ends."""
    pid = os.getpid()
    before = app._watchers.get(pid)
    app._watchers[pid] = watcher
    try:
        yield
    finally:
        del app._watchers[pid]
        if before is not None:
            app._watchers[pid] = before


@contextmanager
def elsewhere(app: Durable, schema: str) -> Iterator[None]:
    """Let the app live in another schema until the block ends."""
    before = {name: app.__dict__[name] for name in _OF_ITS_SCHEMA if name in app.__dict__}
    for name in _MADE_WHEN_NEEDED:
        app.__dict__.pop(name, None)
    app.__dict__.update(schema=schema, sql=Statements(schema), _watchers={}, embedded_schema_made=True)
    try:
        yield
    finally:
        app.close()
        for name in _MADE_WHEN_NEEDED:
            app.__dict__.pop(name, None)
        app.__dict__.update(before)


_standing: list[Connection] = []


def stand_connected(app: Durable, what: str) -> Connection:
    """Open one connection for good that `connected` lends from now on; for a process that ends with its work."""
    _standing[:] = [_connect(app, what)]
    return _standing[0]


def _connect(app: Durable, what: str) -> Connection:
    conf = app.conf
    return connect(app.dsn(), f"durable {app.name} {what}", pooler=conf.pooler, timeout=conf.connect_timeout)


@contextmanager
def connected(app: Durable, what: str, *, borrow: bool = True) -> Iterator[Connection]:
    """Lend the borrowed connection if there is one and it may be, else one of its own, closed at the end.

    Raises DatabaseUnavailableError, SchemaError, as psycopg's errors are translated.
    """
    borrowed = app._pool.borrowed
    with ExitStack() as stack:
        stack.enter_context(translated(app.schema))
        if borrow and borrowed is not None:
            yield borrowed
            return
        if _standing:
            yield _standing[0]
            return
        connection = _connect(app, what)
        stack.callback(connection.close)
        yield connection


def is_usable(connection: Any) -> bool:
    """Whether a connection can take statements: open, and not in a failed transaction."""
    return not connection.closed and connection.info.transaction_status != psycopg.pq.TransactionStatus.INERROR
