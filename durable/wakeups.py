"""Which commits wake workers, by NOTIFY.

Two channels per schema: one for queues (agents listen), one for scheduled rows (beats listen). While rows are inserted
slowly each insert notifies. A NOTIFY takes a lock of the whole server at commit, so above 400 rows a second in the
schema a process notifies at most once per queue and 50 ms, as workers look for the rows in between by themselves
(runtime/lookout.py; an agent looks again 50 ms after every notification). When a process begins to wait for a result,
it sends what it has saved. Correctness never depends on any of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from durable.instance import NewInstance
from durable.storage.session import Operation, single

INTERVAL = 0.05
"""Seconds between two notifications of one queue by one process, while rows are inserted quickly."""
QUICKLY = 400
"""Rows inserted a second, in the whole schema, above which notifications are saved."""
ANY_QUEUE = "*"
RESCAN = "!"
TERMINATE = "terminate"
"""What tells agents to look for claims whose process is to be killed."""
ORDERS = "orders"
"""What tells agents to look for orders: a queue paused or resumed, a command to be stopped."""
INSPECT = "inspect"
"""What has agents tell at once what their processes run."""
_PAYLOAD = re.compile(r"([^:]+):([0-9]{1,9}):(!|-?[0-9]{1,5})")


def queue_channel(schema: str) -> str:
    """Return the channel agents listen on."""
    return f"durable.{schema}"


def due_channel(schema: str) -> str:
    """Return the channel beats listen on."""
    return f"durable.{schema}.due"


def payload(queue: str, count: int, priority: int | None) -> str:
    """Return what a notification says: queue, how many rows, their priority (None: look from the head again)."""
    return f"{queue}:{count}:{RESCAN if priority is None else priority}"


def parse(text: str) -> tuple[str, int, int | None] | None:
    """Return (queue, count, priority or None for a rescan), or None for what is not ours."""
    if text == ANY_QUEUE:
        return ANY_QUEUE, 1, None
    match = _PAYLOAD.fullmatch(text)
    if match is None:
        return None
    return match[1], int(match[2]), None if match[3] == RESCAN else int(match[3])


def _later(new: NewInstance) -> bool:
    """Whether a row waits for its time; by this process's clock, which only decides whom to wake."""
    return bool(new.delay) or (new.at is not None and new.at > datetime.now(UTC))


class Wakeups:
    """Decides and makes the notifications of one process."""

    def __init__(self, schema: str, enabled: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue_channel = queue_channel(schema)
        self._due_channel = due_channel(schema)
        self._enabled = enabled
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}
        self._newest = 0
        self._owed: dict[str, str] = {}

    def after_insert(self, batch: Sequence[NewInstance], ids: Sequence[int | None] = ()) -> list[Operation[Any]]:
        """Return the notifications due after the commit of these rows; often none.

        Args:
            ids: Their ids. How far ids have risen since this process last notified tells how many rows all
                processes have inserted since, so that it costs nothing to know.
        """
        if not self._enabled:
            return []
        self._newest = max(filter(None, ids), default=self._newest)
        counts: dict[str, int] = {}
        priorities: dict[str, int] = {}
        scheduled = False
        for new in batch:
            if _later(new):
                scheduled = True
            else:
                counts[new.queue] = counts.get(new.queue, 0) + 1
                priorities[new.queue] = min(priorities.get(new.queue, new.priority), new.priority)
        operations = []
        for queue, count in counts.items():
            text = payload(queue, count, priorities[queue])
            if self._may(queue, bool(ids)):
                operations.append(self._notify(self._queue_channel, text))
            else:
                self._owed[queue] = text
        if scheduled and self._may(""):
            operations.append(self._notify(self._due_channel, ""))
        return operations

    def owed(self) -> list[Operation[Any]]:
        """Return the notifications that were saved and never made up for."""
        operations = []
        for queue in list(self._owed):
            text = self._owed.pop(queue, None)
            if text is None:
                continue  # another thread has just sent it
            self._last[queue] = self._clock(), self._newest
            operations.append(self._notify(self._queue_channel, text))
        return operations

    def in_transaction(self, batch: Iterable[NewInstance]) -> list[Operation[Any]]:
        """Return what a caller's transaction carries: constant payloads, which Postgres sends once per transaction."""
        if not self._enabled:
            return []
        scheduled = {_later(new) for new in batch}
        operations = []
        if False in scheduled:
            operations.append(self._notify_inside(self._queue_channel, ANY_QUEUE))
        if True in scheduled:
            operations.append(self._notify_inside(self._due_channel, ""))
        return operations

    def became_ready(self, by_queue: Mapping[str, int]) -> list[Operation[Any]]:
        """Return the notifications for rows that a commit of ours made runnable; often none."""
        if not self._enabled:
            return []
        return [
            self._notify(self._queue_channel, payload(queue, count, 0))
            for queue, count in by_queue.items()
            if self._may(queue)
        ]

    def any_queue(self) -> list[Operation[Any]]:
        """Return the constant notification that a caller's transaction carries."""
        return [self._notify_inside(self._queue_channel, ANY_QUEUE)] if self._enabled else []

    def handed_back(self, by_queue: dict[str, int]) -> list[Operation[Any]]:
        """Return the notifications for rows given back to their place in the order, behind the pickers' positions."""
        if not self._enabled:
            return []
        return [self._notify(self._queue_channel, payload(queue, count, None)) for queue, count in by_queue.items()]

    def promoted(self, by_queue: dict[str, int]) -> list[Operation[Any]]:
        """Return the notifications for rows that became due."""
        if not self._enabled:
            return []
        return [self._notify(self._queue_channel, payload(queue, count, None)) for queue, count in by_queue.items()]

    def terminations(self) -> list[Operation[Any]]:
        """Return the notification that a claim is to be killed."""
        return [self._notify(self._queue_channel, TERMINATE)] if self._enabled else []

    def orders(self) -> list[Operation[Any]]:
        """Return the notification that agents have orders."""
        return [self._notify(self._queue_channel, ORDERS)] if self._enabled else []

    def inspection(self) -> list[Operation[Any]]:
        """Return the notification that somebody wants to know what runs."""
        return [self._notify(self._queue_channel, INSPECT)] if self._enabled else []

    def due_sooner(self) -> list[Operation[Any]]:
        """Return the notification that a row was scheduled."""
        return [self._notify(self._due_channel, "")] if self._enabled and self._may("") else []

    def _may(self, key: str, counted: bool = False) -> bool:
        """Whether a notification is due; `counted`: the newest id is that of a row inserted just now."""
        now, newest = self._clock(), self._newest
        last = self._last.get(key)
        if last is not None and now - last[0] < INTERVAL:
            since, id_then = now - last[0], last[1]
            if not counted or newest - id_then > since * QUICKLY:
                return False
        self._last[key] = now, newest
        self._owed.pop(key, None)
        return True

    @staticmethod
    def _notify(channel: str, text: str) -> Operation[Any]:
        return single("notify", {"channel": channel, "payload": text})

    @staticmethod
    def _notify_inside(channel: str, text: str) -> Operation[Any]:
        return single("notify_inside", {"channel": channel, "payload": text})
