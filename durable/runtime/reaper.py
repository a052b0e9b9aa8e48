"""Taking back the rows of processes that died. Agents and beats run it; any number may at once.

First the leases are marked dead, then rows are released: a dead worker id is never revived, so an outcome that comes
later is stale. A row that is locked (its outcome commits right now) is met at the next turn, if it is still there.

Then what is left of limits: counters that differ from what executes, lanes that nobody would open; and rows that have
waited too long are raised, where that is asked for. One process at a time does that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime

from durable.config import Config
from durable.runtime import limits, reporting
from durable.runtime.ageing import age
from durable.runtime.link import Link
from durable.storage import lanes, maintenance, workers
from durable.storage.workers import Reclaimed
from durable.wakeups import Wakeups

log = logging.getLogger(__name__)


def reap(link: Link, conf: Config, wakeups: Wakeups, connected_since: datetime) -> Reclaimed:
    """Bury leases that ran out, take their rows back, wake workers; return what was done.

    connected_since  the database's clock when this process connected: an outage longer than the lease must not make
                     every worker look dead, so a lease counts as expired only after a full `lease_ttl` of connection
    Raises psycopg.Error.
    """
    for _, who in link.run(workers.bury_expired(connected_since, conf.lease_ttl, conf.reaper_grace)):
        log.warning("the lease of %s ran out", who)
    total = Reclaimed()
    for worker, who in link.run(workers.orphaned()):
        total.add(take_back(link, worker, None, conf.max_crashes, f"{who} stopped answering"))
    if total.ids:
        log.warning("reaped %d rows of dead workers, %d failed for it", len(total.ids), len(total.lost))
    reporting.reaped(total.ids)
    link.notify(wakeups.handed_back(total.by_queue))
    if link.run(lanes.in_use()) and link.run(maintenance.take_duty("limits", conf.reaper_interval * 0.9)):
        limits.repair(link, wakeups)
    age(link, wakeups, conf.reaper_interval * 0.9)
    return total


def take_back(
    link: Link, worker: int, entered: Sequence[tuple[int, int]] | None, max_crashes: int, cause: str
) -> Reclaimed:
    """Take back the rows of a dead worker; those that other sessions hold, or whose parent, are left for a later turn.

    Arguments as for `workers.reclaim`. Raises psycopg.Error.
    """
    reclaimed, _ = link.run_around_locks(lambda wait: workers.reclaim(worker, entered, max_crashes, cause, wait=wait))
    return reclaimed
