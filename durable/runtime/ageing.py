"""Priority ageing, as agents and beats do it: where it is set, by one process at a time."""

from __future__ import annotations

import logging

from durable.runtime.link import Link
from durable.storage import ageing, maintenance
from durable.wakeups import Wakeups

log = logging.getLogger(__name__)


def age(link: Link, wakeups: Wakeups, interval: float) -> int:
    """Raise rows that have waited too long, and have pickers look from the head; return how many. Raises psycopg.Error.

    interval  seconds between two turns in the whole cluster
    """
    queues = link.run(ageing.queues())
    if not queues or not link.run(maintenance.take_duty("ageing", interval)):
        return 0
    raised: dict[str, int] = {}
    for queue, seconds in queues.items():
        if count := link.run(ageing.age_queue(queue, seconds)):
            raised[queue] = count
    in_lanes, after = link.run(ageing.age_lanes())
    while after:
        more, after = link.run(ageing.age_lanes(after))
        in_lanes += more
    link.notify(wakeups.handed_back(raised))
    total = sum(raised.values()) + in_lanes
    if total:
        log.info("%d rows have waited too long: they go first now", total)
    return total
