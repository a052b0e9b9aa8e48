"""Letting time pass. All clocks are the database's, so it is the rows that move, not the clock."""

from __future__ import annotations

from functools import partial

from durable import validation
from durable.app import Durable
from durable.storage import testing
from durable.testing import seams
from durable.testing.targets import Target, find


def fire_timeouts(app: Durable, target: Target | None = None) -> int:
    """Wake parks that have a timeout as if it had passed; they run at the next `drain`.

    target  an id, a correlation key or a result; None: all of them
    Returns how many were woken; 0 for one that is not parked, or has no timeout.
    Raises NotFoundError.
    """
    return seams.write(app, partial(testing.fire_timeouts, None if target is None else find(app, target)))


def travel(app: Durable, seconds: float) -> int:
    """Let `seconds` pass: what live instances wait for comes nearer, and what is due then is runnable.

    That is: delays and retries, timeouts of parks, and `expires`. Returns how many became runnable.
    Raises ValidationError for a negative time.
    """
    return seams.write(app, partial(testing.travel, validation.seconds(seconds, "seconds")))
