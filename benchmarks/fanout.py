"""One parent and its children, from its insert to its join, beside no-op jobs and the SQL floor."""

from __future__ import annotations

from functools import partial

from benchmarks.database import Database
from benchmarks.drain import run_durable, run_floor
from benchmarks.figures import FLOOR, Measure, Target, interleave
from benchmarks.registry import Size
from benchmarks.workers import cluster

NOOPS, CHILDREN = "durable, no-op jobs", "durable, children"


def run(database: Database, children: int, processes: int) -> float:
    """Return children per second, by the database's clock. Raises RuntimeError when the join saw another number."""
    database.empty()
    with cluster(database, processes) as (app, known):
        began = database.clock()
        joined = app.insert(known["fan"], kwargs={"n": children}).get(timeout=600)
        seconds = database.finished_after(began)
    if joined != children:
        raise RuntimeError(f"{joined} of {children} children were done at the join")
    return children / seconds


def fanout(database: Database, size: Size) -> list[Measure]:
    """Fan out one parent to no-op children and join them, beside a drain of as many no-op jobs."""
    measures = []
    for processes in size.processes:
        series = interleave(
            size.runs,
            {
                FLOOR: partial(run_floor, database, size.count, processes),
                NOOPS: partial(run_durable, database, size.count, processes),
                CHILDREN: partial(run, database, size.count, processes),
            },
        )
        what = f"one parent with {size.count:,} children, from spawn to join, {processes} worker processes"
        measures.append(Measure(what, "children/s", series, [Target(CHILDREN, 0.6, NOOPS)]))
    return measures
