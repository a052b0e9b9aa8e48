"""Orders for the cluster, kept in the database: paused queues, processes per queue. SQL in sql/control.sql."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from durable.storage.arrays import TextArray
from durable.storage.session import Operation


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


def queue_orders(queues: Sequence[str]) -> Operation[dict[str, QueueOrders]]:
    """Return what is ordered for each of these queues."""
    rows = yield "queue_orders", {"queues": TextArray(queues)}
    found = {row[0]: QueueOrders(row[1], row[2]) for row in rows}
    return {queue: found.get(queue, QueueOrders()) for queue in queues}
