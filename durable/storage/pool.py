"""A producer process's connections: one lazy pool per process for sync calls, one per event loop for async ones.

Safe across fork: a child forgets the pools it inherited (without closing them, the sockets are the parent's) and
opens its own at first use, so that an app imported before gunicorn forks just works.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from durable.errors import DatabaseUnavailableError
from durable.storage.bounded import AsyncBoundedConnection, BoundedConnection, open_bounded
from durable.storage.lending import NoneFreeError
from durable.storage.loop_pool import LoopPool
from durable.storage.session import (
    PATIENCE,
    AsyncConnection,
    Connection,
    aset_up,
    connection_defaults,
    set_up,
    translated,
)
from durable.storage.thread_pool import ThreadPool

_pools: weakref.WeakSet[ProducerPool] = weakref.WeakSet()
_inherited: list[Any] = []  # kept for ever: closing or collecting them would speak on the parent's sockets


class ProducerPool:
    """Connections for producers, opened when first needed.

    Args:
        dsn: Called for each new connection (and so may restart an embedded server).
        schema: For the text of errors.
        name: Of the app, for `application_name`.
        size: The most connections per process, and per event loop.
        timeout: Seconds that a call waits for a connection, and for each host that it connects to.
        call_timeout: Seconds that a call may take in all, unless it says otherwise.
        pooler: Whether the DSN leads through a transaction pooler.
    """

    def __init__(
        self,
        dsn: Callable[[], str],
        schema: str,
        name: str,
        size: int,
        timeout: float,
        call_timeout: float = PATIENCE,
        *,
        pooler: bool = False,
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._size = size
        self._timeout = timeout
        self._call_timeout = call_timeout
        self._pooler = pooler
        self._kwargs = {
            "application_name": f"durable {name}"[:60],
            **connection_defaults(timeout, pooler=pooler),
        }
        self._lock = threading.Lock()
        self._sync: ThreadPool | None = None
        self._async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopPool] = weakref.WeakKeyDictionary()
        self._turn = threading.RLock()
        self.borrowed: Connection | None = None
        """Somebody's connection in an open transaction, lent instead of ours: see `borrowing`."""
        _pools.add(self)

    @contextmanager
    def connection(self, own: bool = False, timeout: float | None = None) -> Iterator[Connection]:
        """Lend an autocommit connection, or the borrowed one unless it must be our own.

        Args:
            own: Whether it must be a connection of ours.
            timeout: Seconds until every wait on it ends; the app's `call_timeout` unless given.

        Raises:
            DatabaseUnavailableError: There is no connection in time, or it fails while it is lent.
        """
        if self.borrowed is not None and not own:
            with self._turn, translated(self._schema):
                yield self.borrowed
            return
        pool = self._sync or self._open()
        now = time.monotonic()
        deadline = now + (timeout or self._call_timeout)
        with translated(self._schema):
            try:
                connection = pool.take(min(now + self._timeout, deadline), deadline)
            except NoneFreeError:
                raise self._none_free(timeout) from None
            try:
                yield connection
            finally:
                pool.give_back(connection)

    @contextmanager
    def borrowing(self, connection: Connection) -> Iterator[None]:
        """Lend this one connection to everybody, one at a time, until the block ends: a test's transaction."""
        before, self.borrowed = self.borrowed, connection
        try:
            yield
        finally:
            self.borrowed = before

    @asynccontextmanager
    async def aconnection(self, timeout: float | None = None) -> AsyncIterator[AsyncConnection]:
        """Lend an async connection of this event loop's pool; as `connection`."""
        pool = self._aopen()
        now = time.monotonic()
        deadline = now + (timeout or self._call_timeout)
        with translated(self._schema):
            try:
                connection = await pool.take(min(now + self._timeout, deadline), deadline)
            except NoneFreeError:
                raise self._none_free(timeout) from None
            try:
                yield connection
            finally:
                pool.give_back(connection)

    def _none_free(self, timeout: float | None) -> DatabaseUnavailableError:
        in_time = f"connect_timeout = {self._timeout:g} s"
        if (timeout or self._call_timeout) < self._timeout:
            in_time = f"the call's {timeout or self._call_timeout:g} s"
        return DatabaseUnavailableError(
            f"all connections of this process are lent: none came free within {in_time}; "
            f"pool_size = {self._size}: raise it, or call again"
        )

    def _open(self) -> ThreadPool:
        with self._lock:
            if self._sync is None:
                self._sync = ThreadPool(self._connect, self._size)
            return self._sync

    def _connect(self, deadline: float) -> BoundedConnection:
        began = time.monotonic()
        dsn = self._dsn()
        deadline += time.monotonic() - began  # the start of an embedded server is not counted
        connection = open_bounded(BoundedConnection, dsn, deadline, **self._kwargs)
        connection.deadline, connection.opened_at = deadline, began
        connection.patience = self._call_timeout
        try:
            set_up(connection, pooler=self._pooler)
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def _aopen(self) -> LoopPool:
        loop = asyncio.get_running_loop()
        with self._lock:
            pool = self._async.get(loop)
            if pool is None:
                for ended in [other for other in self._async if other.is_closed()]:
                    self._async.pop(ended).close()
                pool = self._async[loop] = LoopPool(self._aconnect, self._size)
            return pool

    async def _aconnect(self, deadline: float) -> AsyncBoundedConnection:
        dsn = await asyncio.to_thread(self._dsn)
        connection = await AsyncBoundedConnection.connect(dsn, **self._kwargs)
        connection.deadline, connection.opened_at = deadline, time.monotonic()
        connection.patience = self._call_timeout
        try:
            await aset_up(connection, pooler=self._pooler)
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def close(self) -> None:
        """Close the sync connections of this process, and those of loops that have ended; it can be used again."""
        with self._lock:
            if self._sync is not None:
                self._sync.close()
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


def _forget_all() -> None:
    for pool in list(_pools):
        pool.forget()


def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)
