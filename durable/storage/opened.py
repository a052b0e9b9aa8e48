"""The database connections that durable has opened in this process, for a child that user code forks.

A child that spoke on one of them would speak in its parent's session. One that only kept it open would keep the session
and its locks alive after its parent has died.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any, TypeVar

import psycopg

from durable import forks

C = TypeVar("C", bound="psycopg.Connection[Any] | psycopg.AsyncConnection[Any]")


class _Opened:
    def __init__(self) -> None:
        self.connections: weakref.WeakSet[Any] = weakref.WeakSet()

    def disown(self) -> None:
        """In a child that user code forks: have every connection lead nowhere."""
        sockets = []
        for connection in self.connections:
            with suppress(psycopg.Error):  # one that was lost has no socket any more
                sockets.append(connection.pgconn.socket)
        forks.silence(*sockets)


_opened = forks.shared(_Opened())


def opened(connection: C) -> C:
    """Note a connection that durable has just opened, and return it."""
    _opened.connections.add(connection)
    return connection
