"""The hot statements' plans, as a worker's session gets them: generic, by index only, whatever the statistics say."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer

from durable import Durable
from durable.instance import Claimed, NewSignal
from durable.storage import claims, control, instances, maintenance, partitions, signals, workers
from durable.storage.admission import LAST
from durable.storage.arrays import Int4Array, Int8Array, TextArray
from durable.storage.claims import Commit
from durable.storage.session import Operation, connect
from tests.fix_rows import DONE, HEAD, Rows

Node = dict[str, Any]

CLAIMED = [
    Claimed(n, 1, 0, 0, datetime.now(UTC), "m", 1, "run", 0, 0, "json", b"", None, None, False, None, "q")
    for n in range(1, 101)
]
PAIRS = [(row.id, row.token) for row in CLAIMED]
IDS = [row.id for row in CLAIMED]


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


def statement(operation: Operation[Any], which: int = 0, answer: Any = ()) -> tuple[str, dict[str, Any]]:
    """The name and parameters of an operation's statement."""
    name, parameters = operation.send(None)
    for _ in range(which):
        name, parameters = operation.send(answer)
    return name, dict(parameters)


def plan(rows: Rows, connection: Any, name: str, parameters: dict[str, Any]) -> list[Node]:
    """The nodes of the plan that a session makes for a statement prepared with these parameters' types."""
    query = PostgresQuery(Transformer(connection))
    query.convert(rows.sql[name], parameters)
    query.dump(parameters)
    types = [
        "unknown" if not oid else connection.execute("SELECT %s::regtype::text", [oid]).fetchone()[0]
        for oid in query.types
    ]
    head = f"PREPARE statement ({', '.join(types)}) AS " if types else "PREPARE statement AS "
    connection.execute(head.encode() + query.query)
    arguments = f"({', '.join(['NULL'] * len(types))})" if types else ""
    (explained,) = connection.execute(f"EXPLAIN (FORMAT JSON) EXECUTE statement {arguments}").fetchone()
    connection.execute("DEALLOCATE statement")
    nodes: list[Node] = []

    def walk(node: Node) -> None:
        nodes.append(node)
        for child in node.get("Plans", ()):
            walk(child)

    walk(explained[0]["Plan"])
    return nodes


def reads(nodes: list[Node], relation: str) -> set[str]:
    """How a plan reaches a table: names of indexes, or kinds of scans."""
    return {
        node.get("Index Name", node["Node Type"])
        for node in nodes
        if node.get("Relation Name") == relation and node["Node Type"] != "ModifyTable"
    }


