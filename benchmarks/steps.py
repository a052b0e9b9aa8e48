"""Steps of five-step machines, through the picker and inline, beside no-op jobs and the SQL floor."""

from __future__ import annotations

from benchmarks import floor
from benchmarks.database import Database, wait_for_count
from benchmarks.figures import FLOOR, Measure, Target, interleave
from benchmarks.registry import Size
from benchmarks.workers import cluster

STEPS = 5
NOOPS, PLAIN, INLINE = "durable, no-op jobs", "durable, plain", "durable, inline"


def run(database: Database, processes: int, count: int, machine: str, step: str, steps: int) -> float:
    """Return steps per second on a worker that is up, from the commit of the rows to the last one done."""
    with cluster(database, processes) as (_, known):
        database.empty()
        began = database.insert(count, machine, step)
        known["noop"].delay()  # it wakes the workers, as an insert of theirs does
        wait_for_count(database, count + (machine == "noop"), machine=machine)
        seconds = database.finished_after(began)
    database.check(count + (machine == "noop"), steps, "4" if steps > 1 else "null", machine)
    return count * steps / seconds


def run_floor(database: Database, processes: int, count: int) -> float:
    """Return the floor's steps per second."""
    database.fill(count, "plain_chain", "a")
    began = floor.run(database, processes, STEPS)
    database.check(count, STEPS, machine="plain_chain")
    return count * STEPS / database.finished_after(began)


def steps(database: Database, size: Size) -> list[Measure]:
    """Run five-step machines, each step through the picker or inline, beside as many no-op jobs."""
    measures = []
    for processes in size.processes:
        series = interleave(
            size.runs,
            {
                FLOOR: lambda n=processes: run_floor(database, n, size.count),  # type: ignore[misc]
                NOOPS: lambda n=processes: run(database, n, size.count * STEPS, "noop", "run", 1),  # type: ignore[misc]
                PLAIN: lambda n=processes: run(database, n, size.count, "plain_chain", "a", STEPS),  # type: ignore[misc]
                INLINE: lambda n=processes: run(database, n, size.count, "inline_chain", "a", STEPS),  # type: ignore[misc]
            },
        )
        what = f"{size.count:,} machines of five steps, {processes} worker process{'es' if processes > 1 else ''}"
        measures.append(Measure(what, "steps/s", series, [Target(INLINE, 1.0, NOOPS), Target(PLAIN, 0.7, NOOPS)]))
    return measures
