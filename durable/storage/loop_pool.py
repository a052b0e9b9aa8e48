"""The connections of one event loop: a list of the free ones and a count of the rest.

No task of its own runs on the loop, so that a program may end its loop without closing anything: nothing is waited for
there, and nothing keeps it from ending. What is free then is closed when the loop or the process goes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

import psycopg

from durable.storage.bounded import AsyncBoundedConnection, NoAnswerError
from durable.storage.lending import FIRST_PAUSE, LONGEST_PAUSE, NoneFreeError, is_alive, may_be_kept


class LoopPool:
    """Lends connections to the coroutines of the loop it was made on.

    Args:
        connect: Opens a connection; it is given the `time.monotonic()` by which the call must end.
        size: The most connections.
    """

    def __init__(self, connect: Callable[[float], Awaitable[AsyncBoundedConnection]], size: int) -> None:
        self._connect = connect
        self._free: list[AsyncBoundedConnection] = []
        self._room = asyncio.Semaphore(size)
        self._pid = os.getpid()
        self._closed = False
        self._trouble: psycopg.OperationalError | None = None

    async def take(self, wait_until: float, deadline: float) -> AsyncBoundedConnection:
        """Return a live connection whose waits end at `deadline`; as `ThreadPool.take`."""
        if self._room.locked():
            await self._acquire(wait_until)
        else:
            await self._room.acquire()
        try:
            while self._free:
                connection = self._free.pop()
                if is_alive(connection):
                    connection.deadline = deadline
                    return connection
                connection.pgconn.finish()
            return await self._connected(wait_until, deadline)
        except BaseException:
            self._room.release()
            raise

    async def _acquire(self, wait_until: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, wait_until - time.monotonic())):
                await self._room.acquire()
        except TimeoutError:
            if self._trouble is not None:
                # The calls that hold the room are trying to connect, too.
                raise psycopg.OperationalError(str(self._trouble)) from None
            raise NoneFreeError from None

    async def _connected(self, wait_until: float, deadline: float) -> AsyncBoundedConnection:
        pause = FIRST_PAUSE
        while True:
            try:
                connection = await self._connect_by(deadline)
            except psycopg.OperationalError as error:
                self._trouble = error
                if time.monotonic() + pause >= wait_until:
                    raise
            else:
                self._trouble = None
                return connection
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _connect_by(self, deadline: float) -> AsyncBoundedConnection:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())) as limit:
                return await self._connect(deadline)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise NoAnswerError("connection timeout: no answer before the call's time was over") from error

    def give_back(self, connection: AsyncBoundedConnection) -> None:
        """Take a connection back. Never waits: a cancelled coroutine gives it back, and must not be held up."""
        if self._closed or not may_be_kept(connection, time.monotonic()):
            connection.pgconn.finish()
        else:
            self._free.append(connection)
        self._room.release()

    def close(self) -> None:
        """Close what is free now, and what is lent when it comes back; from any thread, once the loop has ended.

        In a forked child this leaves the sockets alone: they are the parent's.
        """
        self._closed = True
        if self._pid == os.getpid():
            for connection in self._free:
                connection.pgconn.finish()
            self._free.clear()

    def __del__(self) -> None:
        self.close()
