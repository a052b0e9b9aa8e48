"""Garbage collection: what retention no longer holds, in bounded batches; the history goes by whole partitions."""

from __future__ import annotations

import logging

from durable.config import Config
from durable.runtime import reporting
from durable.runtime.link import Link
from durable.storage import lanes, maintenance, partitions

log = logging.getLogger(__name__)

BATCH = 1000


def collect(link: Link, conf: Config) -> int:
    """Make partitions ahead, drop old ones, sweep kept rows, idle gates and buckets, forgotten leases.

    Returns how many rows and partitions were removed, gates and buckets included. Raises psycopg.Error.
    """
    partitions.ensure(link.connection, link.sql)
    dropped = partitions.drop_before(link.connection, link.sql, conf.retention)
    swept = 0
    while (count := link.run(maintenance.sweep_kept(conf.retention, BATCH))) > 0:
        swept += count
    gates = buckets = 0
    while any(shards := link.run(lanes.sweep(BATCH))):
        gates += shards[0]
        buckets += shards[1]
    forgotten = link.run(maintenance.sweep_workers()) + link.run(maintenance.sweep_signals())
    if dropped or swept or gates or buckets:
        log.info("garbage collected: partitions %s, %d rows, %d gates, %d buckets", dropped, swept, gates, buckets)
    removed = len(dropped) + swept + forgotten
    reporting.swept(removed, buckets, gates)
    return removed + buckets + gates
