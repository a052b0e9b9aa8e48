"""Latency under a steady load: `delay()` called to the end of a 1 ms step, at rates from 10 to 1,000 jobs a second.

Producers are processes of their own that call at even distances, whatever the calls take. A job tells the benchmark
when its step has ended; the clock is the machine's monotonic one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.database import Database
from benchmarks.figures import OURS, Measure, Series, Target, percentile
from benchmarks.latency import latency as idle_latency
from benchmarks.pace import pace
from benchmarks.peers.celery import CeleryRedis
from benchmarks.peers.measure import prepared, unavailable, working
from benchmarks.peers.servers import servers as peers_servers
from benchmarks.processes import cpu_seconds, family
from benchmarks.registry import Size
from benchmarks.stamps import Stamps, stamps
from benchmarks.workers import ROOT, producer, worker

RATES, FEW_RATES = (10, 20, 40, 80, 160, 500, 1000), (20, 80, 160, 500)
LEAST_SECONDS = 4.0
P50, P99, CPU = "p50", "p99", "CPU per job"
MOST = {P50: 3.5, P99: 10.0}
"""Milliseconds."""
WARM_UP = 1.5
"""Seconds of the same load before the measured part: pools open, processes learn how long steps take."""


@dataclass(frozen=True)
class Load:
    """One cell of the table.

    kind       task, atask (`async def`), machine (three steps, not inline), chain (three tasks), signal
    rate       jobs per second, of all producers together
    seconds    how long the measured part lasts
    producers  how many processes enqueue
    """

    kind: str
    rate: int
    seconds: float = LEAST_SECONDS
    producers: int = 1


@dataclass(frozen=True)
class Waits:
    """What a cell showed: waits, and the processor time a job cost producers, workers and server. Milliseconds."""

    waits: list[float]
    cpu: float

    def figures(self) -> dict[str, float]:
        """Return what is printed, by name."""
        return {P50: percentile(self.waits, 50), P99: percentile(self.waits, 99), CPU: self.cpu}


def processor_times(pids: Sequence[int]) -> dict[int, float]:
    """Return the processor time of each process in seconds, of those that have not ended."""
    found = {}
    for pid in pids:
        with suppress(FileNotFoundError):
            found[pid] = cpu_seconds([pid])
    return found


def measure(
    load: Load, place: Stamps, command: Sequence[str], environment: Mapping[str, str], servers: Sequence[int]
) -> Waits:
    """Run a load with producers started by `command RATE SECONDS BEGIN`; return what was seen.

    Args:
        servers: Pids of the worker command and of the database or broker, whose processor time counts.
    """
    each = load.rate / load.producers
    begin = time.monotonic() + 1.5  # they must have imported what they need
    producers = [
        subprocess.Popen(
            [*command, str(each), str(WARM_UP + load.seconds), str(begin + n / load.rate)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,  # they stay until it is closed, so that their processor time can be read
        )
        for n in range(load.producers)
    ]
    warm = max(1, round(load.rate * WARM_UP))
    place.take(warm)
    pids = [pid for root in (*servers, *(process.pid for process in producers)) for pid in family(root)]
    before, count = processor_times(pids), round(load.rate * load.seconds)
    waits = place.take(max(1, count - load.producers - 1))
    spent = sum(time - before[pid] for pid, time in processor_times(list(before)).items())
    for process in producers:
        process.communicate()
        if process.returncode:
            raise RuntimeError(f"a producer ended with {process.returncode}")
    place.drain()
    return Waits(waits, 1000 * spent / len(waits))


@contextmanager
def durable_cell(
    database: Database, children: int, pool: str = "prefork"
) -> Iterator[tuple[Stamps, dict[str, str], list[int]]]:
    """Our workers: where their stamps arrive, the environment of producers, the pids of servers."""
    database.empty()
    with (
        stamps() as place,
        worker(database, children, "-B", "-P", pool, environment=place.environment) as command,
        producer(database) as (_app, known),
    ):
        known["noop"].delay().get(timeout=30)
        environment = {"DURABLE_DSN": database.dsn, "BENCH_SCHEMA": database.schema, **place.environment}
        yield place, environment, [command.pid, postmaster(database)]


def postmaster(database: Database) -> int:
    """Return the pid of the server's main process, which is on this machine."""
    with psycopg.connect(database.dsn) as connection:
        status = Path(f"/proc/{connection.info.backend_pid}/stat").read_text(encoding="ascii")
    return int(status.rpartition(")")[2].split()[1])


