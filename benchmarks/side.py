"""One side of a comparison, in a process of its own: this checkout's `durable` under the benchmarks' code.

    python -m benchmarks.side '{"act": "drain", "dsn": ..., ...}'    prints JSON: figure's name -> figure

`benchmarks.compare` starts it in a folder that holds `durable` and `durable_cli` of one revision, and the benchmarks
of the working tree.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import durable
from benchmarks import drain as drains
from benchmarks import steps as machines
from benchmarks.database import Database, wait_for_count
from benchmarks.enqueue import CHUNK
from benchmarks.figures import OURS, percentile
from benchmarks.processes import cpu_seconds, family
from benchmarks.stamps import stamps
from benchmarks.wire import Wire, wire
from benchmarks.work import server_cpu
from benchmarks.workers import ROOT, producer, worker
from durable import Durable

CLIENTS = 16
CPU = "CPU per job"
MACHINES = {"plain": "plain_chain", "inline": "inline_chain"}
COUNTED = (2_000, 12_000)
"""Jobs of the two runs whose difference counts statements: what a start costs drops out."""


@dataclass(frozen=True)
class Run:
    """One run of one side.

    Attributes:
        act: A name of ACTS.
        seconds: How long to enqueue (enqueue, latency).
        counts: How many jobs or machines, by figure (drain, steps).
        processes: Worker processes.
        rates: Jobs per second (latency).
        counted: Jobs of the two runs that count statements.
    """

    act: str
    dsn: str
    schema: str
    seconds: float = 5.0
    counts: Mapping[str, int] | None = None
    processes: int = 2
    rates: tuple[float, ...] = ()
    counted: tuple[int, int] = COUNTED

    @property
    def database(self) -> Database:
        """The schema of this side."""
        return Database(self.dsn, self.schema)

    def count(self, figure: str) -> int:
        """Return how many jobs or machines one figure takes."""
        assert self.counts is not None, "the comparison gives them"
        return self.counts[figure]

    def text(self) -> str:
        """Return the argument of `python -m benchmarks.side`."""
        return json.dumps(asdict(self))


def parse(text: str) -> Run:
    """Return the run that `Run.text` wrote."""
    found = json.loads(text)
    return Run(**found | {"rates": tuple(found["rates"]), "counted": tuple(found["counted"])})


def migrate(run: Run) -> dict[str, float]:
    """Make the schema of this side."""
    app = Durable("bench", dsn=run.dsn, schema=run.schema)
    try:
        app.migrate()
    finally:
        app.close()
    return {}


def drain(run: Run) -> dict[str, float]:
    """Return no-op jobs per second of a worker command that empties a queue."""
    return {"no-op jobs": drains.run_durable(run.database, run.count("no-op jobs"), run.processes)}


def steps(run: Run) -> dict[str, float]:
    """Return steps per second of five-step machines, through the claims and inline."""
    found: dict[str, float] = {}
    for name, machine in MACHINES.items():
        run.database.value("CHECKPOINT")
        found[name] = machines.run(run.database, run.processes, run.count(name), machine, "a", machines.STEPS)
    return found


def enqueue(run: Run) -> dict[str, float]:
    """Return tasks per second by `delay()` one by one, by `insert_many`, and by `delay()` of many processes."""
    found: dict[str, float] = {}
    with producer(run.database) as (app, known):
        for name, act, size in (
            ("delay()", lambda: known["noop"].delay(), 1),
            ("insert_many", lambda: app.insert_many([(known["noop"], {})] * CHUNK), CHUNK),
        ):
            run.database.fill(0)
            act()
            done, began = 0, time.monotonic()
            while (passed := time.monotonic() - began) < run.seconds:
                act()
                done += size
            found[name] = done / passed
    run.database.fill(0)
    return found | {f"delay() of {CLIENTS} processes": _by_clients(run)}


def _by_clients(run: Run) -> float:
    """Return tasks per second of processes that enqueue at once: their commits and notifications meet in the server."""
    context = multiprocessing.get_context("fork")
    together, rates = context.Barrier(CLIENTS), context.SimpleQueue()

    def client() -> None:
        with producer(run.database) as (_, known):
            known["noop"].delay()
            together.wait(timeout=60)
            done, began = 0, time.monotonic()
            while (passed := time.monotonic() - began) < run.seconds:
                known["noop"].delay()
                done += 1
            rates.put(done / passed)

    processes = [context.Process(target=client) for _ in range(CLIENTS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"clients ended with {[process.exitcode for process in processes]}")
    return float(sum(rates.get() for _ in processes))


def latency(run: Run) -> dict[str, float]:
    """Return milliseconds from `delay()` to the step's start (p50, p95, p99) and of CPU per job, at each rate."""
    found: dict[str, float] = {}
    for rate in run.rates:
        waits, cpu = _waits(run.database, run.processes, rate, run.seconds)
        found |= {f"p{percent} at {rate:g}/s": percentile(waits, percent) for percent in (50, 95, 99)}
        found[f"{CPU} at {rate:g}/s"] = cpu
    return found


