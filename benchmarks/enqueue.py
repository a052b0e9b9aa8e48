"""What enqueueing costs: `delay()` beside a bare INSERT of the same row, batches beside COPY of the same rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

import psycopg

from benchmarks.database import Database
from benchmarks.figures import FLOOR, OURS, Measure, Target, interleave
from benchmarks.registry import Size
from benchmarks.workers import producer

INSERT = (
    "INSERT INTO {schema}.instances (eligible_at, status, queue, machine, step, state_type, state)"
    " VALUES (clock_timestamp(), 'runnable', 'default', 'noop', 'run', 'json', %s) RETURNING id"
)
COPY = "COPY {schema}.instances (eligible_at, status, queue, machine, step, state_type, state, max_attempts) FROM STDIN"
CHUNK = 10_000
SINGLE = 20
"""So many rows of a batch for one that is inserted by itself."""
BY_BATCH = f"{OURS}, batch()"


def insert(database: Database, count: int) -> None:
    """Insert `count` no-op tasks, each its own commit, by bare psycopg."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        statement = INSERT.format(schema=database.schema).encode()
        for _ in range(count):
            connection.execute(statement, [json.dumps({}).encode()], prepare=True).fetchone()


def copy(database: Database, count: int) -> None:
    """Copy `count` no-op tasks in, encoding each, in transactions of CHUNK rows."""
    statement = COPY.format(schema=database.schema).encode()
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        for at in range(0, count, CHUNK):
            with connection.cursor() as cursor, cursor.copy(statement) as rows:
                for _ in range(min(CHUNK, count - at)):
                    encoded = json.dumps({}).encode()
                    rows.write_row((datetime.now(UTC), "runnable", "default", "noop", "run", "json", encoded, None))


def timed(database: Database, count: int, act: Callable[[Database, int], None]) -> float:
    """Return rows per second of an act on empty tables. Raises RuntimeError unless every row is there."""
    database.fill(0)
    began = time.monotonic()
    act(database, count)
    seconds = time.monotonic() - began
    if (found := database.count("runnable", "noop")) != count:
        raise RuntimeError(f"{count} rows were to be enqueued, {found} are there")
    return count / seconds


def delay(database: Database, count: int) -> None:
    """Enqueue `count` no-op tasks by `delay()`, one by one."""
    with producer(database) as (_, known):
        for _ in range(count):
            known["noop"].delay()


def insert_many(database: Database, count: int) -> None:
    """Enqueue `count` no-op tasks by `insert_many`."""
    with producer(database) as (app, known):
        for at in range(0, count, CHUNK):
            app.insert_many([(known["noop"], {})] * min(CHUNK, count - at))


def batch(database: Database, count: int) -> None:
    """Enqueue `count` no-op tasks by `delay()` in batches."""
    with producer(database) as (app, known):
        for at in range(0, count, CHUNK):
            with app.batch():
                for _ in range(min(CHUNK, count - at)):
                    known["noop"].delay()


def enqueue(database: Database, size: Size) -> list[Measure]:
    """Enqueue no-op tasks from one thread, one by one and in batches, with nobody working."""
    single = max(1, size.count // SINGLE)
    one_by_one = interleave(
        size.runs,
        {FLOOR: lambda: timed(database, single, insert), OURS: lambda: timed(database, single, delay)},
    )
    batches = interleave(
        size.runs,
        {
            FLOOR: lambda: timed(database, size.count, copy),
            f"{OURS}, insert_many": lambda: timed(database, size.count, insert_many),
            BY_BATCH: lambda: timed(database, size.count, batch),
        },
    )
    one_by_one[0].setting, batches[0].setting = "bare autocommit INSERT", "COPY, encoding included"
    return [
        Measure(f"delay() of {single:,} tasks one by one", "tasks/s", one_by_one, [Target(OURS, 0.75, FLOOR)]),
        Measure(
            f"{size.count:,} tasks in batches of {CHUNK:,}",
            "tasks/s",
            batches,
            [Target(series.name, 0.5, FLOOR) for series in batches[1:]],
        ),
    ]
