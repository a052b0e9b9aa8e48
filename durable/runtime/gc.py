"""Garbage collection: what retention no longer holds, in bounded batches; the history goes by whole partitions."""

from __future__ import annotations

import logging

from durable.config import Config
from durable.runtime import reporting
from durable.runtime.link import Link
from durable.storage import maintenance, partitions

log = logging.getLogger(__name__)

BATCH = 1000


def collect(link: Link, conf: Config) -> int:
    """Make partitions ahead, drop old ones, sweep kept rows and forgotten leases; return rows and partitions removed.

    Raises psycopg.Error.
    """
    partitions.ensure(link.connection, link.sql)
    dropped = partitions.drop_before(link.connection, link.sql, conf.retention)
    swept = 0
    while (count := link.run(maintenance.sweep_kept(conf.retention, BATCH))) > 0:
        swept += count
    forgotten = link.run(maintenance.sweep_workers()) + link.run(maintenance.sweep_signals())
    if dropped or swept:
        log.info("garbage collected: partitions %s, %d kept rows", dropped, swept)
    removed = len(dropped) + swept + forgotten
    reporting.swept(removed)
    return removed