def _waits(database: Database, processes: int, rate: float, seconds: float) -> tuple[list[float], float]:
    """Return the waits in ms of jobs that come at a steady rate to a warm worker, and the CPU of each in ms.

    The CPU is that of the worker command and of the server.
    """
    database.fill(0)
    with (
        stamps() as place,
        worker(database, processes, "-B", environment=place.environment) as command,
        producer(database) as (_, known),
    ):
        stamped = known["stamp"]
        for phase in (min(1.0, seconds), seconds):  # the first warms sessions and plans of every process
            count = max(2, round(rate * phase))
            family_before = family(command.pid)
            before = cpu_seconds(family_before) + server_cpu(database)
            _at_rate(rate, count, lambda: stamped.delay(time.monotonic_ns()))
            waits = place.take(count)
            spent = cpu_seconds(family_before) + server_cpu(database) - before
    return waits, 1000 * spent / count


def _at_rate(rate: float, count: int, act: Callable[[], object]) -> None:
    """Act `count` times, `rate` times a second, whether an act took long or not."""
    began = time.monotonic()
    for n in range(count):
        time.sleep(max(0.0, began + n / rate - time.monotonic()))
        act()


def count_drain(run: Run) -> dict[str, float]:
    """Return a worker's statements and round trips per 1,000 no-op jobs, and bytes of WAL per job."""
    measured = drains.wal(run.database, run.counted[1], 1)
    found = _per_thousand(run, lambda database, count: _drained(database, count, "noop", "run"), "no-op jobs")
    ours = measured.find(OURS)
    return found | ({"WAL, bytes per no-op job": ours.median} if ours is not None else {})


def count_steps(run: Run) -> dict[str, float]:
    """Return a worker's statements and round trips per 1,000 machines of five steps."""
    found: dict[str, float] = {}
    for name, machine in MACHINES.items():
        smaller = replace(run, counted=(run.counted[0] // machines.STEPS, run.counted[1] // machines.STEPS))
        found |= _per_thousand(smaller, lambda d, n, m=machine: _drained(d, n, m, "a"), f"{name} machines")  # type: ignore[misc]
    return found


def count_enqueue(run: Run) -> dict[str, float]:
    """Return a producer's statements and round trips per 1,000 tasks, by `delay()` and by `insert_many`."""

    def delay(database: Database, count: int) -> Wire:
        with wire(database.dsn) as counter, producer(replace(database, dsn=counter.dsn)) as (_, known):
            for _ in range(count // 10):
                known["noop"].delay()
        return counter

    def many(database: Database, count: int) -> Wire:
        with wire(database.dsn) as counter, producer(replace(database, dsn=counter.dsn)) as (app, known):
            for _ in range(count // 1000):
                app.insert_many([(known["noop"], {})] * 1000)
        return counter

    run.database.empty()
    found = {name: 10 * figure for name, figure in _per_thousand(run, delay, "delay()").items()}
    return found | _per_thousand(run, many, "tasks of insert_many")


def count_latency(run: Run) -> dict[str, float]:
    """Return a worker command's statements per job at each rate, polls and beats included."""
    found: dict[str, float] = {}
    for rate in run.rates:
        run.database.empty()
        with (
            wire(run.dsn) as counter,
            worker(replace(run.database, dsn=counter.dsn), run.processes, "-B"),
            producer(run.database) as (_, known),
        ):
            known["noop"].delay().get(timeout=30)
            before = counter.statements.total()
            count = max(2, round(rate * run.seconds))
            _at_rate(rate, count, known["noop"].delay)
            wait_for_count(run.database, count + 1)
            found[f"statements per job at {rate:g}/s"] = (counter.statements.total() - before) / count
    return found


def _drained(database: Database, count: int, machine: str, step: str) -> Wire:
    """Empty a queue with one process behind a proxy; return the proxy with its counts."""
    database.fill(count, machine, step)
    with wire(database.dsn) as counter, worker(replace(database, dsn=counter.dsn), 1):
        wait_for_count(database, count)
    return counter


def _per_thousand(run: Run, act: Callable[[Database, int], Wire], of: str) -> dict[str, float]:
    few, many = (act(run.database, count) for count in run.counted)
    thousands = (run.counted[1] - run.counted[0]) / 1000
    return {
        f"statements per 1,000 {of}": (many.statements.total() - few.statements.total()) / thousands,
        f"round trips per 1,000 {of}": (many.round_trips - few.round_trips) / thousands,
    }


ACTS: Mapping[str, Callable[[Run], dict[str, float]]] = {
    act.__name__: act
    for act in (migrate, drain, steps, enqueue, latency, count_drain, count_steps, count_enqueue, count_latency)
}


def main() -> None:
    """Run what the first argument says, and print its figures."""
    run = parse(sys.argv[1])
    if Path(durable.__file__).parent.parent != ROOT:
        raise RuntimeError(f"the run at {ROOT} imported durable from {durable.__file__}; unset PYTHONPATH")
    print(json.dumps(ACTS[run.act](run)))


if __name__ == "__main__":
    main()
