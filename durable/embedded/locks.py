"""The kernel locks (flock) that processes sharing one server agree by. Knows files, not servers.

Kernel locks, because they end with their process however it ends; a pid list in a file outlives a kill -9.

lock     exclusive and short: whoever starts, stops or judges the server
holders  shared and long: every process that uses the server
keeper   exclusive, for the keeper's life: a server has at most one

A flock belongs to the open file description: a forked child shares its parent's. So a short lock is unlocked and not
only closed, lest a child that another thread forked meanwhile keeps it; and `holders` is closed and not unlocked, so
that a child that leaves does not take its parent's hold away.
flock is per host: none of these files may be on NFS.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from durable.errors import EmbeddedServerError

LOCK_TIMEOUT = 180.0  # more than the slowest initdb plus start plus stop that a peer may be in


def open_lock(path: Path) -> int:
    # 0600: whoever can open a file can lock it, and so could stop every start.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_UN)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` exclusively; waits for other processes and for other threads alike."""
    fd = open_lock(path)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while not try_lock(fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"another process has been starting or stopping the embedded server for {LOCK_TIMEOUT:.0f} s;"
                    f" find it with `fuser {path}`"
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            unlock(fd)
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether somebody holds `path` exclusively. Asks with a shared lock, so two who ask do not see each other."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(fd, fcntl.LOCK_SH):
            return True
        unlock(fd)
        return False
    finally:
        os.close(fd)
