"""What a throttled backlog at the head of a queue costs the unlimited rows behind it."""

from __future__ import annotations

import os
import resource
import statistics
import time
from dataclasses import dataclass, fields
from pathlib import Path

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


@dataclass(frozen=True)
class Run:
    """One drain, and the work it took: what a shared machine's noise hardly changes.

    rate     unlimited rows per second
    buffers  pages that the server touched, per row
    server   microseconds of CPU of all of the server's processes, per row
    workers  microseconds of CPU of the worker command's processes, per row
    """

    rate: float
    buffers: float
    server: float
    workers: float


def _server_cpu(database: Database) -> float:
    """CPU seconds of every process that the server has had so far."""
    with psycopg.connect(database.dsn) as connection:
        postmaster = _stat(connection.info.backend_pid)[1]
    ticks = sum(_stat(postmaster)[11:15])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = _stat(int(folder.name))
        except OSError:
            continue
        ticks += sum(stat[11:13]) if stat[1] == postmaster else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[int]:
    """The numbers of /proc/PID/stat behind the state; [1] the parent, [11:15] the times (the first is put as 0)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [0, *map(int, fields[1:])]


def _buffers(database: Database) -> int:
    """Pages that were touched so far, by sessions that have ended or told of it."""
    with psycopg.connect(database.dsn) as connection:
        row = connection.execute(
            "SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    return int(row[0]) if row else 0


def _drain(database: Database, processes: int, count: int) -> Run:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = children.ru_utime + children.ru_stime
    buffers, server = _buffers(database), _server_cpu(database)
    worker = start(database, processes)
    try:
        wait_for_count(database, count)
        rate = database.rate(count)
    finally:
        worker.terminate()
        worker.wait()
    time.sleep(1.0)  # the last sessions end
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(
        rate,
        (_buffers(database) - buffers) / count,
        (_server_cpu(database) - server) * 1e6 / count,
        (children.ru_utime + children.ru_stime - before) * 1e6 / count,
    )


def backlog(database: Database, processes: int, count: int, throttled: int, rounds: int) -> dict[str, Run]:
    """Drain `count` unlimited no-op tasks for each of KINDS; medians of interleaved runs."""
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind in KINDS if turn % 2 else reversed(KINDS):
            database.fill(count)
            if kind != KINDS[0]:
                throttle(database, throttled, parked=kind == KINDS[1])
            runs[kind].append(_drain(database, processes, count))
    return {
        kind: Run(*(statistics.median(getattr(run, field.name) for run in of_kind) for field in fields(Run)))
        for kind, of_kind in runs.items()
    }
