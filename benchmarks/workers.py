"""The worker commands under measure, as a user would start them, and the producer that feeds them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.database import Database
from durable import Durable

ROOT = Path(__file__).parent.parent


@contextmanager
def worker(
    database: Database, processes: int, *options: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker command on the benchmark's tasks; what it warns of is shown, SIGTERM stops it."""
    # With --json what it starts with goes to stdout: on stderr there are warnings only.
    arguments = ["-A", "benchmarks.bench_tasks", "worker", "-c", str(processes), "-l", "warning", "--json", *options]
    command = subprocess.Popen(
        [sys.executable, "-m", "durable_cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "DURABLE_DSN": database.dsn, "BENCH_SCHEMA": database.schema, **(environment or {})},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield command
    finally:
        command.terminate()
        command.wait()


@contextmanager
def producer(database: Database) -> Iterator[tuple[Durable, dict[str, Any]]]:
    """An app on the same tasks, and its definitions by name."""
    app = Durable("bench", dsn=database.dsn, schema=database.schema)
    try:
        yield app, database.definitions(app)
    finally:
        app.close()


@contextmanager
def cluster(
    database: Database, processes: int, *options: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[Durable, dict[str, Any]]]:
    """A worker command with a beat, warm, and a producer."""
    with worker(database, processes, "-B", *options, environment=environment), producer(database) as (app, known):
        known["noop"].delay().get(timeout=30)
        yield app, known
