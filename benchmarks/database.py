"""The benchmarks' own Postgres: BENCH_DSN, or an embedded server with the product's settings (fsync on)."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

    def fill(self, count: int, machine: str = "noop", step: str = "run") -> None:
        """Empty the tables and insert `count` runnable instances."""
        self.empty()
        self.insert(count, machine, step)
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(f"VACUUM ANALYZE {self.schema}.instances")
            connection.execute("CHECKPOINT")

    def insert(self, count: int, machine: str = "noop", step: str = "run") -> float:
        """Insert `count` runnable instances in one statement; return the database's clock when they are committed."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(
                f"INSERT INTO {self.schema}.instances"
                " (eligible_at, status, queue, machine, step, state_type, state)"
                " SELECT clock_timestamp(), 'runnable', 'default', %s, %s, 'json', '{}'"
                " FROM generate_series(1, %s)",
                (machine, step, count),
            )
        return self.clock()

    def empty(self) -> None:
        """Remove every row, table by table: a beat that has read one may wait for the next."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            for table in ("instances", "history", "signals", "buckets"):
                connection.execute(f"TRUNCATE {self.schema}.{table}")

    def value(self, query: str, parameters: Sequence[Any] = ()) -> Any:
        """Return the first value of a query in which {schema} stands for the schema; None if it has no rows."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(query.replace("{schema}", self.schema).encode(), parameters)
            row = cursor.fetchone() if cursor.description is not None else None
        return None if row is None else row[0]

    def clock(self) -> float:
        """Return the database's time in seconds since 1970."""
        return float(self.value("SELECT extract(epoch FROM clock_timestamp())::float8"))

    def finished_after(self, began: float) -> float:
        """Return seconds from a time of the database's clock to the last commit in the history."""
        return float(self.value("SELECT extract(epoch FROM max(finished_at))::float8 FROM {schema}.history")) - began

    def check(self, count: int, version: int = 1, result: str = "null", machine: str = "noop") -> None:
        """Raise RuntimeError unless the history holds `count` instances, each ended as it was promised."""
        found, right = self.value(
            "SELECT ARRAY[count(*), count(*) FILTER (WHERE status = 'done' AND version = %s AND"
            " convert_from(result, 'UTF8') = %s)] FROM {schema}.history WHERE machine = %s",
            (version, result, machine),
        )
        if (found, right) != (count, count):
            raise RuntimeError(f"{count} instances of {machine!r} were to end as promised: {found} ended, {right} so")

    def definitions(self, app: Durable) -> dict[str, Any]:
        """Register the benchmark's tasks and machines with another app, and return them by name."""
        found: dict[str, Any] = {
            "noop": app.task(name="noop")(bench_tasks.noop.function),
            "stamp": app.task(name="stamp")(bench_tasks.stamp.function),
        }
        for name, machine in (
            ("plain_chain", bench_tasks.PlainChain),
            ("inline_chain", bench_tasks.InlineChain),
            ("fan", bench_tasks.Fan),
            ("sleeper", bench_tasks.Sleeper),
        ):
            app.definitions[name, 1] = machine.definition
            found[name] = machine
        return found

    def count(self, status: str, machine: str | None = None) -> int:
        """Return how many rows have a status, live or finished."""
        parts = [
            f"(SELECT count(*) FROM {{schema}}.{table} WHERE status = %s AND machine = coalesce(%s, machine))"
            for table in ("history", "instances")
        ]
        return int(self.value(f"SELECT {' + '.join(parts)}", [status, machine] * 2))

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


def wait_for_count(
    database: Database, count: int, status: str = "done", seconds: float = 600.0, machine: str | None = None
) -> None:
    """Wait until `count` rows have a status; looks rarely, so as not to be part of what is measured."""
    until = time.monotonic() + seconds
    while (found := database.count(status, machine)) < count:
        if time.monotonic() > until:
            raise RuntimeError(f"only {found} of {count} were {status} within {seconds:g} s")
        time.sleep(0.25)


@contextmanager
def bench_database(schema: str = "bench") -> Iterator[Database]:
    """A migrated schema on BENCH_DSN or on a server of our own, which is stopped and removed afterwards."""
    given = os.environ.get("BENCH_DSN")
    with nullcontext(given) if given else _own_server() as dsn, migrated(dsn, schema) as database:
        yield database


@contextmanager
def migrated(dsn: str, schema: str) -> Iterator[Database]:
    """A schema with our tables, dropped afterwards."""
    app = Durable("bench", dsn=dsn, schema=schema)
    try:
        app.migrate()
        yield Database(dsn, schema)
    finally:
        app.close()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


@contextmanager
def _own_server() -> Iterator[str]:
    home = Path(tempfile.mkdtemp(prefix="durable-bench-"))
    home.chmod(0o755)
    server = Server(home)
    try:
        yield server.ensure()
    finally:
        server.release()
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