HOT: list[tuple[Operation[Any] | tuple[str, dict[str, Any]], set[str]]] = [
    (claims.claim(1, "q0", 100, HEAD, 32767, []), {"instances_pick", "Tid Scan"}),
    (claims.claim_suspect(1, "q0", []), {"instances_suspect", "Tid Scan"}),
    (claims.held(1), {"instances_claimed"}),
    (instances.lower_barriers({1: 2}), {"instances_pkey"}),
    (signals.deliver([NewSignal(1, "paid", DONE)]), {"instances_pkey"}),
    (signals.deliver([NewSignal(1, "paid", DONE)] * 2), {"instances_pkey"}),
    (maintenance.time_out(1000), {"instances_deadline", "Tid Scan"}),
    (claims.release(1, PAIRS), {"instances_pkey"}),
    (statement(claims.release(1, PAIRS), 1), {"instances_pkey"}),
    (statement(claims.expire(1, PAIRS), 1), {"instances_pkey"}),
    (claims._flush(1, [Commit(row, "done", DONE) for row in CLAIMED]), {"instances_pkey"}),
    (claims._flush(1, [Commit(row, "runnable", attempt=1, delay=0.0) for row in CLAIMED]), {"instances_pkey"}),
    (("archive", statement(instances.cancel(1, "x"), 1, [(1, "cancelled")])[1]), {"instances_pkey"}),
    (claims.resolve([Commit(row, "done") for row in CLAIMED]), {"instances_pkey"}),
    (statement(workers.reclaim(1, PAIRS, 3, "x"), 1), {"instances_claimed", "Tid Scan"}),
    (workers.terminations(PAIRS[:8]), {"instances_pkey"}),
    (maintenance.promote(1000), {"instances_due", "Tid Scan"}),
    (maintenance.next_due(), {"instances_due", "instances_deadline"}),
    (
        maintenance.probe({"q0": 2, "q1": 1}, ["task:1"]),
        {"instances_pick", "instances_limited", "instances_suspect", "instances_due", "instances_deadline"},
    ),
    (control.oldest_waiting("q0"), {"instances_pick"}),
    (maintenance.sweep_kept(1.0), {"instances_kept", "instances_pkey"}),
]
KEYS, BUCKETS = TextArray(["k1", "k2"]), TextArray(["b1"])
LIMITED: list[tuple[str, dict[str, Any], set[str]]] = [
    ("limited_waits", {"queue": "q0", "unknown": TextArray([])}, {"instances_limited"}),
    (
        "limited_candidates",
        {"queue": "q0", "to_priority": 9, "to_time": LAST[1], "unknown": TextArray([]), "limit": 20},
        {"instances_limited"},
    ),
    ("unlimited_head", {"queue": "q0", "from_priority": 0, "from_time": HEAD[1]}, {"instances_pick"}),
    ("key_holders", {"keys": KEYS, "ungated": KEYS}, {"instances_exclusive", "instances_slots", "instances_pkey"}),
    (
        "lane_heads",
        {"queue": "q0", "unknown": TextArray([]), "lanes": KEYS, "counts": Int4Array([1, 2])},
        {"instances_lane"},
    ),
    ("admit", {"worker": 1, "ids": Int8Array(IDS), "shards": Int4Array([None] * 100)}, {"instances_pkey"}),
    ("set_lanes", {"ids": Int8Array(IDS), "lanes": TextArray(["k"] * 100)}, {"instances_pkey"}),
    (
        "relimit",
        {
            "ids": Int8Array([1]),
            "concurrency_keys": TextArray(["k"]),
            "rate_limits": TextArray(["r"]),
            "weights": Int4Array([1]),
        },
        {"instances_pkey"},
    ),
    ("open_lanes", {"lanes": KEYS}, {"instances_lane", "instances_pkey"}),
    ("open_due_lanes", {"limit": 100}, {"instances_lane", "instances_pkey"}),
    ("any_parked", {}, {"instances_lane"}),
    ("parked_lanes", {"after": "", "limit": 1000}, {"instances_lane"}),
    ("unattended_lanes", {"lanes": KEYS}, {"instances_exclusive", "instances_slots"}),
    ("wrong_gates", {"limit": 10}, {"instances_slots"}),
    ("recount_shards", {"keys": KEYS, "shards": Int4Array([0, 1])}, {"instances_slots"}),
    ("lanes_of_limit", {"kind": "rate", "name": "mail"}, {"instances_lane"}),
]
GATES: list[tuple[str, dict[str, Any], str, str]] = [
    ("lock_gates", {"keys": KEYS}, "gates", "gates_pkey"),
    ("gate_shards", {"keys": KEYS}, "gates", "gates_pkey"),
    ("lock_buckets", {"buckets": BUCKETS}, "buckets", "buckets_pkey"),
    ("bucket_shards", {"buckets": BUCKETS}, "buckets", "buckets_pkey"),
    ("due_buckets", {"limit": 20}, "buckets", "buckets_opens"),
    ("limited_waits", {"queue": "q0", "unknown": TextArray([])}, "buckets", "buckets_opens"),
    ("limits_named", {"gates": KEYS, "rates": BUCKETS}, "limits", "limits_pkey"),
]
HOT_STATEMENTS = [(item if isinstance(item, tuple) else statement(item), indexes) for item, indexes in HOT]


@pytest.mark.parametrize(("name", "parameters", "indexes"), LIMITED, ids=[name for name, _, _ in LIMITED])
def test_a_statement_of_limits_reaches_rows_by_its_index_only(
    full: Rows, name: str, parameters: dict[str, Any], indexes: set[str]
) -> None:
    nodes = plan(full, full.connection, name, parameters)
    assert reads(nodes, "instances") == indexes
    assert not {"Hash Join", "Merge Join", "Bitmap Heap Scan"} & {node["Node Type"] for node in nodes}


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
    assert not {"Hash Join", "Merge Join", "Bitmap Heap Scan"} & set(kinds)


PRODUCER: list[tuple[tuple[str, dict[str, Any]], set[str]]] = [
    (statement(instances.snapshot(1)), {"instances_pkey"}),
    (statement(instances.finished(IDS)), {"instances_pkey"}),
    (statement(instances.finished(IDS[:1])), {"instances_pkey"}),
    (statement(signals.deliver([NewSignal(1, "paid", DONE)])), {"instances_pkey"}),
    (statement(instances.occupant("k")), {"instances_key"}),
    (statement(instances.cancel(1, "x")), {"instances_pkey", "instances_children"}),
]


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
    with full.connection.transaction(force_rollback=True):
        before = _tuples_read(full)
        for _ in range(10):
            assert len(full.claim(worker, 10, "q0")) == 10
        assert _tuples_read(full) - before < 1000


def _tuples_read(rows: Rows) -> int:
    (row,) = rows.fetch(
        "SELECT pg_stat_get_xact_tuples_fetched(c) + pg_stat_get_xact_tuples_returned(c) AS n"
        " FROM (SELECT '{schema}.instances'::regclass::oid AS c) AS t"
    )
    return int(row["n"])


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
