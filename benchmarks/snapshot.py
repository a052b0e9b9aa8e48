"""What a snapshot that another session holds costs: nothing it may still see can be vacuumed away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import psycopg

from benchmarks import floor
from benchmarks.database import Database, wait_for_count
from benchmarks.figures import OURS, Measure, Target, interleave
from benchmarks.registry import Size
from benchmarks.workers import worker

ALONE, HELD = "alone", "a snapshot held"


@contextmanager
def held(database: Database) -> Iterator[None]:
    """A session in a REPEATABLE READ transaction that has read."""
    with psycopg.connect(database.dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute(f"SELECT count(*) FROM {database.schema}.workers")
        yield


def of_floor(database: Database, processes: int, count: int) -> None:
    """Drain."""
    floor.run(database, processes)


def of_ours(database: Database, processes: int, count: int) -> None:
    """Drain."""
    with worker(database, processes):
        wait_for_count(database, count)


def run(database: Database, count: int, drain: Callable[[], None], snapshot: bool) -> float:
    """Return jobs per second."""
    database.fill(count)
    if snapshot:
        with held(database):
            drain()
    else:
        drain()
    database.check(count)
    return database.rate(count)


def snapshot(database: Database, size: Size) -> list[Measure]:
    """Drain no-op tasks while another session holds a snapshot, and without."""
    measures = []
    for processes in size.processes:
        series = interleave(
            size.runs,
            {
                f"{name}, {kind}": partial(
                    run, database, size.count, partial(drain, database, processes, size.count), kind == HELD
                )
                for name, drain in (("SQL floor", of_floor), (OURS, of_ours))
                for kind in (ALONE, HELD)
            },
        )
        what = f"drain of {size.count:,} tasks beside a held snapshot, {processes} worker processes"
        measures.append(Measure(what, "jobs/s", series, [Target(f"{OURS}, {HELD}", 0.85, f"{OURS}, {ALONE}")]))
    return measures
