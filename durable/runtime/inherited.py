"""Finds connections that were opened before the worker processes are forked, and that they would share.

Two processes that talk on one socket read each other's answers. A pool is no better off: its threads are not forked.
The supervisor asks once, before its first fork. It looks at open file descriptors first; only if one of them is a
connected socket, or a thread runs, does it search the objects of the process for the owner.
"""

from __future__ import annotations

import gc
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from durable.storage.thread_pool import ThreadPool

_DESCRIPTORS = "/dev/fd"


def open_connections() -> list[str]:
    """Describe what is connected in this process: its kind, where it leads to, and the global that holds it.

    Pools and engines come first; a connection or socket that belongs to one of them is not named again.
    """
    sockets = dict(_connected())
    if not sockets and threading.active_count() == 1:
        return []
    found: list[tuple[Any, str]] = []
    kinds = [
        (kind, describe)
        for module, name, describe in _KINDS
        if isinstance(kind := getattr(sys.modules.get(module), name, None), type)
    ]
    objects = _instances(tuple(kind for kind, _ in kinds))
    for kind, describe in kinds:
        for thing in objects:
            if issubclass(type(thing), kind):
                # A foreign object that can't say what it is must not keep a worker from starting.
                with suppress(Exception):
                    text = describe(thing, sockets)
                    if text is not None:
                        found.append((thing, text))
    names = _globals({id(thing) for thing, _ in found}) if found else {}
    texts = [f"{text} ({names[id(thing)]})" if id(thing) in names else text for thing, text in found]
    return texts + [f"a socket to {address}" for address in sockets.values()]


def _instances(kinds: tuple[type, ...]) -> list[Any]:
    """Return all instances of these classes; `isinstance` would make lazy objects and proxies load their target."""
    matches: dict[type, bool] = {}
    found = []
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in matches:
            matches[kind] = issubclass(kind, kinds)
        if matches[kind]:
            found.append(thing)
    return found


def _connected() -> Iterator[tuple[int, str]]:
    """Yield the descriptor and the peer of each connected socket that is not a standard stream."""
    try:
        descriptors = [int(name) for name in os.listdir(_DESCRIPTORS)]
    except OSError:
        return  # no such folder on this platform
    for descriptor in sorted(descriptors):
        if descriptor <= 2:
            continue
        with suppress(OSError):  # not connected, or only the folder's own descriptor
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as copy:
                if copy.getsockname() == copy.getpeername() == "":
                    continue  # one end of a socketpair: it leads nowhere outside
                yield descriptor, _shown(copy.getpeername())


def _shown(address: Any) -> str:
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return os.fsdecode(address) or "an unnamed Unix socket"


def _globals(wanted: set[int]) -> dict[int, str]:
    """Return `module.name` of those objects that are globals of a module."""
    found: dict[int, str] = {}
    for module, loaded in list(sys.modules.items()):
        for name, value in list(getattr(loaded, "__dict__", {}).items()):
            if type(value).__name__ == "AsyncEngine":  # SQLAlchemy's, around the Engine that is found
                value = getattr(value, "sync_engine", None)
            if id(value) in wanted:
                found.setdefault(id(value), f"{module}.{name}")
    return found


def _descriptor(connection: Any) -> int:
    number = connection.fileno()
    return number if isinstance(number, int) else -1


def _by_descriptor(what: str) -> Callable[[Any, dict[int, str]], str | None]:
    def describe(connection: Any, sockets: dict[int, str]) -> str | None:
        address = sockets.pop(_descriptor(connection), None)
        return None if address is None else f"{what} to {address}"

    return describe


def _engine(engine: Any, sockets: dict[int, str]) -> str | None:
    pool = engine.pool
    count = pool.checkedin() + pool.checkedout()
    if count <= 0:
        return None
    idle = getattr(getattr(pool, "_pool", None), "queue", ())
    for record in list(idle):
        sockets.pop(_descriptor_of_driver(record), None)
    return f"a SQLAlchemy engine (connections open: {count}) to {engine.url.render_as_string(hide_password=True)}"


def _descriptor_of_driver(record: Any) -> int:
    driver = record.dbapi_connection
    driver = getattr(driver, "driver_connection", driver)
    return _descriptor(driver) if hasattr(driver, "fileno") else -1


def _psycopg_pool(pool: Any, sockets: dict[int, str]) -> str | None:
    if pool.closed:
        return None
    for connection in list(pool._pool):
        sockets.pop(_descriptor(connection), None)
    return f"a psycopg pool {pool.name!r}, whose threads are not forked"


def _own_pool(pool: ThreadPool, sockets: dict[int, str]) -> None:
    """Count a producer's connections as harmless: a forked process forgets them."""
    for connection in pool.free():
        sockets.pop(_descriptor(connection), None)


def _redis_pool(pool: Any, sockets: dict[int, str]) -> str | None:
    found = None
    for connection in [*pool._available_connections, *pool._in_use_connections]:
        sock = getattr(connection, "_sock", None)
        if sock is not None:
            address = sockets.pop(_descriptor(sock), None)
            found = found or address
    return None if found is None else f"a Redis pool with open connections to {found}"


def _asyncpg(connection: Any, sockets: dict[int, str]) -> str | None:
    if connection.is_closed():
        return None
    sock = connection._transport.get_extra_info("socket")
    address = sockets.pop(_descriptor(sock), None)
    return None if address is None else f"an asyncpg connection to {address}"


_KINDS: list[tuple[str, str, Callable[[Any, dict[int, str]], str | None]]] = [
    ("sqlalchemy.engine", "Engine", _engine),
    ("durable.storage.thread_pool", "ThreadPool", _own_pool),
    ("psycopg_pool", "ConnectionPool", _psycopg_pool),
    ("psycopg_pool", "AsyncConnectionPool", _psycopg_pool),
    ("redis", "ConnectionPool", _redis_pool),
    ("psycopg", "Connection", _by_descriptor("a psycopg connection")),
    ("psycopg", "AsyncConnection", _by_descriptor("a psycopg connection")),
    ("psycopg2.extensions", "connection", _by_descriptor("a psycopg2 connection")),
    ("asyncpg", "Connection", _asyncpg),
    ("socket", "socket", _by_descriptor("a socket")),
]
"""Module, class and how an open object of it is described; those that own others first."""
