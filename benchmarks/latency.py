"""How soon an idle worker starts what is enqueued, 20 a second, and how soon the caller has the result."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg

from benchmarks import floor
from benchmarks.database import Database
from benchmarks.figures import FLOOR, OURS, Measure, Series, Target, interleave_many, percentile
from benchmarks.registry import Size
from benchmarks.stamps import Stamps, stamps
from benchmarks.workers import ROOT, cluster

INTERVAL = 0.05
COUNTDOWN = 0.3
INSERT = (
    "WITH sent AS (INSERT INTO {schema}.instances (eligible_at, status, queue, machine, step, state_type, state)"
    " VALUES (clock_timestamp(), 'runnable', 'default', 'stamp', 'run', 'json', %s))"
    " SELECT pg_notify(%s, '')"
)
P50, P99 = "p50", "p99"
STARTED, RESULT, DUE = "delay() called to step start", "delay().get()", "a row due in 0.3 s finished after its time"


def paced(count: int, act: Callable[[], object]) -> None:
    """Act `count` times, INTERVAL apart."""
    for _ in range(count):
        act()
        time.sleep(INTERVAL)


def of_floor(database: Database, count: int) -> Mapping[str, float]:
    """Return the floor's waits in ms: INSERT and NOTIFY in one statement, LISTEN and one claim."""
    database.empty()
    with stamps() as place, _listener(database, place), psycopg.connect(database.dsn, autocommit=True) as connection:
        statement = INSERT.format(schema=database.schema).encode()

        def send() -> None:
            state = b'{"sent": %d}' % time.monotonic_ns()
            connection.execute(statement, [state, floor.CHANNEL], prepare=True)

        send()
        place.take(1)
        paced(count, send)
        waits = place.take(count)
    return {f"{STARTED}, {P50}": percentile(waits, 50), f"{STARTED}, {P99}": percentile(waits, 99)}


@contextmanager
def _listener(database: Database, place: Stamps) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.floor", "listen", database.dsn, database.schema, "1000"],
        cwd=ROOT,
        env={**os.environ, **place.environment},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def step_starts(database: Database, processes: int, count: int) -> list[float]:
    """Return our waits in ms from `delay()` called to the step's start."""
    database.empty()
    with stamps() as place, cluster(database, processes, environment=place.environment) as (_, known):
        return _starts(place, known["stamp"], count)


def _starts(place: Stamps, stamped: Any, count: int) -> list[float]:
    stamped.delay(time.monotonic_ns()).get(timeout=30)
    place.take(1)
    paced(count, lambda: stamped.delay(time.monotonic_ns()))
    return place.take(count)


def of_ours(database: Database, processes: int, count: int) -> Mapping[str, float]:
    """Return our waits in ms: to the step's start, to the result, and how late due rows are finished."""
    database.empty()
    with stamps() as place, cluster(database, processes, environment=place.environment) as (_, known):
        noop = known["noop"]
        waits = _starts(place, known["stamp"], count)
        results = []

        def get() -> None:
            began = time.monotonic()
            noop.delay().get(timeout=30)
            results.append(1000 * (time.monotonic() - began))

        paced(count, get)
        due = [noop.apply_async(countdown=COUNTDOWN + n * INTERVAL) for n in range(max(1, count // 4))]
        for result in due:
            result.get(timeout=30)
        late = [
            float(value)
            for value in database.value(
                "SELECT array_agg(1000 * extract(epoch FROM finished_at - eligible_at)::float8)"
                " FROM {schema}.history WHERE id = ANY (%s)",
                ([result.id for result in due],),
            )
        ]
    return {
        f"{what}, {name}": percentile(values, percent)
        for what, values in ((STARTED, waits), (RESULT, results), (DUE, late))
        for name, percent in ((P50, 50), (P99, 99))
    }


TARGETS = {f"{STARTED}, {P50}": 2.0, f"{STARTED}, {P99}": 4.0, f"{RESULT}, {P50}": 4.0}


def latency(database: Database, size: Size) -> list[Measure]:
    """Enqueue 20 a second on an idle worker: milliseconds to the step's start, to the result, and past a due time."""
    measures = []
    for processes in size.processes:
        found = interleave_many(
            size.runs,
            {FLOOR: lambda: of_floor(database, size.count), OURS: lambda n=processes: of_ours(database, n, size.count)},  # type: ignore[misc]
        )
        measures += [measure(what, series) for what, series in found.items()]
    return measures


def measure(what: str, series: list[Series]) -> Measure:
    """Return one figure's measure with its target."""
    return Measure(what, "ms", series, [Target(OURS, TARGETS[what], None, True)] if what in TARGETS else [])
