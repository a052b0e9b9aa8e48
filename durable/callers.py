"""What a caller may give as `connection=`: psycopg's, SQLAlchemy's or Django's, turned into the driver's connection.

It also says how workers learn of the commit. A SQLAlchemy session and a Django connection have a hook that runs after
it, and the runtime sends what a step's own connection owes. Nothing else has one: SQLAlchemy's event "commit" of a
Connection comes before the COMMIT, so that a Connection, and a Session that is bound to one (whose commit may not be
that connection's), is treated as a raw psycopg connection.

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
from durable.storage.step_connection import AsyncStepConnection, StepConnection, Wakeups

C = TypeVar("C")
Action = Callable[[], None]

_ASYNC_TWIN = "await the async twin of this call (aapply_async, ainsert, asignal)"
_SYNC_TWIN = "make the sync call (apply_async, insert, signal)"
_OTHER_DRIVERS = {"aiopg", "asyncpg", "MySQLdb", "pg8000", "psycopg2", "pymysql", "sqlite3", "aiosqlite"}

_PENDING = "durable: after commit"
"""Key in a session's `info`: a list of (SessionTransaction, action)."""


@dataclass(frozen=True, slots=True)
class Caller(Generic[C]):
    """A caller's connection.

    connection    the driver's, usable now; whatever runs on it belongs to the caller's transaction, if there is one
    after_commit  takes what is to run once that transaction has committed, and never if it does not; it must not raise.
                  None where nobody tells of the commit
    may_notify    whether its transaction may carry a NOTIFY: Postgres prepares none that does (two-phase commit)
    notify_later  takes the notifications that are to be sent on the same connection once it has committed
    """

    connection: C
    after_commit: Callable[[Action], None] | None = None
    may_notify: bool = True
    notify_later: Callable[[Wakeups], None] | None = None


def accept(given: Any, otherwise: str = _ASYNC_TWIN) -> Caller[psycopg.Connection[Any]]:
    """Return the caller behind the `connection=` of a sync call.

    Args:
        given: What the caller gave.
        otherwise: What to do instead with a connection for coroutines.

    Raises:
        ConnectionUsageError: It can't be used; the message says what it is and what to give instead.
        psycopg.Error: It is lazy, and can't connect.
    """
    caller: Caller[Any] = _raw(given)
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
    if not isinstance(caller.connection, psycopg.Connection):
        raise ConnectionUsageError(
            _refusal(given, caller.connection, "psycopg Connection, SQLAlchemy Connection or Session", otherwise)
        )
    _usable(caller.connection)
    return caller


async def aaccept(given: Any) -> Caller[psycopg.AsyncConnection[Any]]:
    """`accept` for coroutines."""
    caller: Caller[Any] = _raw(given)
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
    if not isinstance(caller.connection, psycopg.AsyncConnection):
        raise ConnectionUsageError(
            _refusal(given, given, "psycopg AsyncConnection, SQLAlchemy AsyncConnection or AsyncSession", _SYNC_TWIN)
        )
    _usable(caller.connection)
    return caller


def _raw(given: Any) -> Caller[Any]:
    """Return the caller of a value that nothing stands around."""
    if isinstance(given, StepConnection | AsyncStepConnection):
        return Caller(given, notify_later=given.wakeups.append)
    return Caller(given, may_notify=_two_phase(given) is None)


def _two_phase(connection: Any) -> tuple[Any, bool] | None:
    """Return what psycopg keeps of `tpc_begin`: the transaction's id, and whether it is prepared."""
    if not isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        return None
    return getattr(connection, "_tpc", None)


def _refusal(given: Any, driver: Any, wanted: str, otherwise: str) -> str:
    """Say what a value is that is no connection for this call, and what to give instead.

    Args:
        given: The value.
        driver: The driver's connection that it leads to, or the value itself.
        wanted: What the call takes.
        otherwise: Which call takes a connection of the other kind, sync or for coroutines.
    """
    kind = type(given)
    name, package = kind.__name__, kind.__module__.partition(".")[0]
    if isinstance(given, str):
        configured = getattr(_loaded("django.conf", "settings"), "configured", False)
        if configured and given in (_loaded("django.db", "connections") or ()):
            return f"connection= is a name; give Django's connection itself: django.db.connections[{given!r}]"
        return f"connection= is a str; a DSN must be opened first (psycopg.connect): give a {wanted}"
    if name == "Context" and package == "durable":
        return "connection= is the step's Context: give ctx.connection"
    if "cursor" in name.lower():
        return f"connection= is a cursor ({package}'s {name}): give the connection that it belongs to"
    if "engine" in name.lower() or "sessionmaker" in name.lower():
        article = "an" if name[0] in "AEIOUaeiou" else "a"
        return (
            f"connection= is {article} {name}, which has no transaction: give a connection or session of it; {wanted}"
        )
    if "pool" in name.lower() and "proxy" not in name.lower() and package != "asyncpg":
        return (
            f"connection= is a pool ({package}'s {name}), which has no transaction: give a connection of it; {wanted}"
        )
    if package in _OTHER_DRIVERS:
        return (
            f"connection= is {package}'s {name}, and a transaction belongs to one driver: durable speaks psycopg 3; "
            f"run the transaction on a {wanted}"
        )
    if driver is not given:  # a sync object of SQLAlchemy inside run_sync
        name = f"{name} of an async engine"
    if isinstance(given, psycopg.Connection | psycopg.AsyncConnection) or package == "sqlalchemy":
        return f"connection= is {package}'s {name}: {otherwise}; this call takes a {wanted}"
    return f"connection= must be a {wanted}, got {name}"


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


def _usable(connection: Any) -> None:
    if connection.closed:
        raise ConnectionUsageError("connection= is closed")
    if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
        raise ConnectionUsageError("connection= is in a failed transaction; roll it back first")
    if (_two_phase(connection) or (None, False))[1]:
        raise ConnectionUsageError("connection= is in a prepared transaction, which takes no statement; call before it")
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
    return Caller(driver, may_notify=not _is(connection.get_transaction(), "sqlalchemy.engine", "TwoPhaseTransaction"))


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
