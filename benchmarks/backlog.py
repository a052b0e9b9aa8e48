"""What a claim costs on a full table: the runnable rows, as many scheduled ones, half of them on other priorities."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime
from functools import partial

import psycopg

from benchmarks import floor
from benchmarks.database import Database, migrated
from benchmarks.figures import OURS, Measure, Target, interleave
from benchmarks.registry import Size
from durable.runtime.picker import HIGHEST, LOWEST
from durable.sql import Statements
from durable.storage import claims, workers
from durable.storage.session import PINNED_PLANS, connect
from durable.storage.session import run as run_operation
from durable.storage.workers import Identity

CLAIMS = 40
ROWS = 100
HEAD = (LOWEST, datetime(1970, 1, 1, tzinfo=UTC))
EMPTY, FULL = "empty table", "full table"


def fill(database: Database, backlog: int) -> None:
    """Put `backlog` runnable rows and as many scheduled ones into the tables."""
    database.value(
        "WITH rows AS (INSERT INTO {schema}.instances"
        " (eligible_at, status, queue, priority, machine, step, state_type, state)"
        " SELECT clock_timestamp() + make_interval(secs => CASE WHEN n %% 2 = 0 THEN 0 ELSE 86400 END),"
        " CASE WHEN n %% 2 = 0 THEN 'runnable' ELSE 'scheduled' END::{schema}.status, 'default',"
        " CASE WHEN n %% 4 < 2 THEN 0 ELSE n %% 5 END, 'noop', 'run', 'json', '{}'"
        " FROM generate_series(1, 2 * %s) AS n) SELECT 1",
        [backlog],
    )
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute(f"VACUUM ANALYZE {database.schema}.instances")
        connection.execute("CHECKPOINT")


def of_floor(database: Database, refill: bool) -> float:
    """Return milliseconds per claim of 100 rows by the floor's statement, the median of CLAIMS."""
    if refill:
        database.fill(CLAIMS * ROWS)
    statement = floor.CLAIM.format(schema=database.schema, limit=ROWS)
    spent = []
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute(PINNED_PLANS)
        for _ in range(CLAIMS):
            began = time.monotonic()
            found = connection.execute(statement, {"worker": 1000}, prepare=True, binary=True).fetchall()
            spent.append(1000 * (time.monotonic() - began))
            _expect_full(len(found))
    return statistics.median(spent)


def of_ours(database: Database, refill: bool) -> float:
    """Return milliseconds per claim of 100 rows by ours."""
    if refill:
        database.fill(CLAIMS * ROWS)
    sql = Statements(database.schema)
    connection = connect(database.dsn, "bench", pinned=True)
    spent = []
    me = Identity("worker", "bench", "host", "boot", 1, 1, "start", "default")
    worker = run_operation(connection, sql, workers.register(me, 600.0))
    try:
        for _ in range(CLAIMS):
            began = time.monotonic()
            found = run_operation(connection, sql, claims.claim(worker, "default", ROWS, HEAD, HIGHEST, ()))
            spent.append(1000 * (time.monotonic() - began))
            _expect_full(len(found))
    finally:
        run_operation(connection, sql, workers.bury([worker]))
        connection.close()
    return statistics.median(spent)


def _expect_full(found: int) -> None:
    if found != ROWS:
        raise RuntimeError(f"a claim of {ROWS} rows found {found}")


def backlog(database: Database, size: Size) -> list[Measure]:
    """Claim 100 rows from a full and from an empty table."""
    rows = max(size.count, 3 * size.runs * CLAIMS * ROWS)
    with migrated(database.dsn, f"{database.schema}_full") as full:
        fill(full, rows)
        series = interleave(
            size.runs,
            {
                f"SQL floor, {EMPTY}": partial(of_floor, database, True),
                f"SQL floor, {FULL}": partial(of_floor, full, False),
                f"{OURS}, {EMPTY}": partial(of_ours, database, True),
                f"{OURS}, {FULL}": partial(of_ours, full, False),
            },
        )
    target = Target(f"{OURS}, {FULL}", 1.3, f"{OURS}, {EMPTY}", True)
    return [Measure(f"a claim of {ROWS} among {rows:,} runnable and {rows:,} scheduled rows", "ms", series, [target])]
