"""What a throttled backlog at the head of a queue costs the unlimited rows behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import psycopg

from benchmarks.database import Database, wait_for_count
from benchmarks.drain import run_floor
from benchmarks.figures import FLOOR, Measure, interleave
from benchmarks.registry import Size
from benchmarks.workers import worker

ALONE = "durable, nothing else in the queue"
PARKED = "durable, throttled rows parked"
CANDIDATES = "durable, throttled rows as candidates"


def throttle(database: Database, throttled: int, *, parked: bool) -> None:
    """Put rows before all others that wait for tokens of an empty bucket: inserted together, or each by itself."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute(
            f"INSERT INTO {database.schema}.limits (kind, name, allowed, period, burst)"
            " VALUES ('rate', 'trickle', 1, interval '1 year', 1) ON CONFLICT DO NOTHING"
        )
        connection.execute(f"TRUNCATE {database.schema}.buckets")
        connection.execute(
            f"INSERT INTO {database.schema}.buckets (bucket, shard, full_at, opens_at) VALUES"
            " ('trickle', 0, clock_timestamp() + interval '1 year', clock_timestamp() + interval '1 year')"
        )
        connection.execute(
            f"INSERT INTO {database.schema}.instances"
            " (eligible_at, status, queue, machine, step, state_type, state, rate_limit, lane)"
            " SELECT clock_timestamp() - interval '1 hour', 'runnable', 'default', 'noop', 'run', 'json', '{}',"
            " 'trickle', CASE WHEN %s AND n > 1 THEN 'rate trickle' END FROM generate_series(1, %s) AS n",
            (parked, throttled),
        )
        connection.execute(f"VACUUM ANALYZE {database.schema}.instances")
        connection.execute("CHECKPOINT")


def limits(database: Database, size: Size) -> list[Measure]:
    """Drain unlimited tasks with and without throttled rows at the head of their queue."""

    def run(kind: str, processes: int) -> float:
        database.fill(size.count)
        if kind != ALONE:
            throttle(database, size.count // 2, parked=kind == PARKED)
        with worker(database, processes):
            wait_for_count(database, size.count)
            database.check(size.count)
            return database.rate(size.count)

    measures = []
    for processes in size.processes:
        contenders: dict[str, Callable[[], float]] = {FLOOR: partial(run_floor, database, size.count, processes)}
        contenders |= {kind: partial(run, kind, processes) for kind in (ALONE, PARKED, CANDIDATES)}
        what = f"drain of {size.count:,} tasks behind {size.count // 2:,} throttled ones, {processes} worker processes"
        measures.append(Measure(what, "jobs/s", interleave(size.runs, contenders)))
    return measures
