"""Priority ageing of queues: setting it, and raising what has waited too long. SQL in sql/ageing.sql.

A raised row keeps its new priority. What is raised at once is bounded, so that a deep backlog that has grown old does
not take every place before fresh rows of a better priority.
"""

from __future__ import annotations

from durable.storage import lanes
from durable.storage.arrays import TextArray
from durable.storage.session import Operation

MOST_OF_A_QUEUE = 1000
"""Rows that one turn raises, of each priority and kind in a queue."""
MOST_OF_A_LANE = 20


def set_ageing(name: str, seconds: float | None) -> Operation[bool]:
    """Have rows of a queue age after so many seconds, None: never; False when it was so already."""
    return bool((yield "set_ageing", {"name": name, "ageing": seconds}))


def queues() -> Operation[dict[str, float]]:
    """Return queue -> seconds, for the queues in which rows age."""
    return dict((yield "ageing_queues", {}))


def age_queue(queue: str, seconds: float, limit: int = MOST_OF_A_QUEUE) -> Operation[int]:
    """Raise rows that pickers see and that have waited so long to the best priority there; return how many."""
    return len((yield "age_queue", {"queue": queue, "ageing": seconds, "limit": limit}))


def age_lanes(after: str = "") -> Operation[tuple[int, str]]:
    """Raise parked rows of queues in which they age to the best priority of their lane.

    after  where the last turn stopped in the lanes
    Returns how many, and where this turn stopped ("": at the end).
    """
    page, stopped = yield from lanes.parked(after)
    if not page:
        return 0, ""
    raised = yield "age_lanes", {"lanes": TextArray(page), "limit": MOST_OF_A_LANE}
    return len(raised), stopped
