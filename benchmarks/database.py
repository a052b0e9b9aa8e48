"""The benchmarks' own Postgres: BENCH_DSN, or an embedded server with the product's settings (fsync on)."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import bench_tasks
from durable import Durable
from durable.embedded import Server


@dataclass(frozen=True)
class Database:
    """A migrated schema to fill and measure."""

    dsn: str
    schema: str

    def fill(self, count: int) -> None:
        """Empty the tables and insert `count` runnable no-op tasks."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(f"TRUNCATE {self.schema}.instances, {self.schema}.history")
            connection.execute(
                f"INSERT INTO {self.schema}.instances"
                " (eligible_at, status, queue, machine, step, state_type, state)"
                " SELECT clock_timestamp(), 'runnable', 'default', 'noop', 'run', 'json', '{}'"
                " FROM generate_series(1, %s)",
                (count,),
            )
            connection.execute(f"VACUUM ANALYZE {self.schema}.instances")
            connection.execute("CHECKPOINT")

    def empty(self) -> None:
        """Remove every row."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(f"TRUNCATE {self.schema}.instances, {self.schema}.history, {self.schema}.signals")

    def elapsed(self) -> float:
        """Return seconds from the first insert to the last commit in the history."""
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute(
                f"SELECT extract(epoch FROM max(finished_at) - min(created_at))::float8 FROM {self.schema}.history"
            ).fetchone()
        assert row is not None, "an aggregate has a row"
        return float(row[0])

    def definitions(self, app: Durable) -> dict[str, Any]:
        """Register the benchmark's tasks and machines with another app, and return them by name."""
        found: dict[str, Any] = {"noop": app.task(name="noop")(bench_tasks.noop.function)}
        for name, machine in (
            ("plain_chain", bench_tasks.PlainChain),
            ("inline_chain", bench_tasks.InlineChain),
            ("fan", bench_tasks.Fan),
            ("sleeper", bench_tasks.Sleeper),
        ):
            app.definitions[name, 1] = machine.definition
            found[name] = machine
        return found

    def count(self, status: str) -> int:
        """Return how many rows have a status, live or finished."""
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute(
                f"SELECT (SELECT count(*) FROM {self.schema}.history WHERE status = %(status)s)"
                f" + (SELECT count(*) FROM {self.schema}.instances WHERE status = %(status)s)",
                {"status": status},
            ).fetchone()
            return int(row[0]) if row else 0

    def rate(self, count: int) -> float:
        """Return rows per second between the first and the last commit in the history."""
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute(
                f"SELECT count(*), extract(epoch FROM max(finished_at) - min(finished_at))::float8"
                f" FROM {self.schema}.history"
            ).fetchone()
        if row is None or row[0] != count:
            raise RuntimeError(f"expected {count} finished rows, found {row}")
        return float(count / row[1])


def wait_for_count(database: Database, count: int, status: str = "done", seconds: float = 300.0) -> None:
    """Wait until `count` rows have a status; looks rarely, so as not to be part of what is measured."""
    until = time.monotonic() + seconds
    while (found := database.count(status)) < count:
        if time.monotonic() > until:
            raise RuntimeError(f"only {found} of {count} were {status} within {seconds:g} s")
        time.sleep(0.25)


@contextmanager
def bench_database(schema: str = "bench") -> Iterator[Database]:
    """A migrated schema on BENCH_DSN or on a server of our own, which is stopped and removed afterwards."""
    given = os.environ.get("BENCH_DSN")
    home: Path | None = None
    if given:
        dsn = given
    else:
        home = Path(tempfile.mkdtemp(prefix="durable-bench-"))
        home.chmod(0o755)
        server = Server(home)
        dsn = server.ensure()
    app = Durable("bench", dsn=dsn, schema=schema)
    try:
        app.migrate()
        yield Database(dsn, schema)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {schema} CASCADE")
    finally:
        app.close()
        if home is not None:
            server.release()
            server.stop()
            shutil.rmtree(home, ignore_errors=True)
