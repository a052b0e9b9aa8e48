"""How fast workers empty a queue of no-op tasks, results kept, beside the SQL floor with as many processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psycopg

from benchmarks.database import Database, wait_for_count

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Figures:
    """Jobs per second of one kind, run by run."""

    name: str
    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


def run_floor(database: Database, count: int, processes: int) -> float:
    """Return the floor's jobs per second."""
    database.fill(count)
    floors = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.floor", database.dsn, database.schema, str(1000 + number)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for number in range(processes)
    ]
    for floor in floors:
        assert floor.stdin is not None
        floor.stdin.write(b"\n")
        floor.stdin.close()
    for floor in floors:
        if floor.wait() != 0:
            raise RuntimeError("a floor process failed")
    return database.rate(count)


def start(database: Database, processes: int, *options: str) -> subprocess.Popen[bytes]:
    """Start a worker command on the benchmark's tasks."""
    arguments = ["-A", "benchmarks.bench_tasks", "worker", "-c", str(processes), "-l", "warning", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "durable_cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "DURABLE_DSN": database.dsn, "BENCH_SCHEMA": database.schema},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def run_durable(database: Database, count: int, processes: int) -> float:
    """Return our jobs per second: a real worker command, from its first to its last committed outcome."""
    database.fill(count)
    worker = start(database, processes)
    try:
        wait_for_count(database, count)
        return database.rate(count)
    finally:
        worker.terminate()
        worker.wait()


def check_sample(database: Database) -> None:
    """Fail unless what the runs left is what was promised: done, once, with its result."""
    with psycopg.connect(database.dsn) as connection:
        wrong = connection.execute(
            f"SELECT count(*) FROM {database.schema}.history"
            " WHERE status <> 'done' OR version <> 1 OR result IS DISTINCT FROM 'null'::bytea"
        ).fetchone()
    if wrong is None or wrong[0]:
        raise RuntimeError(f"{wrong} rows did not end as they should")


def measure(database: Database, count: int, processes: int, rounds: int) -> tuple[Figures, Figures]:
    """Run both kinds in turn and return their figures."""
    floor, ours = Figures("SQL floor", []), Figures("durable", [])
    for _ in range(rounds):
        floor.runs.append(run_floor(database, count, processes))
        check_sample(database)
        ours.runs.append(run_durable(database, count, processes))
        check_sample(database)
    return floor, ours
