"""What agents and beats do for limits: storing the app's, mending what contradicts what executes."""

from __future__ import annotations

import logging
import math
import time

from durable.app import Durable
from durable.runtime.link import LOCKED, Link
from durable.storage import lanes
from durable.wakeups import Wakeups

log = logging.getLogger(__name__)


DECLARE_AGAIN = 30.0
"""Seconds until limits are stored again whose rows, or whose lanes, another session held."""


class Declared:
    """The limits that an app is configured with, as one process stores them."""

    def __init__(self, link: Link, app: Durable) -> None:
        self._link = link
        self._app = app
        self._again_at = math.inf

    def store(self) -> None:
        """Store them, and wake workers for what that lets go. Raises psycopg.Error.

        Limits whose rows another session holds are stored later, by `store_again`.
        """
        self._again_at = math.inf
        try:
            ready = self._link.run_atomically(self._app.limit_rows.declare())
        except LOCKED:
            log.warning("the app's limits are stored later: another session holds their rows")
            self._again_at = time.monotonic() + DECLARE_AGAIN
            return
        self._link.notify(self._app.wakeups.promoted(ready))

    def store_again(self) -> None:
        """Store what could not be stored before, once some time has passed. Raises psycopg.Error."""
        if time.monotonic() >= self._again_at:
            self.store()


def repair(link: Link, wakeups: Wakeups) -> None:
    """Mend counters and lanes that contradict what executes, and wake workers for what comes out.

    Raises psycopg.Error.
    """
    after = ""
    while True:
        ready, after = link.run_atomically(lanes.repair(after))
        link.notify(wakeups.promoted(ready))
        if not after:
            return
