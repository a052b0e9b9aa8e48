"""Claimed rows on their way into the buffer: their inboxes are loaded, and those that can't be run here dealt with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from durable.app import Durable
from durable.instance import Claimed
from durable.runtime import reporting
from durable.runtime.link import Link
from durable.runtime.picker import Picker
from durable.storage import claims, signals


class Arrivals:
    """What becomes of the claimed rows of one worker process.

    held     id -> token of what the process holds; rows that don't stay are taken out
    release  gives rows back, with a reason
    left     told when rows stay claimed that this process does not hold, since other sessions have locked them
    """

    def __init__(
        self,
        app: Durable,
        link: Link,
        picker: Picker,
        name: str,
        held: dict[int, int],
        release: Callable[[Sequence[Claimed], str], None],
        left: Callable[[], None],
    ) -> None:
        self._app = app
        self._link = link
        self._picker = picker
        self._name = name
        self._held = held
        self._release = release
        self._left = left

    def with_inboxes(self, rows: list[Claimed]) -> list[Claimed]:
        """Load the inboxes of those that may have one, in one statement."""
        ids = [row.id for row in rows if row.inbox]
        if not ids:
            return rows
        inboxes = self._link.run(signals.inbox(ids))
        return [row._replace(signals=inboxes.get(row.id, ())) if row.inbox else row for row in rows]

    def runnable_here(self, worker: int, rows: list[Claimed]) -> list[Claimed]:
        """Deal with rows that have expired or that this process does not know; return the others."""
        expired = [row for row in rows if row.expired]
        unknown = [
            row for row in rows if not row.expired and (row.machine, row.machine_version) not in self._app.definitions
        ]
        if not expired and not unknown:
            return rows
        if expired:
            for row in expired:
                self._held.pop(row.id, None)
            pairs = [(row.id, row.token) for row in expired]
            woken, whole = self._link.run_around_locks(lambda wait: claims.expire(worker, pairs, wait=wait))
            if not whole:
                self._left()
            self._link.notify(self._app.wakeups.became_ready(woken))
        for row in unknown:
            self._picker.hide(row.machine, row.machine_version)
            reporting.unknown(row)
            self._release([row], f"worker {self._name} does not know {row.machine} version {row.machine_version}")
        return [row for row in rows if row.id in self._held]
