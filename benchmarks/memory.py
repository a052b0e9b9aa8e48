"""Private memory of a prefork child: after some thousands of tasks, and after twenty times as many."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial

from benchmarks.database import Database, wait_for_count
from benchmarks.figures import OURS, Measure, Series, Target, interleave_many
from benchmarks.processes import private_mb
from benchmarks.registry import Size
from benchmarks.workers import worker

FIRST = 20
"""The first look is after one FIRST-th of the tasks."""
EARLY, LATE = f"{OURS}, early", f"{OURS}, late"


def run(database: Database, processes: int, count: int) -> Mapping[str, float]:
    """Return MB per child, the median of the children, after a part of the tasks and after all."""
    database.fill(0)
    first = max(1, count // FIRST)
    with worker(database, processes):
        database.insert(first)
        wait_for_count(database, first)
        early = _private(database)
        database.insert(count - first)
        wait_for_count(database, count)
        late = _private(database)
    database.check(count)
    return {EARLY: early, LATE: late}


def _private(database: Database) -> float:
    pids = database.value("SELECT array_agg(pid) FROM {schema}.workers WHERE kind = 'worker' AND dead_at IS NULL")
    return statistics.median(private_mb(pid) for pid in pids)


def memory(database: Database, size: Size) -> list[Measure]:
    """Look at the private memory of prefork children after some tasks and after twenty times as many."""
    measures = []
    for processes in size.processes:
        found = interleave_many(size.runs, {OURS: partial(run, database, processes, size.count)})
        series = [Series(name, one.runs) for name, (one,) in found.items()]
        what = f"private memory per prefork child, {size.count // FIRST:,} tasks (early) and {size.count:,} (late)"
        targets = [Target(EARLY, 15.0, None, True), Target(LATE, 1.1, EARLY, True)]
        measures.append(Measure(what, "MB", series, targets))
    return measures
