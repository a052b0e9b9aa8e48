"""Garbage collection: what retention no longer holds, in bounded batches; the history goes by whole partitions."""

from __future__ import annotations

import logging

from psycopg.errors import LockNotAvailable

from durable.config import Config
from durable.runtime import reporting
from durable.runtime.link import Link
from durable.storage import instances, lanes, maintenance, partitions

log = logging.getLogger(__name__)

BATCH = 1000
CASCADE_LEFT = 60.0
"""Seconds after which a cascading cancel that nobody works on is finished here."""


def collect(link: Link, conf: Config) -> int:
    """Make partitions ahead, drop old ones, sweep kept rows, idle gates and buckets, forgotten leases,
    signals of instances that are gone.

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
    _finish_cascades(link)
    if dropped or swept or gates or buckets:
        log.info("garbage collected: partitions %s, %d rows, %d gates, %d buckets", dropped, swept, gates, buckets)
    removed = len(dropped) + swept + forgotten
    reporting.swept(removed, buckets, gates)
    return removed + buckets + gates


def _finish_cascades(link: Link) -> None:
    """Finish cascading cancels whose process ended before it was through."""
    try:
        while link.run_atomically(instances.finish_cascade(CASCADE_LEFT)) is not None:
            log.warning("a cascading cancel was finished whose process had ended before it was through")
    except LockNotAvailable:
        log.info("a cascading cancel meets a row that another session holds; it is tried again at the next turn")
