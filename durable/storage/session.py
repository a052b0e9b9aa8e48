"""Running storage operations on a connection, sync or async, and turning Postgres' errors into ours.

An operation is a generator that yields `(statement name, parameters)` and is sent the rows; a COPY's parameters are
`Copied`. It never opens or commits a transaction: `run` executes each statement as the connection stands
(autocommit, or inside the caller's transaction), `run_atomically` puts one around it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import errors as pg_errors
from psycopg.rows import tuple_row

from durable.errors import CallTimeoutError, DatabaseUnavailableError, DurableError, SchemaError, ValidationError
from durable.sql import Statements
from durable.storage import arrays
from durable.storage.bounded import AsyncBoundedConnection, BoundedConnection, NoAnswerError, open_bounded
from durable.storage.opened import opened

UNDONE = (pg_errors.DeadlockDetected, pg_errors.SerializationFailure)
"""Errors that say that a transaction was rolled back in favour of another one: it may be repeated as it was."""
ATTEMPTS = 10
"""How often an operation on a connection of ours is tried that meets such an error."""

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

PATIENCE = 30.0
"""Seconds that a wait for the server may take where nobody says otherwise; the default of `call_timeout`."""
SERVER_GRACE = 1.0
"""Seconds after which the server ends by itself what the client has given up on."""
LONGEST_SERVER_TIMEOUT = 2_147_483
"""Seconds; Postgres counts its timeouts in milliseconds, in 31 bits."""
_PIN_ATTEMPTS = 20

CONNECTION_LOST = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
)

SHORTEST_TIMEOUT = 2
"""Seconds; libpq takes one second for two."""


class _Meaning(NamedTuple):
    """What a SQLSTATE means for a caller, and what helps."""

    says: str
    remedy: str


_AGAIN = "nothing was written: call again"
_UNKNOWN = "what the call wrote may be there: repeat it under its correlation_key or dedup_key"
_LONGER = "call again, or raise the role's"
_ENDED = _Meaning("the server ended the session", _UNKNOWN)
_POOLED = _Meaning("a prepared statement did not hold", "the DSN leads through a transaction pooler; set pooler=True")
_MEANINGS = {
    "40001": _Meaning("other transactions were in the way", _AGAIN),
    "40P01": _Meaning("other transactions were in the way", _AGAIN),
    "55P03": _Meaning("another session holds a lock", f"{_AGAIN}; `durable doctor` names sessions that hold locks"),
    "57014": _Meaning(
        "the server ended the call",
        f"{_AGAIN}, or raise call_timeout; for a call with connection= raise the role's statement_timeout",
    ),
    "25P03": _Meaning("the database ended the call", f"{_LONGER} idle_in_transaction_session_timeout"),
    "25P04": _Meaning("the database ended the call", f"{_LONGER} transaction_timeout"),
    "57P05": _Meaning("the database ended the call", f"{_LONGER} idle_session_timeout"),
    "42501": _Meaning(
        "the database role may not do this", "`durable migrate --grant` gives a role what a producer or worker needs"
    ),
    "25006": _Meaning("the database is read-only (a standby?)", "point the DSN at the primary"),
    "53100": _Meaning("the server's disk is full", f"{_AGAIN} when it has room"),
    "53200": _Meaning("the server has no memory left", f"{_AGAIN} later"),
    "53300": _Meaning("the server has no connection left", f"{_AGAIN} later; raise max_connections"),
    "53400": _Meaning("a limit of the server's configuration is reached", f"{_AGAIN} when it is raised"),
    "57P01": _ENDED,
    "57P02": _ENDED,
    "57P03": _Meaning("the server is not ready", f"{_AGAIN} when it is"),
    "57P04": _Meaning("the database was dropped", "point the DSN at one that exists"),
    "26000": _POOLED,
    "42P05": _POOLED,
}
"""SQLSTATE -> meaning, where it becomes a DatabaseUnavailableError. docs/operations.md has this table, too."""
_MISSING = ("42P01", "3F000", "42703", "42883")
TEXT_REFUSED = ("22021", "22P05")
"""SQLSTATEs of text that the encoding of the database lacks."""


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
        if seconds := local_lock_timeout(connection):
            connection.execute(f"SET LOCAL lock_timeout = {round(1000 * seconds)}")
        return run(connection, sql, operation)


def local_lock_timeout(connection: Connection) -> float:
    """Return the lock_timeout that each transaction of a connection has to set for itself, in seconds; 0 for none."""
    return connection.lock_timeout if isinstance(connection, BoundedConnection) else 0.0


def run_repeatedly(connection: Connection, sql: Statements, operation_of: Callable[[], Operation[T]]) -> T:
    """`run_atomically` for the operation that `operation_of` makes; repeated when a deadlock has undone it."""
    for attempt in range(1, ATTEMPTS):
        try:
            return run_atomically(connection, sql, operation_of())
        except UNDONE:
            time.sleep(pause_before_repeat(attempt))
    return run_atomically(connection, sql, operation_of())


def pause_before_repeat(attempt: int) -> float:
    """Return seconds to wait after a failed attempt, from 1: at random, so that two do not meet again."""
    return random.uniform(0.0, 0.01 * 2 ** min(attempt, 6))  # noqa: S311 - spread, not secrecy


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
    dsn: str,
    application_name: str,
    *,
    pinned: bool = False,
    pooler: bool = False,
    timeout: float = 10.0,
    patience: float = PATIENCE,
    lock_timeout: float = 0.0,
    deadline: float = math.inf,
) -> BoundedConnection:
    """Open an autocommit connection for a process of ours.

    Args:
        dsn: Where to connect.
        application_name: The session's name in `pg_stat_activity`.
        pinned: Whether the session runs the hot statements; see PINNED_PLANS.
        pooler: Whether a transaction pooler is on the way. Then the session gets no settings and no prepared
            statements, because the next transaction may run in another session; `run_atomically` sets lock_timeout in
            each transaction.
        timeout: Seconds to wait for each host of the DSN.
        patience: Seconds that each wait for the server may take, connecting included.
        lock_timeout: Seconds that a statement waits for a lock; 0 for as long as the statement may take.
        deadline: `time.monotonic()` by which every wait must end, connecting included.

    Raises:
        psycopg.OperationalError: The database can't be reached.
    """
    connection = open_bounded(
        BoundedConnection,
        dsn,
        min(deadline, time.monotonic() + max(patience, timeout)),
        application_name=application_name[:60],
        **connection_defaults(timeout, pooler=pooler),
    )
    connection.patience, connection.deadline = patience, deadline
    try:
        set_up(connection, pinned=pinned, pooler=pooler, lock_timeout=lock_timeout)
    except BaseException:
        connection.pgconn.finish()
        raise
    return connection


def set_up(
    connection: BoundedConnection, *, pinned: bool = False, pooler: bool = False, lock_timeout: float = 0.0
) -> None:
    """Give a new connection our types and our session settings, in one round trip; arguments as in `connect`."""
    arrays.register(opened(connection).adapters)
    if pooler:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.lock_timeout = lock_timeout
        return
    text = session_settings(connection.info.server_version, connection.patience, pinned, lock_timeout)
    for attempt in range(_PIN_ATTEMPTS):
        try:
            connection.execute(text)
            return
        except pg_errors.QueryCanceled:  # a role's statement_timeout of a millisecond, which `text` is about to lift
            if attempt == _PIN_ATTEMPTS - 1:
                raise


async def aset_up(connection: AsyncBoundedConnection, *, pooler: bool = False) -> None:
    """`set_up` for coroutines."""
    arrays.register(opened(connection).adapters)
    if pooler:
        await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        return
    text = session_settings(connection.info.server_version, connection.patience)
    for attempt in range(_PIN_ATTEMPTS):
        try:
            await connection.execute(text)
            return
        except pg_errors.QueryCanceled:
            if attempt == _PIN_ATTEMPTS - 1:
                raise


def session_settings(server_version: int, patience: float, pinned: bool = False, lock_timeout: float = 0.0) -> str:
    """Return what a session of ours sets when it begins, so that no default of the role or the database changes it.

    A default of `default_transaction_read_only` is left alone: operators fence a database with it.

    Args:
        server_version: As libpq says it: 150004 for 15.4.
        patience: Seconds that the client waits for an answer. The server ends a statement, and a transaction that is
            left open, a second later.
        pinned: As in `connect`.
        lock_timeout: As in `connect`.
    """
    server_timeout = round(1000 * min(patience + SERVER_GRACE, LONGEST_SERVER_TIMEOUT))
    settings = [
        f"SET statement_timeout = {server_timeout}",  # first, because a role's own may end the statements after it
        f"SET lock_timeout = {round(1000 * lock_timeout)}",
        f"SET idle_in_transaction_session_timeout = {server_timeout}",
        "SET idle_session_timeout = 0",
        *(["SET transaction_timeout = 0"] if server_version >= 170000 else []),
        "SET default_transaction_isolation = 'read committed'",
        "SET default_transaction_deferrable = off",
        "SET DateStyle = 'ISO, MDY'",
        "SET IntervalStyle = 'postgres'",
        "SET standard_conforming_strings = on",
        PINNED_PATH,
        *([PINNED_PLANS] if pinned else []),
    ]
    return "; ".join(settings)


@contextmanager
def patient(connection: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
    """Give each wait of a connection that long, for statements that take as long as there is data; see `bounded`."""
    if not isinstance(connection, BoundedConnection):
        yield
        return
    patience, deadline = connection.patience, connection.deadline
    connection.patience, connection.deadline = seconds, math.inf
    try:
        yield
    finally:
        connection.patience, connection.deadline = patience, deadline


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


def _lost(error: psycopg.Error) -> DatabaseUnavailableError:
    """Return our error for a connection that can't be had, or that ended without a word from the server."""
    text = describe(error)
    if any(part in text for part in _FULL):
        remedy = "call again later; raise max_connections, connect fewer processes, or put a pooler in front"
    elif any(part in text for part in _NOT_READY):
        remedy = "call again when it is ready"
    elif _POOLER_WAITED in text:
        remedy = "the pooler is paused or its pool too small, and nothing was written: call again"
    elif text.startswith(_CONNECTING):
        remedy = "see that it runs and that the DSN leads to it"
    elif isinstance(error, NoAnswerError):
        remedy = f"{_UNKNOWN}; if it needs longer, raise call_timeout or give the call a timeout="
    else:
        remedy = _UNKNOWN
    kind = CallTimeoutError if isinstance(error, NoAnswerError) else DatabaseUnavailableError
    return kind(f"the database can't be reached: {text}; {remedy}")


