"""Running storage operations on a connection, sync or async, and turning Postgres' errors into ours.

An operation is a generator that yields `(statement name, parameters)` and is sent the rows; a COPY's parameters are
`Copied`. It never opens or commits a transaction: `run` executes each statement as the connection stands
(autocommit, or inside the caller's transaction), `run_atomically` puts one around it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg import errors as pg_errors
from psycopg.rows import tuple_row

from durable.errors import DatabaseUnavailableError, DurableError, SchemaError
from durable.sql import Statements
from durable.storage import arrays

T = TypeVar("T")
Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Copied:
    """What a COPY takes in, piece by piece: the server works on one while the next is made."""

    pieces: Iterable[bytes]


Parameters = Mapping[str, Any] | Copied
Operation = Generator[tuple[str, Parameters], list[Row], T]
Connection = psycopg.Connection[Any]
AsyncConnection = psycopg.AsyncConnection[Any]

# What a worker's own session pins. Hot statements reach rows by index only, whatever the statistics say: a generic
# plan cannot see the LIMIT or the length of an array, and a freshly filled table has no statistics at all.
PINNED_PLANS = (
    "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_bitmapscan = off; "
    "SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_sort = off; SET jit = off"
)

PINNED_PATH = "SET search_path = pg_catalog, pg_temp"
"""Every table of ours is qualified; this is for functions and operators, which a schema on the path could replace."""

CONNECTION_LOST = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
)

SHORTEST_TIMEOUT = 2
"""Seconds; libpq takes one second for two."""

_TIMEOUTS = {
    "57014": "statement_timeout",
    "55P03": "lock_timeout",
    "25P03": "idle_in_transaction_session_timeout",
    "25P04": "transaction_timeout",
    "57P05": "idle_session_timeout",
}


def execute(connection: Connection, sql: Statements, name: str, parameters: Parameters) -> list[Row]:
    """Run one named statement, prepared unless the connection leads through a pooler; return its rows, if any."""
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    if isinstance(parameters, Copied):
        return _copy_in(cursor, sql[name], parameters.pieces)
    cursor.execute(sql[name], parameters, prepare=connection.prepare_threshold is not None, binary=True)
    return cursor.fetchall() if cursor.rownumber is not None else []


def _copy_in(cursor: psycopg.Cursor[Row], text: str, pieces: Iterable[bytes]) -> list[Row]:
    with cursor.copy(text) as copy:
        for piece in pieces:
            copy.write(piece)
    return []


def run(connection: Connection, sql: Statements, operation: Operation[T], *, foreign: bool = False) -> T:
    """Drive an operation on a sync connection and return what it returns.

    foreign  the connection is the caller's: our array types are taught to the cursor, statements are not prepared
             unless that connection would
    """
    rows: list[Row] | None = None
    try:
        while True:
            name, parameters = operation.send(rows)  # type: ignore[arg-type]
            if not foreign:
                rows = execute(connection, sql, name, parameters)
                continue
            cursor = psycopg.Cursor(connection, row_factory=tuple_row)
            if isinstance(parameters, Copied):
                rows = _copy_in(cursor, sql[name], parameters.pieces)
                continue
            arrays.register(cursor.adapters)
            cursor.execute(sql[name], parameters, binary=True)
            rows = cursor.fetchall() if cursor.rownumber is not None else []
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def run_atomically(connection: Connection, sql: Statements, operation: Operation[T]) -> T:
    """Drive an operation inside one transaction of its own."""
    with connection.transaction():
        return run(connection, sql, operation)


async def arun(connection: AsyncConnection, sql: Statements, operation: Operation[T], *, foreign: bool = False) -> T:
    """Drive an operation on an async connection and return what it returns; `foreign` as in `run`."""
    rows: list[Row] | None = None
    try:
        while True:
            name, parameters = operation.send(rows)  # type: ignore[arg-type]
            cursor = psycopg.AsyncCursor(connection, row_factory=tuple_row)
            if isinstance(parameters, Copied):
                async with cursor.copy(sql[name]) as copy:
                    for piece in parameters.pieces:
                        await copy.write(piece)
                rows = []
                continue
            if foreign:
                arrays.register(cursor.adapters)
            prepare = None if foreign else connection.prepare_threshold is not None
            await cursor.execute(sql[name], parameters, prepare=prepare, binary=True)
            rows = await cursor.fetchall() if cursor.rownumber is not None else []
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def single(name: str, parameters: Mapping[str, Any] | None = None) -> Operation[list[Row]]:
    """The operation that runs one statement and returns its rows."""
    return (yield name, parameters or {})


def connect(
    dsn: str, application_name: str, *, pinned: bool = False, pooler: bool = False, timeout: float = 10.0
) -> Connection:
    """Open an autocommit connection for a long-lived process.

    pinned   for the hot statements: see PINNED_PLANS
    pooler   no session state and no prepared statements: they would belong to somebody else's transaction next time
    timeout  seconds to wait for the connection
    Raises psycopg.OperationalError.
    """
    connection = psycopg.connect(
        dsn, application_name=application_name[:60], **connection_defaults(timeout, pooler=pooler)
    )
    arrays.register(connection.adapters)
    if not pooler:
        connection.execute(f"{PINNED_PATH}; {PINNED_PLANS}" if pinned else PINNED_PATH)
    return connection


def connection_defaults(timeout: float, *, pooler: bool = False) -> dict[str, Any]:
    """Keyword arguments for every connection: a silently dead peer is noticed within about half a minute."""
    return {
        "autocommit": True,
        "client_encoding": "utf8",  # whatever the database's: the arrays are written in it
        "prepare_threshold": None if pooler else 5,
        "connect_timeout": max(SHORTEST_TIMEOUT, round(timeout)),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20000,
    }


def describe(error: BaseException) -> str:
    """Return a database error's first line, without whatever libpq says of the connection string."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


