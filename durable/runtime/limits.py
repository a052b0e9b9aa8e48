"""What agents and beats do for limits: storing the app's, mending what contradicts what executes."""

from __future__ import annotations

from durable.app import Durable
from durable.runtime.link import Link
from durable.storage import lanes
from durable.wakeups import Wakeups


def declare(link: Link, app: Durable) -> None:
    """Store the limits that an app is configured with, and wake workers for what that lets go. Raises psycopg.Error."""
    ready = link.run_atomically(app.limit_rows.declare())
    for operation in app.wakeups.promoted(ready):
        link.run(operation)


def repair(link: Link, wakeups: Wakeups) -> None:
    """Mend counters and lanes that contradict what executes, and wake workers for what comes out.

    Raises psycopg.Error.
    """
    after = ""
    while True:
        ready, after = link.run_atomically(lanes.repair(after))
        for operation in wakeups.promoted(ready):
            link.run(operation)
        if not after:
            return