def translate(error: psycopg.Error, schema: str) -> DurableError | None:
    """Return our error for a Postgres error that has one of ours, else None. Its SQLSTATE decides."""
    state = error.sqlstate or ""
    if state in _MISSING:
        return SchemaError(
            f"schema {schema!r} of this database is missing or older than this code ({describe(error)}); "
            "run `durable migrate`"
        )
    if state in TEXT_REFUSED:
        return ValidationError(
            f"the database's encoding has no such text: {describe(error)}; nothing was written: "
            "leave it out, or use a database with ENCODING 'UTF8'"
        )
    meaning = _MEANINGS.get(state)
    if meaning is not None:
        return DatabaseUnavailableError(f"{meaning.says}: {describe(error)}; {meaning.remedy}")
    if not isinstance(error, CONNECTION_LOST):
        return None
    if not state or state.startswith("08"):
        return _lost(error)
    return DatabaseUnavailableError(
        f"the server refused the call: {describe(error)} (SQLSTATE {state}); see its log, then call again"
    )


def advise(error: psycopg.Error, schema: str) -> str:
    """Return what a process that tries on says of an error: with what to do, where waiting alone does not help."""
    ours = translate(error, schema) if error.sqlstate else None
    return describe(error) if ours is None else str(ours)


@contextmanager
def translated(schema: str, *, callers: bool = False) -> Iterator[None]:
    """Raise our errors instead of psycopg's where `translate` knows one.

    Args:
        schema: For the text of a SchemaError.
        callers: Whether the transaction is a caller's. Then its loss against another transaction is left to the
            caller's own loop of attempts, which looks for psycopg's error.
    """
    try:
        yield
    except psycopg.Error as error:
        if callers and isinstance(error, UNDONE):
            raise
        ours = translate(error, schema)
        if ours is None:
            raise
        raise ours from error
