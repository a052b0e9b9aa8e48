"""What a throttled backlog at the head of a queue costs the unlimited rows behind it."""

from __future__ import annotations

import statistics

import psycopg

from benchmarks.database import Database, wait_for_count
from benchmarks.drain import start

KINDS = ("nothing else in the queue", "throttled rows parked", "throttled rows as candidates")


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


def backlog(database: Database, processes: int, count: int, throttled: int, rounds: int) -> dict[str, float]:
    """Return jobs per second of `count` unlimited no-op tasks for each of KINDS, medians of interleaved runs."""
    runs: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            database.fill(count)
            if kind != KINDS[0]:
                throttle(database, throttled, parked=kind == KINDS[1])
            worker = start(database, processes)
            try:
                wait_for_count(database, count)
                runs[kind].append(database.rate(count))
            finally:
                worker.terminate()
                worker.wait()
    return {kind: statistics.median(rates) for kind, rates in runs.items()}
