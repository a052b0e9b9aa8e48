"""The connections of one event loop: a list of the free ones and a count of the rest.

No task of its own runs on the loop, so that a program may end its loop without closing anything: nothing is waited for
there, and nothing keeps it from ending. What is free then is closed when the loop or the process goes.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psycopg

from durable.storage.session import AsyncConnection, Connection

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0
"""Seconds between tries to connect: the first pause, and the one that doubling ends at."""


class LoopPool:
    """Lends connections to the coroutines of the loop it was made on.

    connect  opens one; what it raises of psycopg.OperationalError is tried again until the time is over
    size     most connections
    """

    def __init__(self, connect: Callable[[], Awaitable[AsyncConnection]], size: int) -> None:
        self._connect = connect
        self._free: list[AsyncConnection] = []
        self._room = asyncio.Semaphore(size)
        self._pid = os.getpid()
        self._closed = False

    async def take(self, timeout: float) -> AsyncConnection:
        """Return a live connection. Raises TimeoutError when none is to be had in `timeout` seconds."""
        async with asyncio.timeout(timeout):
            await self._room.acquire()
            try:
                while self._free:
                    connection = self._free.pop()
                    if await _works(connection):
                        return connection
                return await self._connected()
            except BaseException:
                self._room.release()
                raise

    async def _connected(self) -> AsyncConnection:
        pause = FIRST_PAUSE
        while True:
            with suppress(psycopg.OperationalError):
                return await self._connect()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def give_back(self, connection: AsyncConnection) -> None:
        """Take a connection back. Never waits: a cancelled coroutine gives it back, and must not be held up."""
        if self._closed or connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
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


def readable(connection: Connection | AsyncConnection) -> bool:
    """Whether there is something to read on an idle connection: then it is closed, or has a notice.

    Looking costs a microsecond where a query would cost a round trip on every `delay()`.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


async def _works(connection: AsyncConnection) -> bool:
    try:
        if readable(connection):
            await connection.execute("SELECT 1", prepare=False)
    except psycopg.OperationalError:
        connection.pgconn.finish()
        return False
    except BaseException:
        connection.pgconn.finish()
        raise
    return True
