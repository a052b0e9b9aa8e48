"""The hot statements on full tables: the plan each gets there, and that it touches rows by the batch, not by the table.

A tenth of the size unless DURABLE_SCALE=1, which makes 1,000,000 runnable, 1,000,000 scheduled and 5,000,000 finished
rows: 40 s instead of 5 on a quiet machine, and 3 GB of disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from durable import Durable
from durable.storage.arrays import Int8Array
from durable.storage.session import connect, execute
from tests.fix_rows import Rows
from tests.storage.hot import FORBIDDEN, HOT_STATEMENTS, LIMITED, PRODUCER, plan, reads, touched

MILLION = 1_000_000 if os.environ.get("DURABLE_SCALE") == "1" else 100_000
ALL = [*((*call, indexes) for call, indexes in HOT_STATEMENTS), *LIMITED]
CLAIMED = 2000
"""So many that the sample of an ANALYZE, 30,000 of 2,000,000, surely holds some: the planner then knows of them."""
DUE = 5000
BATCHES = {"promote": 1000, "time_out": 1000, "held": CLAIMED // 2, "reclaim": CLAIMED // 2}
"""Rows that a statement may take; 100 if not named. Each may touch TIMES as many rows and index entries."""
TIMES = 10


@pytest.fixture(scope="module")
def huge(server_dsn: str, worker_id: str) -> Iterator[Rows]:
    """The tables filled and analyzed, half of the waiting rows on other priorities, CLAIMED of them claimed.

    In a database of its own, so that dropping it is one act, and nobody's VACUUM meets it.
    """
    name = f"scale_{worker_id}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    dsn = psycopg.conninfo.make_conninfo(server_dsn, dbname=name)
    app = Durable("scale", dsn=dsn, schema="scale")
    app.migrate()
    rows = Rows(dsn, "scale")
    try:
        with rows.connection.transaction():
            rows.fetch(
                "INSERT INTO {schema}.instances"
                " (queue, priority, status, eligible_at, machine, step, state_type, state)"
                " SELECT 'q' || n %% 2, CASE WHEN n %% 4 < 2 THEN 0 ELSE n %% 5 END,"
                " CASE WHEN n <= %(m)s THEN 'runnable' ELSE 'scheduled' END::{schema}.status,"
                " clock_timestamp() + make_interval(secs => CASE WHEN n <= %(m)s THEN 0"
                "   WHEN n <= %(m)s + %(due)s THEN -1 ELSE 86400 + n * 0.01 END),"
                " 'task', 'run', 'json', '{}' FROM generate_series(1, 2 * %(m)s) AS n",
                {"m": MILLION, "due": DUE},
            )
            rows.fetch(
                "INSERT INTO {schema}.history"
                " (id, queue, priority, status, eligible_at, created_at, finished_at, token, version, attempt,"
                " machine_version, crashes, cancel_requested, machine, step, state_type, state, result_type, result)"
                " SELECT nextval('{schema}.instance_ids'), 'q' || n %% 2, n %% 3,"
                " CASE WHEN n %% 1000 = 0 THEN 'failed' ELSE 'done' END::{schema}.status, t.now, t.now, t.now, 1, 1,"
                " 0, 1, 0, false, 'task', 'run', 'json', '{}', 'json', 'null'"
                " FROM generate_series(1, 5 * %(m)s) AS n, (SELECT clock_timestamp() AS now) AS t",
                {"m": MILLION},
            )
        for queue in ("q0", "q1"):
            rows.claim(rows.worker(), CLAIMED // 2, queue)
        rows.fetch("VACUUM (ANALYZE, INDEX_CLEANUP ON) {schema}.instances")  # no statement pays for the claims
        rows.fetch("ANALYZE {schema}.history, {schema}.workers")
        yield rows
    finally:
        rows.close()
        app.close()
        with psycopg.connect(server_dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def touches(rows: Rows, name: str, parameters: dict[str, Any]) -> int:
    """Execute a statement, undo it, and return how many rows and index entries it touched.

    The second time counts: the first passes the index entries that other undone statements left and marks them as dead.
    """
    for _ in range(2):
        with rows.connection.transaction(force_rollback=True):
            before = touched(rows)
            execute(rows.connection, rows.sql, name, parameters)
            found = touched(rows) - before
    return found


def test_the_tables_are_as_full_as_they_are_said_to_be(huge: Rows) -> None:
    counted = huge.fetch(
        "SELECT status::text, count(*) AS n FROM (SELECT status FROM {schema}.instances UNION ALL"
        " SELECT status FROM {schema}.history) AS every GROUP BY 1"
    )
    assert {row["status"]: row["n"] for row in counted} == {
        "runnable": MILLION - CLAIMED,
        "executing": CLAIMED,
        "scheduled": MILLION,
        "done": 5 * MILLION - 5 * MILLION // 1000,
        "failed": 5 * MILLION // 1000,
    }


@pytest.mark.parametrize(("name", "parameters", "indexes"), ALL, ids=[entry[0] for entry in ALL])
def test_on_full_tables_a_hot_statement_still_reaches_rows_by_its_index(
    huge: Rows, name: str, parameters: dict[str, Any], indexes: set[str]
) -> None:
    nodes = plan(huge, huge.connection, name, parameters)
    assert reads(nodes, "instances") == indexes
    assert not FORBIDDEN & {node["Node Type"] for node in nodes}


@pytest.mark.parametrize(("name", "parameters", "indexes"), ALL, ids=[entry[0] for entry in ALL])
def test_on_full_tables_a_hot_statement_touches_rows_by_the_batch(
    huge: Rows, name: str, parameters: dict[str, Any], indexes: set[str]
) -> None:
    if name == "set_lanes":  # of rows that wait: the others of the table are claimed
        parameters = {**parameters, "ids": Int8Array(list(range(MILLION // 2, MILLION // 2 + 100)))}
    assert touches(huge, name, parameters) <= TIMES * BATCHES.get(name, 100)


@pytest.mark.parametrize(("call", "indexes"), PRODUCER, ids=[call[0] for call, _ in PRODUCER])
def test_on_full_tables_a_producers_statement_needs_no_pinned_session(
    huge: Rows, call: tuple[str, dict[str, Any]], indexes: set[str]
) -> None:
    connection = connect(huge.dsn, "producer")
    try:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        nodes = plan(huge, connection, *call)
    finally:
        connection.close()
    assert reads(nodes, "instances") <= indexes | {"instances_kept"}
    (filled,) = huge.fetch("SELECT DISTINCT tableoid::regclass::text AS name FROM {schema}.history")
    assert "Seq Scan" not in reads(nodes, filled["name"].split(".")[-1]), "empty partitions may be read as they like"
    assert touches(huge, *call) <= TIMES * 100
