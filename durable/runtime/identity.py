"""Which process this is, for ever: host, boot, pid and the kernel's start time of the command it belongs to."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from durable.storage.workers import Identity


def boot_id() -> str:
    """Return what names this boot of this machine and this pid namespace; "" where the kernel has no such thing.

    Containers share the kernel's boot id and may share a host name; a pid means something only in its own namespace.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """Return when a process started, as an opaque text; "" when there is no such process or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def exists(pid: int, started: str) -> bool:
    """Whether exactly that process is still there (its pid may have been given to another)."""
    if started:
        return process_start(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def own(
    kind: str,
    name: str,
    queue: str | None = None,
    slots: int = 1,
    command: int | None = None,
    tasks: Sequence[str] = (),
) -> Identity:
    """Return the identity of the calling process; `command` is the pid of its supervisor, None when it has none."""
    pid = os.getpid()
    command = pid if command is None else command
    return Identity(
        kind, name, socket.gethostname(), boot_id(), pid, command, process_start(command), queue, slots, tasks
    )
