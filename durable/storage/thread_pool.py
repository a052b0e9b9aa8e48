"""The connections of a process's threads: a list of the free ones and a count of the rest.

The thread that needs a connection opens it. So the first call after a restart of the server takes as long as one
connect, and a call that gets no connection says why. A connection that the server has closed is replaced before
anything is sent on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psycopg

from durable.storage.bounded import BoundedConnection
from durable.storage.lending import FIRST_PAUSE, LONGEST_PAUSE, NoneFreeError, is_alive, may_be_kept

IDLE_SECONDS = 600.0
"""Seconds after which an unused connection is closed."""


class ThreadPool:
    """Lends connections to the threads of one process.

    Args:
        connect: Opens a connection; it is given the `time.monotonic()` by which the call must end.
        size: The most connections.
    """

    def __init__(self, connect: Callable[[float], BoundedConnection], size: int) -> None:
        self._connect = connect
        self._room = threading.Semaphore(size)
        self._lock = threading.Lock()
        self._free: list[tuple[BoundedConnection, float]] = []
        self._closed = threading.Event()
        self._sweeps = False
        self._trouble: psycopg.OperationalError | None = None

    def take(self, wait_until: float, deadline: float) -> BoundedConnection:
        """Return a live connection whose waits end at `deadline`.

        Args:
            wait_until: `time.monotonic()` until when a connection is waited for, and connecting is tried again.
            deadline: `time.monotonic()` by which the whole call must end.

        Raises:
            NoneFreeError: All are lent, and none came back in time.
            psycopg.OperationalError: The database can't be reached.
        """
        if not self._room.acquire(timeout=max(0.0, wait_until - time.monotonic())):
            if self._trouble is not None:
                # The calls that hold the room are trying to connect, too.
                raise psycopg.OperationalError(str(self._trouble))
            raise NoneFreeError
        try:
            while True:
                with self._lock:
                    connection = self._free.pop()[0] if self._free else None
                if connection is None:
                    return self._connected(wait_until, deadline)
                if is_alive(connection):
                    connection.deadline = deadline
                    return connection
                connection.pgconn.finish()
        except BaseException:
            self._room.release()
            raise

    def _connected(self, wait_until: float, deadline: float) -> BoundedConnection:
        pause = FIRST_PAUSE
        while True:
            try:
                connection = self._connect(deadline)
            except psycopg.OperationalError as error:
                self._trouble = error
                if time.monotonic() + pause >= wait_until:
                    raise
            else:
                self._trouble = None
                return connection
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def give_back(self, connection: BoundedConnection) -> None:
        """Take a connection back; one that is not idle, or old, is closed."""
        now = time.monotonic()
        if self._closed.is_set() or not may_be_kept(connection, now):
            connection.pgconn.finish()
        else:
            with self._lock:
                self._free.append((connection, now))
            if not self._sweeps:
                self._start_sweeping()
        self._room.release()

    def free(self) -> list[BoundedConnection]:
        """Return the connections that are open and not lent."""
        with self._lock:
            return [connection for connection, _ in self._free]

    def close(self) -> None:
        """Close the free connections now, and each lent one when it comes back."""
        self._closed.set()
        self._close_unused(0.0)

    def _start_sweeping(self) -> None:
        thread = threading.Thread(target=self._sweep, name="durable-pool", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be had now, or the interpreter ends: the connections stay open meanwhile
            return
        self._sweeps = True

    def _sweep(self) -> None:
        """Close connections that were not used for long, and end when none is left."""
        while not self._closed.wait(IDLE_SECONDS / 10):
            if not self._close_unused(IDLE_SECONDS):
                return

    def _close_unused(self, seconds: float) -> int:
        """Close the connections that were not used for that many seconds; return how many are left."""
        until = time.monotonic() - seconds
        with self._lock:
            unused = [entry for entry in self._free if entry[1] <= until]
            self._free = [entry for entry in self._free if entry[1] > until]
            left = len(self._free)
            self._sweeps = left > 0
        for connection, _ in unused:
            connection.pgconn.finish()
        return left
