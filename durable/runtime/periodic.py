"""Firing schedules, for beats and, where there is none, for agents."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import psycopg

from durable.app import Durable
from durable.runtime.link import LOCKED, Link
from durable.schedules import Periodic
from durable.storage import schedules
from durable.storage.schedules import Fired
from durable.storage.session import describe

log = logging.getLogger(__name__)

AT_MOST = 1.0
"""Seconds after which firing pauses, with more to make up for."""
BATCH = 50
"""Schedules fired in one transaction while nothing is wrong."""
LEFT_FOR = 30.0
"""Seconds for which a schedule that could not be fired is left alone, by this process."""
LOCKED_FOR = 1.0
"""Seconds for which one is left alone at first that waits for another session's lock; twice as long each time after."""


class Firing:
    """Declares the app's schedules and fires everybody's over one link. One that can't be fired stops no other."""

    def __init__(self, app: Durable, link: Link) -> None:
        self._app = app
        self._link = link
        self._left: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        self._told: set[str] = set()
        self._declare_at = math.inf

    @property
    def left(self) -> list[str]:
        """Names of the schedules that are left alone for now."""
        now = time.monotonic()
        self._left = {name: until for name, until in self._left.items() if until > now}
        return sorted(self._left)

    @property
    def again_at(self) -> float:
        """time.monotonic() at which a schedule that was left alone is tried again; infinite when there is none."""
        return min(self._left.values(), default=math.inf)

    def declare(self) -> None:
        """Store what the app declares; what is wrong is logged, and nothing forgotten then. Raises psycopg.Error.

        A schedule whose row another session holds is stored later; see `declare_again`.
        """
        self._declare_at = math.inf
        found, wrong = self._app.declared()
        for error in wrong:
            log.error("%s", error)
        try:
            taken = self._link.run_atomically(schedules.declare(self._app.name, found, forget=not wrong))
        except LOCKED:
            taken = self._declare_each(found)
            self._declare_at = time.monotonic() + LEFT_FOR
        for name in taken:
            log.error("schedule %r belongs to another app in this schema; rename one of the two", name)

    def declare_again(self) -> None:
        """Store what could not be stored before, once some time has passed. Raises psycopg.Error."""
        if time.monotonic() >= self._declare_at:
            self.declare()

    def _declare_each(self, found: Sequence[Periodic]) -> list[str]:
        """Store each schedule by itself, and forget none; return the names that belong to another app."""
        taken: list[str] = []
        for entry in found:
            try:
                taken += self._link.run_atomically(schedules.declare(self._app.name, [entry], forget=False))
            except LOCKED:
                log.warning("schedule %r is stored later: another session holds its row", entry.name)
        return taken

    def fire(self) -> int:
        """Insert what is due; return how many schedules were. Raises psycopg.Error.

        Not everything that is due, when that takes long: the caller has leases to keep, and comes again.
        """
        total = 0
        limit = BATCH
        until = time.monotonic() + AT_MOST
        while True:
            fired = Fired()
            try:
                self._link.run_atomically(schedules.fire(self.left, limit, into=fired))
            except psycopg.Error as error:
                if self._link.broken(error) or fired.at is None:
                    raise
                self._put_off(fired.at, error)
                limit = 1  # what else is wrong takes nothing with it
            else:
                total += self._fired(fired)
                if not fired.names:
                    return total
            if time.monotonic() >= until:
                return total

    def _fired(self, fired: Fired) -> int:
        """Note what a transaction did, and wake workers for it; return how many schedules it fired."""
        for name in fired.unreadable:
            self._leave(name, LEFT_FOR, "was written by newer code; it is left to that")
        for name, wrong in fired.broken.items():
            self._leave(name, LEFT_FOR, f"can't be read: {wrong}; declare it again, or delete its row")
        for name in fired.names:
            if self._pauses.pop(name, None) is not None:
                log.warning("schedule %r is fired again", name)
            self._told.discard(name)
        self._link.notify(self._app.wakeups.after_insert(fired.inserted))
        return len(fired.names)

    def _put_off(self, name: str, error: psycopg.Error) -> None:
        if isinstance(error, LOCKED):
            pause = min(2 * self._pauses.get(name, LOCKED_FOR / 2), LEFT_FOR)
            why = "is fired later: another transaction holds its correlation key, or its row"
        else:
            pause, why = LEFT_FOR, f"can't be fired: {describe(error)}"
        self._pauses[name] = pause
        self._leave(name, pause, why)

    def _leave(self, name: str, seconds: float, why: str) -> None:
        self._left[name] = time.monotonic() + seconds
        if name not in self._told:
            log.error("schedule %r %s; the others are fired", name, why)
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
        self._firing.declare_again()
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
