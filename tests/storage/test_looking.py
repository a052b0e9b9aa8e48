"""Reading instances back: live and finished in one look, and the view for people."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from durable import Durable
from durable.instance import Payload
from durable.storage import inspection, instances
from durable.storage.session import connect
from tests.fix_rows import Rows, done
from tests.storage.test_plans import plan, statement


def test_a_snapshot_is_found_live_and_finished(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker, queue="q")
    snapshot = rows.run(instances.snapshot(claimed.id))
    assert snapshot is not None
    assert (snapshot.id, snapshot.status, snapshot.version, snapshot.queue) == (claimed.id, "executing", 0, "q")
    rows.flush(worker, done(claimed))
    snapshot = rows.run(instances.snapshot(claimed.id))
    assert snapshot is not None
    assert (snapshot.status, snapshot.result_type, snapshot.result, snapshot.version) == ("done", "json", b'"ok"', 1)
    assert rows.run(instances.snapshot(2**40)) is None


def test_an_instance_is_never_missing_while_it_moves(rows: Rows) -> None:
    """One statement reads both tables: a reader sees it before or after the move, never in between."""
    worker = rows.worker()
    claimed = rows.claimed(worker, 300)
    other = rows.other()
    going = rows.background(lambda: [other.flush(worker, done(row)) for row in claimed])
    seen = 0
    while not going.done():
        for row in (claimed[0], claimed[150], claimed[-1]):
            assert rows.run(instances.snapshot(row.id)) is not None
            seen += 1
    going.result()
    assert seen > 0


def test_only_the_finished_ones_are_told_kept_ones_included(rows: Rows) -> None:
    worker = rows.worker()
    gone, kept, waiting = rows.claimed(worker, 3)
    rows.fetch(
        "UPDATE {schema}.instances SET correlation_key = 'k', correlation_scope = ARRAY['done']::{schema}.status[]"
        " WHERE id = %s",
        [kept.id],
    )
    rows.flush(worker, done(gone), done(kept._replace(keeps_key=True)))
    found = rows.run(instances.finished([gone.id, kept.id, waiting.id, 2**40]))
    assert {snapshot.id for snapshot in found} == {gone.id, kept.id}
    assert rows.live(kept.id) is not None
    assert rows.run(instances.finished([])) == []


def test_a_listing_shows_live_and_finished_newest_first(rows: Rows) -> None:
    worker = rows.worker()
    first, second = rows.claimed(worker, 2)
    rows.flush(worker, done(first))
    (third,) = rows.insert(queue="b", machine="other")
    everything = rows.run(inspection.listing(None, None, None, None))
    assert [row.id for row in everything] == [third, second.id, first.id]
    assert [row.status for row in everything] == ["runnable", "executing", "done"]

    def ids(*filters: Any) -> list[int]:
        return [row.id for row in rows.run(inspection.listing(*filters))]

    assert ids(None, None, None, 2) == [third, second.id]
    assert ids(None, None, None, 2, second.id) == [first.id]
    assert ids("b", None, None, None) == [third]
    assert ids(None, "done", None, None) == [first.id]
    assert ids(None, None, "other", None) == [third]


def test_everything_about_one_instance_is_shown_in_both_places(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    shown = rows.run(inspection.show(claimed.id))
    assert shown is not None
    assert (shown.status, shown.worker_id, shown.worker_name) == ("executing", worker, "test")
    rows.flush(worker, done(claimed))
    shown = rows.run(inspection.show(claimed.id))
    assert shown is not None
    assert (shown.status, shown.result, shown.version) == ("done", b'"ok"', 1)
    assert rows.run(inspection.show(2**40)) is None


def test_totals_count_both_tables(rows: Rows) -> None:
    worker = rows.worker()
    rows.flush(worker, *(done(row) for row in rows.claimed(worker, 2)))
    rows.insert(3)
    assert rows.run(inspection.totals()) == ({"done": 2, "runnable": 3}, frozenset())


VALUES: list[Any] = [
    {"a": [1, 2.5, None, True, "é\u2028😀"]},
    "text",
    5,
    None,
    [],
    b"\xff\0",
    b"a\0b",
    Decimal("1.5"),
    uuid.UUID(int=1),
    datetime(2026, 1, 1, tzinfo=UTC),
    10**300,
    -1e-300,
]


def test_the_view_shows_json_payloads_as_jsonb_whatever_path_wrote_them(app: Durable, rows: Rows) -> None:
    task = app.task(name="task")(lambda *args, **kwargs: None)
    task.delay(*VALUES, key="value")
    app.insert_many([(task, {"args": VALUES}), (task, {"kwargs": {"deep": {"er": VALUES}}})])
    task.apply_async(VALUES, countdown=60)
    worker = rows.worker()
    one, two, three = rows.claim(worker)
    rows.flush(
        worker,
        done(one, result=app.codec.encode(VALUES)),
        done(two, status="failed", result=app.codec.encode({"code": 1}), error='{"type": "E", "message": "m"}'),
        done(three, result=Payload("msgpack", b"\x01")),
    )
    seen = rows.fetch(
        "SELECT id, status, jsonb_typeof(state) AS state, jsonb_typeof(state -> 'args') AS args,"
        " jsonb_typeof(result) AS result, error ->> 'message' AS message FROM {schema}.instance_view ORDER BY id"
    )
    assert [row["state"] for row in seen] == ["object"] * 4
    assert [row["args"] for row in seen] == ["array", "array", None, "array"]
    assert [row["result"] for row in seen] == ["array", "object", None, None]
    assert [row["message"] for row in seen] == [None, "m", None, None]
    (row,) = rows.fetch("SELECT state #>> '{args,0,a,4}' AS deep FROM {schema}.instance_view WHERE id = %s", [one.id])
    assert row["deep"] == "é\u2028😀"


@pytest.mark.parametrize("value", [{}, {"a": 1}, "x", 5, True, None, []])
def test_no_payload_is_encoded_twice(app: Durable, rows: Rows, value: Any) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.flush(worker, done(claimed, result=app.codec.encode(value)))
    (row,) = rows.fetch("SELECT result, jsonb_typeof(result) AS kind FROM {schema}.instance_view")
    assert row["result"] == value
    kinds = {dict: "object", str: "string", int: "number", bool: "boolean", type(None): "null", list: "array"}
    assert row["kind"] == kinds[type(value)]


def test_compressed_and_other_payloads_are_left_out_of_the_view(rows: Rows) -> None:
    rows.insert(state=Payload("msgpack", b"\x80"))
    rows.insert(state=Payload("json+gzip", b"\x1f\x8b"))
    assert [row["state"] for row in rows.fetch("SELECT state FROM {schema}.instance_view")] == [None, None]


def test_of_a_long_history_no_more_is_counted_than_a_limit(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 40)
    error = '{"type": "E", "message": ""}'
    rows.flush(
        worker,
        *[done(row) for row in claimed[:30]],
        *[done(row, status="failed", result=None, error=error) for row in claimed[30:37]],
    )
    rows.release(worker, *claimed[37:])
    for row in claimed[37:]:
        rows.cancel(row.id)
    rows.fetch("ANALYZE {schema}.history")
    exact = {"done": 30, "failed": 7, "cancelled": 3}
    assert rows.run(inspection.totals()) == (exact, frozenset())
    monkeypatch.setattr(inspection, "COUNT_MOST", 10)
    assert rows.run(inspection.totals()) == (exact, {"done"}), "what is left of all that there are"
    monkeypatch.setattr(inspection, "COUNT_MOST", 5)
    assert rows.run(inspection.totals()) == ({"done": 31, "failed": 6, "cancelled": 3}, {"done", "failed"})


def test_failures_are_counted_and_listed_through_their_index(rows: Rows) -> None:
    rows.fetch(
        "INSERT INTO {schema}.history (id, eligible_at, created_at, finished_at, token, version, attempt, priority,"
        " crashes, cancel_requested, machine_version, status, queue, machine, step, state_type, state)"
        " SELECT n, t, t, t, 1, 1, 0, 0, 0, false, 1,"
        " CASE WHEN n %% 1000 = 0 THEN 'failed' ELSE 'done' END::{schema}.status, 'q', 'm', 's', 'json', '{}'"
        " FROM generate_series(1, 20000) AS n, clock_timestamp() AS t"
    )
    rows.fetch("ANALYZE {schema}.history")
    (partition,) = rows.fetch(
        "SELECT DISTINCT relname FROM {schema}.history AS h JOIN pg_class AS c ON c.oid = h.tableoid"
    )
    connection = connect(rows.dsn, "people")
    try:
        for call, others in (
            (statement(inspection.recent_failures(5)), []),
            (("history_totals", {"most": 10}), ["Seq Scan"]),
        ):
            nodes = plan(rows, connection, *call)
            mine = [node for node in nodes if node.get("Relation Name") == partition["relname"]]
            assert sum("status_finished_at" in node.get("Index Name", "") for node in mine) == len(mine) - len(others)
            assert [node["Node Type"] for node in mine if "Index Name" not in node] == others
    finally:
        connection.close()
