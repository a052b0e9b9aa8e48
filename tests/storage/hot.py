"""The hot statements, with which index each may reach rows by, how to see a plan, and how many rows were touched."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer

from durable.instance import Claimed, NewSignal
from durable.storage import claims, control, instances, maintenance, signals, workers
from durable.storage.admission import LAST
from durable.storage.arrays import Int4Array, Int8Array, TextArray
from durable.storage.claims import Commit
from durable.storage.session import Operation
from tests.fix_rows import DONE, HEAD, Rows

Node = dict[str, Any]

CLAIMED = [
    Claimed(n, 1, 0, 0, datetime.now(UTC), "m", 1, "run", 0, 0, "json", b"", None, None, False, None, "q")
    for n in range(1, 101)
]
PAIRS = [(row.id, row.token) for row in CLAIMED]
IDS = [row.id for row in CLAIMED]


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
    ("open_lanes", {"lanes": KEYS, "wait": True}, {"instances_lane", "instances_pkey"}),
    ("open_due_lanes", {"limit": 100}, {"instances_lane", "instances_pkey"}),
    ("any_parked", {}, {"instances_lane"}),
    ("parked_lanes", {"after": "", "limit": 1000}, {"instances_lane"}),
    ("unattended_lanes", {"lanes": KEYS}, {"instances_exclusive", "instances_slots"}),
    ("wrong_gates", {"limit": 10}, {"instances_slots"}),
    ("recount_shards", {"keys": KEYS, "shards": Int4Array([0, 1])}, {"instances_slots"}),
    ("age_queue", {"queue": "q0", "ageing": 60.0, "limit": 10}, {"instances_pick", "instances_limited", "Tid Scan"}),
    ("age_lanes", {"lanes": KEYS, "limit": 10}, {"instances_lane", "Tid Scan"}),
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
BY_ID: list[tuple[str, dict[str, Any]]] = [
    *(call for call, indexes in HOT_STATEMENTS if "instances_pkey" in indexes),
    *(
        (name, parameters)
        for name, parameters, indexes in LIMITED
        if indexes - {"instances_lane"} == {"instances_pkey"}
    ),
    ("raise_barrier", {"ids": Int8Array(IDS), "counts": Int4Array([1] * 100)}),
    statement(workers.give_up(1, [(1, 1, "too long")], 3), 1),
]


PRODUCER: list[tuple[tuple[str, dict[str, Any]], set[str]]] = [
    (statement(instances.snapshot(1)), {"instances_pkey"}),
    (statement(instances.finished(IDS)), {"instances_pkey"}),
    (statement(instances.finished(IDS[:1])), {"instances_pkey"}),
    (statement(signals.deliver([NewSignal(1, "paid", DONE)])), {"instances_pkey"}),
    (statement(instances.occupant("k")), {"instances_key"}),
    (statement(instances.cancel(1, "x")), {"instances_pkey", "instances_children"}),
]
FORBIDDEN = {"Hash Join", "Merge Join", "Bitmap Heap Scan"}


def touched(rows: Rows) -> int:
    """How many rows and index entries of instances and history this transaction has read so far."""
    (row,) = rows.fetch(
        "SELECT sum(pg_stat_get_xact_tuples_fetched(c.oid) + pg_stat_get_xact_tuples_returned(c.oid))::bigint AS n"
        " FROM pg_class AS c WHERE c.relnamespace = '{schema}'::regnamespace AND c.relkind IN ('r', 'i')"
        " AND c.relname ~ '^(instances|history)'"
    )
    return int(row["n"])
