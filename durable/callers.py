"""What a caller may give as `connection=`: psycopg's, SQLAlchemy's or Django's, turned into the driver's connection.

And who tells of the commit: a SQLAlchemy session and a Django connection have a hook that runs after it. Nothing else
has: SQLAlchemy's event "commit" of a Connection comes before the COMMIT, so that a Connection, and a Session that is
bound to one (whose commit may not be that connection's), is as good as a raw psycopg connection.

Neither library is imported here: whoever has one of its objects has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import psycopg

from durable.errors import ConnectionUsageError

C = TypeVar("C")
Action = Callable[[], None]

_PENDING = "durable: after commit"
"""Key in a session's `info`: a list of (SessionTransaction, action)."""


@dataclass(frozen=True, slots=True)
class Caller(Generic[C]):
    """A caller's connection.

    connection    the driver's, usable now; whatever runs on it belongs to the caller's transaction, if there is one
    after_commit  takes what is to run once that transaction has committed, and never if it does not; it must not raise.
                  None where nobody tells of the commit
    """

    connection: C
    after_commit: Callable[[Action], None] | None = None


def accept(given: Any) -> Caller[psycopg.Connection[Any]]:
    """Return the caller behind the `connection=` of a sync call.

    Raises ConnectionUsageError for what can't be used, psycopg.Error when it can't connect.
    """
    caller: Caller[Any] = Caller(given)
    if not isinstance(given, psycopg.Connection):
        given = _unwrapped(given, "sqlalchemy.orm", "scoped_session")
        if _is(given, "sqlalchemy.orm", "Session"):
            with _refusals("sqlalchemy.exc", "SQLAlchemyError"):
                caller = _session(given)
        elif _is(given, "sqlalchemy.engine", "Connection"):
            with _refusals("sqlalchemy.exc", "SQLAlchemyError"):
                caller = _connection(given)
        elif (wrapper := _django(given)) is not None:
            with _refusals("django.db", "Error"):
                caller = _wrapper(wrapper)
    _usable(caller.connection, psycopg.Connection, "a SQLAlchemy Connection or Session or a Django connection")
    return caller


async def aaccept(given: Any) -> Caller[psycopg.AsyncConnection[Any]]:
    """`accept` for coroutines."""
    caller: Caller[Any] = Caller(given)
    if not isinstance(given, psycopg.AsyncConnection):
        given = _unwrapped(given, "sqlalchemy.ext.asyncio", "async_scoped_session")
        if _is(given, "sqlalchemy.ext.asyncio", "AsyncSession"):
            with _refusals("sqlalchemy.exc", "SQLAlchemyError"):
                caller = await given.run_sync(_session)
        elif _is(given, "sqlalchemy.ext.asyncio", "AsyncConnection"):
            with _refusals("sqlalchemy.exc", "SQLAlchemyError"):
                caller = await given.run_sync(_connection)
        elif _django(given) is not None:
            raise ConnectionUsageError(
                "connection= is Django's, whose connections are sync: make the sync call, inside sync_to_async"
            )
    _usable(caller.connection, psycopg.AsyncConnection, "a SQLAlchemy AsyncConnection or AsyncSession")
    return caller


def _loaded(module: str, name: str) -> Any:
    """Something out of a module that somebody else has imported, or None."""
    return getattr(sys.modules.get(module), name, None)


def _is(given: Any, module: str, name: str) -> bool:
    kind = _loaded(module, name)
    return kind is not None and isinstance(given, kind)


def _unwrapped(given: Any, module: str, name: str) -> Any:
    """The session of this thread or task, for a registry of them."""
    return given() if _is(given, module, name) else given


@contextmanager
def _refusals(module: str, name: str) -> Iterator[None]:
    """Raise ours for the errors of a library; the driver's own stay as they are."""
    try:
        yield
    except _loaded(module, name) as error:
        if isinstance(error.__cause__, psycopg.Error):
            raise error.__cause__ from None
        raise ConnectionUsageError(f"connection= can't be used: {error}") from error


def _usable(connection: Any, kind: type[Any], others: str) -> None:
    if not isinstance(connection, kind):
        raise ConnectionUsageError(
            f"connection= must be a {kind.__module__}.{kind.__name__}, got {type(connection).__name__}; "
            f"{others} will do"
        )
    if connection.closed:
        raise ConnectionUsageError("connection= is closed")
    if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
        raise ConnectionUsageError("connection= is in a failed transaction; roll it back first")
    if connection.info.pipeline_status != psycopg.pq.PipelineStatus.OFF:
        raise ConnectionUsageError("connection= is in a pipeline, where no id comes back; leave the pipeline first")
    if connection.info.encoding != "utf-8":
        raise ConnectionUsageError(
            f"connection= has client_encoding {connection.info.encoding}; open it with client_encoding='utf8'"
        )


