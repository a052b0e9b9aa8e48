"""A producer process's connections: one lazy pool per process for sync calls, one per event loop for async ones.

Safe across fork: a child forgets the pools it inherited (without closing them, the sockets are the parent's) and
opens its own at first use, so that an app imported before gunicorn forks just works.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import psycopg_pool

from durable.errors import DatabaseUnavailableError
from durable.storage import arrays
from durable.storage.loop_pool import LoopPool, readable
from durable.storage.session import (
    PINNED_PATH,
    SHORTEST_TIMEOUT,
    AsyncConnection,
    Connection,
    connection_defaults,
    translated,
    unavailable,
)

OWN_POOL = "durable"
"""Name of a producer's pool."""

_pools: weakref.WeakSet[ProducerPool] = weakref.WeakSet()
_inherited: list[Any] = []  # kept for ever: closing or collecting them would speak on the parent's sockets


class ProducerPool:
    """Connections for producers, opened when first needed.

    dsn   called for each new connection (and so may restart an embedded server)
    size  most connections per process, and per event loop
    """

    def __init__(
        self, dsn: Callable[[], str], schema: str, name: str, size: int, timeout: float, *, pooler: bool = False
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._size = size
        self._timeout = timeout
        self._pooler = pooler
        self._kwargs = {
            "application_name": f"durable {name}"[:60],
            **connection_defaults(timeout, pooler=pooler),
        }
        self._lock = threading.Lock()
        self._sync: psycopg_pool.ConnectionPool[Connection] | None = None
        self._async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopPool] = weakref.WeakKeyDictionary()
        self._turn = threading.RLock()
        self.borrowed: Connection | None = None
        """Somebody's connection in an open transaction, lent instead of ours: see `borrowing`."""
        _pools.add(self)

    @contextmanager
    def connection(self, own: bool = False) -> Iterator[Connection]:
        """Lend an autocommit connection, or the borrowed one unless it must be our own.

        Raises DatabaseUnavailableError when none is to be had in time.
        """
        if self.borrowed is not None and not own:
            with self._turn, translated(self._schema):
                yield self.borrowed
            return
        pool = self._sync or self._open()
        with translated(self._schema):
            try:
                connection = pool.getconn(timeout=self._timeout)
            except psycopg_pool.PoolTimeout as error:
                raise self._unavailable() from error
            try:
                yield connection
            finally:
                pool.putconn(connection)

    @contextmanager
    def borrowing(self, connection: Connection) -> Iterator[None]:
        """Lend this one connection to everybody, one at a time, until the block ends: a test's transaction."""
        before, self.borrowed = self.borrowed, connection
        try:
            yield
        finally:
            self.borrowed = before

    @asynccontextmanager
    async def aconnection(self) -> AsyncIterator[AsyncConnection]:
        """Lend an async connection of this event loop's pool; as `connection`."""
        pool = self._aopen()
        with translated(self._schema):
            try:
                connection = await pool.take(self._timeout)
            except TimeoutError as error:
                raise (await asyncio.to_thread(self._unavailable)) from error
            try:
                yield connection
            finally:
                pool.give_back(connection)

    def _unavailable(self) -> DatabaseUnavailableError:
        """Ask the database why, once: a pool's timeout does not say it."""
        try:
            # Soon, whatever the answer: the caller has waited for as long as it wanted to.
            psycopg.connect(self._dsn(), **{**self._kwargs, "connect_timeout": SHORTEST_TIMEOUT}).close()
        except psycopg.Error as error:
            return unavailable(error)
        return DatabaseUnavailableError(
            f"all are lent: no connection came free within connect_timeout = {self._timeout:g} s; "
            f"pool_size = {self._size}: raise it, or call again"
        )

    def _open(self) -> psycopg_pool.ConnectionPool[Connection]:
        with self._lock:
            if self._sync is None:
                self._sync = psycopg_pool.ConnectionPool(
                    self._dsn,
                    kwargs=self._kwargs,
                    # With 1 the first call opens a second beside it, and calls take turns on two cold sessions.
                    min_size=0,
                    max_size=self._size,
                    configure=self._configure,
                    check=_check,
                    reconnect_timeout=self._timeout,
                    name=OWN_POOL,
                    open=True,
                )
            return self._sync

    def _configure(self, connection: Connection) -> None:
        arrays.register(connection.adapters)
        if not self._pooler:
            connection.execute(PINNED_PATH)

    def _aopen(self) -> LoopPool:
        loop = asyncio.get_running_loop()
        with self._lock:
            pool = self._async.get(loop)
            if pool is None:
                for ended in [other for other in self._async if other.is_closed()]:
                    self._async.pop(ended).close()
                pool = self._async[loop] = LoopPool(self._aconnect, self._size)
            return pool

    async def _aconnect(self) -> AsyncConnection:
        dsn = await asyncio.to_thread(self._dsn)
        connection = await psycopg.AsyncConnection.connect(dsn, **self._kwargs)
        arrays.register(connection.adapters)
        if not self._pooler:
            await connection.execute(PINNED_PATH)
        return connection

    def close(self, timeout: float = 5.0) -> None:
        """Close the sync connections of this process, and those of loops that have ended; it can be used again.

        timeout  seconds to wait for the pool's threads
        """
        with self._lock:
            if self._sync is not None:
                self._sync.close(timeout)
                self._sync = None
            for loop in [loop for loop in self._async if loop.is_closed()]:
                self._async.pop(loop).close()

    async def aclose(self) -> None:
        """Close this event loop's connections."""
        pool = self._async.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            pool.close()

    def forget(self) -> None:
        """In a forked child: start afresh, and never touch the parent's connections."""
        _inherited.append((self._sync, self._async))
        self._lock = threading.Lock()
        self._turn = threading.RLock()
        self._sync = None
        self._async = weakref.WeakKeyDictionary()
        self.borrowed = None


def _check(connection: Connection) -> None:
    """Raise OperationalError for a connection that died while idle."""
    if readable(connection):
        connection.execute("SELECT 1", prepare=False)


def _forget_all() -> None:
    for pool in list(_pools):
        pool.forget()


def _close_all() -> None:
    # Threads still run now. Later, from Python 3.13 on, a pool waits 20 seconds for its own in vain.
    for pool in list(_pools):
        pool.close(timeout=0.5)


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)
