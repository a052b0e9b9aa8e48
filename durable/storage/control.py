"""Orders for the cluster, kept in the database: paused queues, processes per queue, commands asked to end.

SQL in sql/control.sql.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from durable.storage.arrays import TextArray
from durable.storage.session import Operation
from durable.storage.workers import Identity


@dataclass(frozen=True, slots=True)
class QueueOrders:
    """What is ordered for one queue: whether it is paused; worker processes per command, None for as started."""

    paused: bool = False
    concurrency: int | None = None


def pause(name: str, reason: str | None = None) -> Operation[bool]:
    """Have nothing claimed from a queue; False when it was paused already."""
    return bool((yield "pause_queue", {"name": name, "reason": reason}))


def resume(name: str) -> Operation[bool]:
    """Have a queue claimed from again; False when it was not paused."""
    return bool((yield "resume_queue", {"name": name}))


def set_concurrency(name: str, concurrency: int | None) -> Operation[bool]:
    """Give a queue so many worker processes per command, None: as started; False when it was so already."""
    return bool((yield "set_concurrency", {"name": name, "concurrency": concurrency}))


def concurrencies() -> Operation[dict[str, int]]:
    """Return queue -> worker processes per command, for queues of which that was set."""
    return dict((yield "concurrencies", {}))


def oldest_waiting(queue: str) -> Operation[float | None]:
    """Return the age in seconds of the oldest runnable row of a queue, None when none waits."""
    rows = yield "oldest_waiting", {"queue": queue}
    return None if rows[0][0] is None else float(rows[0][0])


def orders(queues: Sequence[str], command: Identity) -> Operation[tuple[dict[str, QueueOrders], str | None]]:
    """Return what is ordered for each of these queues, and what the command is asked: stop, reload or None.

    command  any process of it
    """
    rows = yield "queue_orders", {"queues": TextArray(queues), **_command(command)}
    return {row[0]: QueueOrders(row[1], row[2]) for row in rows}, next((row[3] for row in rows), None)


def ask(name: str, asked: str) -> Operation[list[tuple[str, int]]]:
    """Ask the live worker commands of a name to `stop` or `reload`; return host and pid of each."""
    rows = yield "ask_command", {"name": name, "asked": asked}
    return sorted({(row[0], row[1]) for row in rows})


def forget_asked(command: Identity) -> Operation[None]:
    """Note that a command has heard what it was asked."""
    yield "forget_asked", _command(command)


def _command(command: Identity) -> dict[str, Any]:
    return {
        "host": command.host,
        "boot_id": command.boot_id,
        "command_pid": command.command_pid,
        "command_start": command.command_start,
    }
