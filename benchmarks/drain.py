"""How fast workers empty a queue of no-op tasks, results kept, beside the SQL floor with as many processes."""

from __future__ import annotations

import os

import psycopg

from benchmarks import floor
from benchmarks.database import Database, wait_for_count
from benchmarks.enqueue import copy
from benchmarks.figures import FLOOR, OURS, Measure, Target, interleave
from benchmarks.registry import Size
from benchmarks.workers import producer, worker

TARGETS = {1: 0.65, 2: 0.6}
WAL_COUNT = 20_000


def run_floor(database: Database, count: int, processes: int) -> float:
    """Return the floor's jobs per second."""
    database.fill(count)
    floor.run(database, processes)
    database.check(count)
    return database.rate(count)


def run_durable(database: Database, count: int, processes: int) -> float:
    """Return our jobs per second: a real worker command, from its first to its last committed outcome."""
    database.fill(count)
    with worker(database, processes):
        wait_for_count(database, count)
        database.check(count)
        return database.rate(count)


def drain(database: Database, size: Size) -> list[Measure]:
    """Empty a queue of no-op tasks, results kept; and the WAL that a task costs from enqueue to history."""
    measures = []
    for processes in size.processes:
        series = interleave(
            size.runs,
            {
                FLOOR: lambda n=processes: run_floor(database, size.count, n),  # type: ignore[misc]
                OURS: lambda n=processes: run_durable(database, size.count, n),  # type: ignore[misc]
            },
        )
        what = f"drain of {size.count:,} no-op tasks, {processes} worker process{'es' if processes > 1 else ''}"
        targets = [Target(OURS, TARGETS[processes], FLOOR)] if processes in TARGETS else []
        measures.append(Measure(what, "jobs/s", series, targets))
    return [*measures, *_more_processes(measures, size), wal(database, min(size.count, WAL_COUNT), size.runs)]


def _more_processes(measures: list[Measure], size: Size) -> list[Measure]:
    """Compare each number of processes beyond the two cores with two: our totals side by side."""
    totals = dict(zip(size.processes, measures, strict=True))
    compared = []
    for processes in (number for number in size.processes if number > 2 and 2 in totals):
        sides = []
        for number in (2, processes):
            ours = totals[number].find(OURS)
            assert ours is not None, "it was just run"
            sides.append(type(ours)(f"{OURS}, {number} processes", ours.runs))
        targets = [Target(sides[1].name, 0.95, sides[0].name)]
        compared.append(Measure(f"drain with {processes} processes beside two", "jobs/s", sides, targets))
    return compared


def wal(database: Database, count: int, runs: int) -> Measure:
    """Return bytes of WAL per task without full-page images, inserted in batches and drained by one process."""

    def of_floor() -> None:
        copy(database, count)
        floor.run(database, 1)

    def of_ours() -> None:
        with worker(database, 1), producer(database) as (app, known):
            for at in range(0, count, 1000):
                app.insert_many([(known["noop"], {})] * min(1000, count - at))
            wait_for_count(database, count)

    measure = Measure(
        f"WAL per no-op task, of {count:,}, enqueued and run", "bytes", [], [Target(OURS, 1100, None, True)]
    )
    try:
        database.value("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
    except psycopg.Error as error:
        for series in (measure_series := interleave(0, {FLOOR: float, OURS: float})):
            series.missing = f"not available here: {str(error).splitlines()[0]}"
        measure.series = measure_series
        return measure

    def bytes_of(act: object) -> float:
        assert callable(act)
        database.fill(0)
        with psycopg.connect(database.dsn, autocommit=True) as keeper:
            # A checkpoint would remove the WAL that is to be read.
            keeper.execute("SELECT pg_create_physical_replication_slot(%s, true, true)", [f"bench_{os.getpid()}"])
            began = database.value("SELECT pg_current_wal_insert_lsn()")
            act()
            database.check(count)
            # In pages of 8 kB the last record may not be flushed yet: `flush_lsn` is where it can be read up to.
            written = database.value(
                "SELECT sum(record_size)::float8 FROM pg_get_wal_stats(%s, pg_current_wal_flush_lsn(), true)", [began]
            )
        return float(written) / count

    measure.series = interleave(runs, {FLOOR: lambda: bytes_of(of_floor), OURS: lambda: bytes_of(of_ours)})
    return measure
