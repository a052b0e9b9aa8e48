"""Firing schedules, for beats and, where there is none, for agents."""

from __future__ import annotations

import logging
import time

import psycopg

from durable.app import Durable
from durable.runtime.link import Link
from durable.storage import schedules
from durable.storage.schedules import Fired
from durable.storage.session import describe

log = logging.getLogger(__name__)

AT_MOST = 1.0
"""Seconds after which firing pauses, with more to make up for."""
LEFT_FOR = 30.0
"""Seconds for which a schedule that could not be fired is left alone, by this process."""


class Firing:
    """Declares the app's schedules and fires everybody's over one link. One that can't be fired stops no other."""

    def __init__(self, app: Durable, link: Link) -> None:
        self._app = app
        self._link = link
        self._left: dict[str, float] = {}
        self._told: set[str] = set()

    @property
    def left(self) -> list[str]:
        """Names of the schedules that are left alone for now."""
        now = time.monotonic()
        self._left = {name: until for name, until in self._left.items() if until > now}
        return sorted(self._left)

    def declare(self) -> None:
        """Store what the app declares; what is wrong is logged, and nothing forgotten then. Raises psycopg.Error."""
        found, wrong = self._app.declared()
        for error in wrong:
            log.error("%s", error)
        taken = self._link.run_atomically(schedules.declare(self._app.name, found, forget=not wrong))
        for name in taken:
            log.error("schedule %r belongs to another app in this schema; rename one of the two", name)

    def fire(self) -> int:
        """Insert what is due; return how many schedules were. Raises psycopg.Error.

        Not everything that is due, when that takes long: the caller has leases to keep, and comes again.
        """
        total = 0
        until = time.monotonic() + AT_MOST
        while True:
            fired = Fired()
            try:
                self._link.run_atomically(schedules.fire(self.left, into=fired))
            except psycopg.Error as error:
                if self._link.broken(error) or fired.at is None:
                    raise
                self._leave(fired.at, f"can't be fired: {describe(error)}")
                continue
            for name in fired.unreadable:
                self._leave(name, "was written by newer code; it is left to that")
            for operation in self._app.wakeups.after_insert(fired.inserted):
                self._link.run(operation)
            total += fired.schedules
            if not fired.schedules or time.monotonic() >= until:
                return total

    def _leave(self, name: str, why: str) -> None:
        self._left[name] = time.monotonic() + LEFT_FOR
        if name not in self._told:
            log.error("schedule %r %s", name, why)
        self._told.add(name)


class StandIn:
    """An agent's part: it fires schedules while no beat lives, once one has been due for `beat_grace`."""

    def __init__(self, app: Durable, link: Link) -> None:
        self._conf = app.conf
        self._link = link
        self._firing = Firing(app, link)
        self._fires = False
        self._look_at = self._fire_at = time.monotonic() + app.conf.beat_grace

    def declare(self) -> None:
        """Store what the app declares. Raises psycopg.Error."""
        self._firing.declare()

    def turn(self) -> None:
        """Look for beats once per `beat_grace`; without one, fire at every poll. Raises psycopg.Error."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + self._conf.beat_grace
            self._look()
        if self._fires and now >= self._fire_at:
            self._fire_at = now + self._conf.poll_interval
            self._firing.fire()

    def _look(self) -> None:
        grace = self._conf.beat_grace
        if self._fires:
            self._fires = not self._link.run(schedules.beat_lives())
        elif self._link.run(schedules.overdue(grace)) and not self._link.run(schedules.beat_lives()):
            log.warning("no beat has fired schedules for %.0f s; start `durable beat`", grace)
            self._fires = True