# SQLAlchemy; for coroutines these run on the sync object within, in its greenlet


def _connection(connection: Any) -> Caller[Any]:
    _speaks_psycopg(connection.dialect)
    if connection.closed:
        raise ConnectionUsageError("connection= is closed")
    transaction = connection.get_nested_transaction() or connection.get_transaction()
    if transaction is not None and not transaction.is_active:
        raise ConnectionUsageError("connection= is in a failed transaction; roll it back first")
    driver = connection.connection.driver_connection
    if transaction is None and not driver.autocommit:
        connection.begin()  # as its own first statement would; it commits only what it knows to have begun
    return Caller(driver)


def _session(session: Any) -> Caller[Any]:
    bind = session.get_bind()
    _speaks_psycopg(bind.dialect)
    caller = _connection(session.connection())
    if _is(bind, "sqlalchemy.engine", "Connection"):
        return caller
    return Caller(caller.connection, lambda action: _when_committed(session, action))


def _speaks_psycopg(dialect: Any) -> None:
    # The driver of an async engine is called psycopg_async in some places.
    if dialect.name != "postgresql" or dialect.driver not in ("psycopg", "psycopg_async"):
        raise ConnectionUsageError(
            f"connection= speaks {dialect.name}+{dialect.driver}; "
            "make its engine with create_engine('postgresql+psycopg://...') (async: create_async_engine)"
        )


def _when_committed(session: Any, action: Action) -> None:
    """Keep an action until the session's transaction ends.

    In the session's own `info`, so that an abandoned session takes all of it along. The listeners are the session's
    too, made once: one can't remove itself while it runs.
    """
    pending = session.info.get(_PENDING)
    if pending is None:
        pending = session.info[_PENDING] = []
        listen = _loaded("sqlalchemy.event", "listen")
        listen(session, "after_commit", _session_committed)
        listen(session, "after_soft_rollback", _session_rolled_back)
        listen(session, "after_transaction_end", _session_transaction_ended)
    pending.append((session.get_nested_transaction() or session.get_transaction(), action))


def _session_committed(session: Any) -> None:
    if session.in_nested_transaction():
        return  # a savepoint was released; the transaction goes on
    pending = session.info.get(_PENDING, [])
    while pending:
        pending.pop(0)[1]()


def _session_rolled_back(session: Any, ended: Any) -> None:
    """Drop what was written since a savepoint, or since the beginning, released savepoints within included."""
    pending = session.info.get(_PENDING, [])
    pending[:] = [(transaction, action) for transaction, action in pending if not _within(transaction, ended)]


def _session_transaction_ended(session: Any, ended: Any) -> None:
    """A session that is closed in its transaction says nothing but this."""
    if ended.parent is None:
        session.info.get(_PENDING, []).clear()


def _within(transaction: Any, outer: Any) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is not None


# Django


def _django(given: Any) -> Any:
    """The DatabaseWrapper, or None for what is nothing of Django's; `django.db.connection` is a proxy of one."""
    proxy = _loaded("django.db", "connection")
    if proxy is not None and given is proxy:
        return _loaded("django.db", "connections")[_loaded("django.db", "DEFAULT_DB_ALIAS")]
    return given if _is(given, "django.db.backends.base.base", "BaseDatabaseWrapper") else None


def _wrapper(wrapper: Any) -> Caller[Any]:
    remedy = "use ENGINE 'django.db.backends.postgresql' with psycopg 3"
    if wrapper.vendor != "postgresql":
        raise ConnectionUsageError(f"connection= is Django's {wrapper.alias!r}, which is {wrapper.vendor}; {remedy}")
    wrapper.validate_thread_sharing()
    wrapper.validate_no_broken_transaction()
    wrapper.ensure_connection()
    driver = wrapper.connection
    if not isinstance(driver, psycopg.Connection):
        name = type(driver).__module__.partition(".")[0]
        raise ConnectionUsageError(f"connection= is Django's {wrapper.alias!r}, whose driver is {name}; {remedy}")
    # Outside atomic() there is no transaction, or one begun by set_autocommit(False), whose hooks run only when that is
    # switched on again.
    return Caller(driver, wrapper.on_commit if wrapper.in_atomic_block and wrapper.commit_on_exit else None)
