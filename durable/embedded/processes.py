"""Which processes are the server on one data directory. Sends signals; starts nothing.

A pid by itself proves nothing: it may be recycled (at once, after a container's restart) or a zombie's (for ever, where
PID 1 does not reap). On Linux a process counts when its name is postgres and its working directory is the data
directory: postmaster and backends both go there, and a zombie has none. Elsewhere there is no such proof, and callers
must have had an answer from the server first.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

HAVE_PROC = os.path.exists("/proc/self/cwd")


@dataclass(frozen=True)
class PidFile:
    """What postmaster.pid says, true or stale."""

    pid: int
    socket_dir: Path | None


def read_small(path: Path) -> str:
    """The text of a file in the account's directory, where root must expect a symlink or a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.fsdecode(os.read(fd, 8192))
    finally:
        os.close(fd)


def pid_file(data: Path) -> PidFile | None:
    try:
        lines = read_small(data / "postmaster.pid").splitlines()
        pid = int(lines[0])
    except (OSError, ValueError, IndexError):
        return None
    return PidFile(pid, Path(lines[4]) if len(lines) > 4 and lines[4] else None)


def is_server(pid: int, data: Path) -> bool:
    if not HAVE_PROC:
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True
    try:
        # The name, too: a shell that somebody left in the data directory is not a server.
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        return name in ("postgres", "postmaster") and os.path.samefile(f"/proc/{pid}/cwd", data)
    except OSError:  # gone, a zombie, or another user's
        return False


def postmaster(data: Path) -> int | None:
    """The pid of the server that the pid file names, if that process is a server on `data`."""
    found = pid_file(data)
    return found.pid if found is not None and is_server(found.pid, data) else None


def servers(data: Path) -> list[int]:
    """Every process on `data`, orphaned backends included. Empty where there is no /proc to ask."""
    if not HAVE_PROC:
        return []
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and is_server(int(name), data)]


def send(pid: int, number: signal.Signals, data: Path) -> None:
    """Signal the server; a process that took over its pid meanwhile is left alone where the kernel has pidfds."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        if is_server(pid, data):
            os.kill(pid, number)
        return
    try:
        if is_server(pid, data):
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def wait_gone(pid: int, data: Path, within: float) -> bool:
    deadline = time.monotonic() + within
    while is_server(pid, data):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