def producing(kind: str) -> list[str]:
    """Return the command of one of our producers."""
    return [sys.executable, "-m", "benchmarks.steady", kind]


@contextmanager
def celery_cell(database: Database, children: int) -> Iterator[tuple[Stamps, Mapping[str, str], list[int]]]:
    """Celery's workers with Redis, as `durable_cell`."""
    with (
        stamps() as place,
        peers_servers(set(CeleryRedis.servers)) as environment,
        prepared(CeleryRedis, database, {**environment, **place.environment}) as own,
        working(CeleryRedis, own, children),
    ):
        yield place, own, [os.getpid()]  # the worker and Redis are below this process


@dataclass(frozen=True)
class Part:
    """Rates under one setting, in one run of the workers."""

    kind: str
    rates: Sequence[int]
    children: int = 4
    producers: int = 1
    pool: str = "prefork"

    def __str__(self) -> str:
        producers = "" if self.producers == 1 else f", {self.producers} producers"
        return f"{self.kind}, {self.pool}, {self.children} children{producers}"


PARTS = (
    Part("task", RATES),
    Part("task", RATES, producers=4),
    Part("task", FEW_RATES, children=1),
    Part("task", FEW_RATES, children=10),
    Part("atask", FEW_RATES, pool="asyncio"),
    Part("machine", FEW_RATES[:-1]),
    Part("chain", FEW_RATES[:-1]),
    Part("signal", FEW_RATES[:-1]),
)


def latency(database: Database, size: Size) -> list[Measure]:
    """Milliseconds from `delay()`: on an idle worker; then at 10 to 1,000 a second beside Celery, to a step's end."""
    measures = idle_latency(database, size)
    brief = size.count < 50  # a trial of the benchmark itself
    for part in PARTS[:1] if brief else PARTS:
        rates = part.rates[:1] if brief else part.rates
        loads = [
            Load(part.kind, rate, max(size.count / rate, LEAST_SECONDS * (not brief)), part.producers) for rate in rates
        ]
        with durable_cell(database, part.children, part.pool) as (place, environment, pids):
            ours = [measure(load, place, producing(part.kind), environment, pids) for load in loads]
        theirs: list[Waits] = []
        missing = unavailable(CeleryRedis) if part.kind == "task" else "not measured: another kind of work"
        if not missing:
            command = [sys.executable, "-m", "benchmarks.peers", "CeleryRedis", "steady"]
            with celery_cell(database, part.children) as (place, celery_environment, pids):
                theirs = [measure(load, place, command, celery_environment, pids) for load in loads]
        for n, load in enumerate(loads):
            for figure, value in ours[n].figures().items():
                series = [Series(OURS, [value])]
                if figure != CPU:
                    beside = [theirs[n].figures()[figure]] if theirs else []
                    series.append(Series(CeleryRedis.name, beside, CeleryRedis.setting, missing))
                goal = [Target(OURS, MOST[figure], None, True)] if part.kind.endswith("task") and figure in MOST else []
                measures.append(Measure(f"{part}, {load.rate} a second, {figure}", "ms", series, goal))
    return measures


def _acts(kind: str) -> Callable[[int], object]:
    from benchmarks import bench_tasks as tasks  # the app needs the environment

    if kind == "task":
        return tasks.work.delay
    if kind == "atask":
        return tasks.awork.delay
    if kind == "machine":
        return lambda sent: tasks.WorkChain.delay(sent=sent)
    if kind == "chain":
        return lambda sent: (tasks.nothing.si() | tasks.nothing.si() | tasks.work.si(sent)).delay()
    if kind == "signal":
        parked: list[Any] = [tasks.WorkSleeper.delay() for _ in range(int(os.environ["BENCH_PARKED"]))]
        time.sleep(0.5)
        return lambda sent: parked.pop().signal("wake", sent)
    raise SystemExit(f"no such kind: {kind}")


def main(kind: str, rate: str, seconds: str, begin: str) -> None:
    """Be a producer."""
    if kind == "signal":
        os.environ["BENCH_PARKED"] = str(round(float(rate) * float(seconds)) + 1)
    pace(_acts(kind), float(rate), float(seconds), float(begin))
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
