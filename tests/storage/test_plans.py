"""The hot statements' plans, as a worker's session gets them: generic, by index only, whatever the statistics say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from durable import Durable
from durable.storage import claims, instances, partitions
from durable.storage.arrays import Int4Array, Int8Array, TextArray
from durable.storage.claims import Commit
from durable.storage.session import connect
from tests.fix_rows import DONE, Rows
from tests.storage.hot import (
    BY_ID,
    CLAIMED,
    FORBIDDEN,
    GATES,
    HOT_STATEMENTS,
    IDS,
    KEYS,
    LIMITED,
    PRODUCER,
    plan,
    reads,
    statement,
    touched,
)


@pytest.fixture(scope="module")
def full(database: str) -> Iterator[Rows]:
    """20,000 runnable rows in two queues, 20,000 scheduled, 400 executing, no statistics yet."""
    app = Durable("plans", dsn=database, schema="t_plans")
    app.migrate()
    rows = Rows(database, "t_plans")
    rows.fetch(
        "INSERT INTO {schema}.instances (queue, priority, status, eligible_at, machine, step, state_type, state)"
        " SELECT 'q' || n %% 2, n %% 3, CASE WHEN n <= 20400 THEN 'runnable' ELSE 'scheduled' END::{schema}.status,"
        " clock_timestamp() + make_interval(secs => greatest(0, n - 20400)), 'task', 'run', 'json', '{}'"
        " FROM generate_series(1, %s) AS n",
        [40_400],
    )
    for queue in ("q0", "q1"):
        rows.claim(rows.worker(), 200, queue)
    yield rows
    rows.fetch("DROP SCHEMA {schema} CASCADE")
    rows.close()
    app.close()


@pytest.fixture(scope="module")
def bare(database: str) -> Iterator[Rows]:
    """No rows, and the planner knows."""
    app = Durable("bare", dsn=database, schema="t_bare")
    app.migrate()
    rows = Rows(database, "t_bare")
    rows.fetch("VACUUM ANALYZE {schema}.instances")
    yield rows
    rows.fetch("DROP SCHEMA {schema} CASCADE")
    rows.close()
    app.close()


@pytest.mark.parametrize(("name", "parameters", "indexes"), LIMITED, ids=[name for name, _, _ in LIMITED])
def test_a_statement_of_limits_reaches_rows_by_its_index_only(
    full: Rows, name: str, parameters: dict[str, Any], indexes: set[str]
) -> None:
    nodes = plan(full, full.connection, name, parameters)
    assert reads(nodes, "instances") == indexes
    assert not FORBIDDEN & {node["Node Type"] for node in nodes}


def test_the_look_for_limited_rows_needs_no_pinned_session_however_many_there_are(full: Rows) -> None:
    with full.connection.transaction(force_rollback=True):
        full.fetch(
            "INSERT INTO {schema}.instances (queue, status, eligible_at, machine, step, state_type, state, rate_limit)"
            " SELECT 'q0', 'runnable', now(), 'task', 'run', 'json', '{}', 'r' FROM generate_series(1, 9000)"
        )
        full.fetch("ANALYZE {schema}.instances")
        full.fetch("SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on; SET LOCAL enable_sort = on")
        nodes = plan(full, full.connection, "limited_waits", {"queue": "q0", "unknown": TextArray([])})
    assert reads(nodes, "instances") == {"instances_limited"}


@pytest.mark.parametrize(("name", "parameters", "relation", "index"), GATES, ids=[entry[0] for entry in GATES])
def test_gates_buckets_and_limits_are_reached_by_their_index(
    full: Rows, name: str, parameters: dict[str, Any], relation: str, index: str
) -> None:
    assert reads(plan(full, full.connection, name, parameters), relation) == {index}


def test_slots_are_credited_row_by_row(full: Rows) -> None:
    parameters = {"keys": KEYS, "shards": Int4Array([0, 0]), "counts": Int4Array([1, 1])}
    assert reads(plan(full, full.connection, "credit_slots", parameters), "gates") == {"gates_pkey"}


@pytest.mark.parametrize("analyzed", [False, True], ids=["no statistics", "analyzed"])
@pytest.mark.parametrize(("call", "indexes"), HOT_STATEMENTS, ids=[call[0] for call, _ in HOT_STATEMENTS])
def test_a_hot_statement_reaches_rows_by_its_index_only(
    full: Rows, call: tuple[str, dict[str, Any]], indexes: set[str], analyzed: bool
) -> None:
    if analyzed:
        full.fetch("ANALYZE {schema}.instances, {schema}.workers")
    nodes = plan(full, full.connection, *call)
    assert reads(nodes, "instances") == indexes
    kinds = [node["Node Type"] for node in nodes]
    assert "Seq Scan" not in kinds or reads(nodes, "instances").isdisjoint({"Seq Scan"})
    assert not FORBIDDEN & set(kinds)


@pytest.mark.parametrize(("name", "parameters"), BY_ID, ids=[name for name, _ in BY_ID])
def test_a_plan_made_beside_an_empty_table_looks_its_rows_up_for_it_may_be_kept(
    bare: Rows, name: str, parameters: dict[str, Any]
) -> None:
    nodes = plan(bare, bare.connection, name, parameters)
    lookups = [node for node in nodes if node.get("Index Name") == "instances_pkey"]
    assert lookups
    assert [node for node in lookups if "Index Cond" not in node] == []


@pytest.mark.parametrize("name", ["finish", "settle_inboxes", "unread_counts", "sent_meanwhile", "clear_inboxes"])
def test_ends_reach_signals_by_their_target(full: Rows, name: str) -> None:
    parameters: dict[str, Any] = {"ids": Int8Array(IDS), "seen": Int8Array(IDS)}
    if name == "finish":
        parameters = statement(claims._flush(1, [Commit(row, "done", DONE) for row in CLAIMED]))[1]
    assert reads(plan(full, full.connection, name, parameters), "signals") == {"signals_target"}


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan"])
@pytest.mark.parametrize(("call", "indexes"), PRODUCER, ids=[call[0] for call, _ in PRODUCER])
def test_a_producers_statement_needs_no_pinned_session(
    full: Rows, call: tuple[str, dict[str, Any]], indexes: set[str], mode: str
) -> None:
    full.fetch("ANALYZE {schema}.instances")
    connection = connect(full.dsn, "producer")
    try:
        connection.execute(f"SET plan_cache_mode = {mode}")
        nodes = plan(full, connection, *call)
    finally:
        connection.close()
    if mode == "force_generic_plan":
        assert reads(nodes, "instances") <= indexes | {"instances_kept"}
        assert reads(nodes, "instances")
    assert "Seq Scan" not in reads(nodes, "instances")


def test_a_claim_reads_no_more_rows_than_it_takes(full: Rows) -> None:
    """Ten claims of ten among 10,000: the index is walked, not the table."""
    worker = full.worker()
    # Of the versions of rows that tests before this one have rolled back.
    full.connection.execute(full.sql.render("VACUUM {schema}.instances").encode())
    with full.connection.transaction(force_rollback=True):
        before = touched(full)
        for _ in range(10):
            assert len(full.claim(worker, 10, "q0")) == 10
        assert touched(full) - before < 1000


def test_a_look_at_finished_instances_reads_the_partitions_made_ahead_never(full: Rows) -> None:
    assert partitions.AHEAD_DAYS == 14
    call = statement(instances.finished(IDS))
    (explained,) = full.connection.execute(
        b"EXPLAIN (ANALYZE, FORMAT JSON) " + full.sql["finished"].encode(),
        call[1],
    ).fetchone()  # type: ignore[misc]
    text = str(explained)
    touched = {part for part in text.split("'") if part.startswith("history_2") and "pkey" not in part}
    assert len(touched) <= 3, "yesterday, today, and tomorrow within an hour of midnight"