# What a server, or a pooler, says that is there and lets nobody in. libpq gives no SQLSTATE for a connection that was
# refused, so that a server that speaks another language is not recognized.
_FULL = (
    "too many clients",
    "remaining connection slots are reserved",
    "too many connections for",
    "no more connections allowed",
)
_NOT_READY = ("is starting up", "is shutting down", "in recovery mode", "accepting connections")
_POOLER_WAITED = "query_wait_timeout"
_CONNECTING = ("connection failed", "connection is bad", "connection timeout")


def admits_nobody(error: BaseException) -> bool:
    """Whether an error says that the server is there and lets nobody in at the moment: full, or not ready."""
    return any(part in str(error) for part in (*_FULL, *_NOT_READY))


def unavailable(error: psycopg.Error) -> DatabaseUnavailableError:
    """Return our error for a connection that can't be had, or was lost."""
    text = describe(error)
    if any(part in text for part in _FULL):
        remedy = "call again later; raise max_connections, connect fewer processes, or put a pooler in front"
    elif any(part in text for part in _NOT_READY):
        remedy = "call again when it is ready"
    elif _POOLER_WAITED in text:
        remedy = "the pooler is paused or its pool too small, and nothing was written: call again"
    elif text.startswith(_CONNECTING):
        remedy = "see that it runs and that the DSN leads to it"
    else:
        remedy = "what the call wrote may be there: repeat it under its correlation_key or dedup_key"
    return DatabaseUnavailableError(f"the database can't be reached: {text}; {remedy}")


def translate(error: psycopg.Error, schema: str) -> DurableError | None:
    """Return our error for a Postgres error that has one of ours, else None."""
    if isinstance(error, pg_errors.UndefinedTable | pg_errors.InvalidSchemaName | pg_errors.UndefinedColumn):
        return SchemaError(
            f"schema {schema!r} of this database is missing or older than this code ({describe(error)}); "
            "run `durable migrate`"
        )
    if isinstance(error, pg_errors.InsufficientPrivilege):
        return DatabaseUnavailableError(f"the database role may not do this: {describe(error)}")
    if isinstance(error, pg_errors.ReadOnlySqlTransaction):
        return DatabaseUnavailableError("the database is read-only (a standby?); point the DSN at the primary")
    if isinstance(error, pg_errors.InvalidSqlStatementName | pg_errors.DuplicatePreparedStatement):
        return DatabaseUnavailableError(
            f"a prepared statement did not hold ({describe(error)}): the DSN leads through a transaction pooler; "
            "set pooler=True"
        )
    setting = _TIMEOUTS.get(error.sqlstate or "")
    if setting is not None:
        return DatabaseUnavailableError(
            f"the database ended the call: {describe(error)}; call again, or raise the role's {setting}"
        )
    return unavailable(error) if isinstance(error, CONNECTION_LOST) else None


def advise(error: psycopg.Error, schema: str) -> str:
    """Return what a process that tries on says of an error: with what to do, where waiting alone does not help."""
    ours = None if isinstance(error, CONNECTION_LOST) else translate(error, schema)
    return describe(error) if ours is None else str(ours)


@contextmanager
def translated(schema: str) -> Iterator[None]:
    """Raise our errors instead of psycopg's where `translate` knows one."""
    try:
        yield
    except psycopg.Error as error:
        ours = translate(error, schema)
        if ours is None:
            raise
        raise ours from error
