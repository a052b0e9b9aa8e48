"""Firing schedules, for beats and, where there is none, for agents."""

from __future__ import annotations

import logging

from durable.app import Durable
from durable.runtime.link import Link
from durable.storage import schedules

log = logging.getLogger(__name__)


class Firing:
    """Declares the app's schedules and fires everybody's over one link."""

    def __init__(self, app: Durable, link: Link) -> None:
        self._app = app
        self._link = link
        self._unreadable: list[str] = []

    def declare(self) -> None:
        """Store what the app declares. Raises psycopg.Error; ConfigError for a wrong entry."""
        taken = self._link.run_atomically(schedules.declare(self._app.name, self._app.schedules()))
        for name in taken:
            log.error("schedule %r belongs to another app in this schema; rename one of the two", name)

    def fire(self) -> int:
        """Insert what is due; return how many schedules were. Raises psycopg.Error."""
        total = 0
        while True:
            fired = self._link.run_atomically(schedules.fire(self._unreadable))
            for name in fired.unreadable:
                log.error("schedule %r was written by newer code; it is left to that", name)
            self._unreadable += fired.unreadable
            for operation in self._app.wakeups.after_insert(fired.inserted):
                self._link.run(operation)
            total += fired.schedules
            if not fired.schedules:
                return total
