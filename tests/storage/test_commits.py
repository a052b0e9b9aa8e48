"""Committing outcomes: what each does to its row, the fence in front of it, and how little it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from durable.instance import LIVE, Claimed, Payload
from durable.storage import claims, partitions
from durable.storage.claims import Commit
from tests.fix_rows import DONE, Rows, done
from tests.interleaving import noted

ERROR = '{"type": "ValueError", "message": "bad", "traceback": "..."}'

KINDS: dict[str, Callable[[Claimed], Commit]] = {
    "done": done,
    "failed": lambda row: Commit(row, "failed", error=ERROR),
    "cancelled": lambda row: Commit(row, "cancelled", error=ERROR),
    "retry at once": lambda row: Commit(row, "runnable", error=ERROR, attempt=row.attempt + 1, delay=0.0),
    "retry later": lambda row: Commit(row, "scheduled", error=ERROR, attempt=row.attempt + 1, delay=60.0),
    "done, key kept": lambda row: done(row._replace(keeps_key=True)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)

END_IN_PLACE = ["ended_families", "archive"]
"""Statements behind the one that ended rows in the live table, where they have neither a parent nor signals."""


def statements(rows: Rows, action: Callable[[], Any]) -> int:
    """How many statements the session sent during an action, as libpq's own trace has it."""
    with tempfile.TemporaryFile() as trace:
        rows.connection.pgconn.trace(trace.fileno())
        try:
            action()
        finally:
            rows.connection.pgconn.untrace()
        trace.seek(0)
        messages = [line.split(b"\t") for line in trace.read().splitlines()]
    sent = [message[3].strip() for message in messages if message[1:2] == [b"F"]]
    return sent.count(b"Execute") + sent.count(b"Query")


# What each does


def test_a_finished_row_moves_to_history_with_every_column(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(
        worker, correlation_key="k", max_attempts=9, priority=3, queue="q", expires_in=60.0, machine_version=2
    )
    before = rows.live(claimed.id)
    assert before is not None
    assert rows.flush(worker, done(claimed)) == {claimed.id}
    after = rows.history(claimed.id)
    assert after is not None
    assert rows.live(claimed.id) is None
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"status", "version", "finished_at", "result", "result_type"}
    assert (after["status"], after["version"]) == ("done", 1)
    assert (after["result_type"], after["result"]) == ("json", b'"ok"')
    assert after["finished_at"] >= after["created_at"]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_failure_keeps_its_error_and_its_reason(rows: Rows, status: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.flush(worker, Commit(claimed, status, result=Payload("msgpack", b"\xa1x"), error=ERROR))
    row = rows.history(claimed.id)
    assert row is not None
    assert (row["status"], row["error"]["message"]) == (status, "bad")
    assert (row["result_type"], row["result"]) == ("msgpack", b"\xa1x")


@pytest.mark.parametrize(("status", "delay"), [("runnable", 0.0), ("scheduled", 60.0)])
def test_a_retry_keeps_the_row_and_counts_the_attempt(rows: Rows, status: str, delay: float) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.fetch("UPDATE {schema}.instances SET crashes = 2")
    rows.flush(worker, Commit(claimed, status, error=ERROR, attempt=1, delay=delay))
    (row,) = rows.fetch("SELECT *, eligible_at - clock_timestamp() AS wait FROM {schema}.instances")
    assert (row["status"], row["attempt"], row["version"], row["token"]) == (status, 1, 1, 1)
    assert (row["worker_id"], row["crashes"], row["finished_at"]) == (None, 0, None)
    assert row["error"]["type"] == "ValueError"
    assert delay - 5 < row["wait"].total_seconds() <= delay


def test_a_retry_at_once_goes_to_the_end_of_its_priority(rows: Rows) -> None:
    worker = rows.worker()
    first, second = rows.insert(2)
    (claimed,) = rows.claim(worker, 1)
    rows.flush(worker, KINDS["retry at once"](claimed))
    assert [row.id for row in rows.claim(worker)] == [second, first]


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_a_reserved_key_keeps_the_row_in_the_live_table(rows: Rows, end: str) -> None:
    worker = rows.worker()
    live = sorted(LIVE)
    for scope, kept in (((*live, end), True), (live, False), ((), False)):
        (claimed,) = rows.claimed(worker, correlation_key="k", correlation_scope=tuple(scope))
        assert claimed.keeps_key
        assert rows.flush(worker, Commit(claimed, end, result=DONE)) == {claimed.id}
        row = rows.live(claimed.id) if kept else rows.history(claimed.id)
        assert row is not None
        assert (row["status"], row["version"], row["worker_id"], row["result"]) == (end, 1, None, b'"ok"')
        assert rows.status(claimed.id) == end
        rows.fetch("DELETE FROM {schema}.instances")


@every_kind
def test_a_requested_cancel_makes_every_outcome_cancelled(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    assert rows.cancel(claimed.id, "no longer wanted")
    assert rows.status(claimed.id) == "executing", "claim and slot stay held until the step ends"
    assert rows.flush(worker, KINDS[kind](claimed)) == {claimed.id}
    row = rows.history(claimed.id)
    assert row is not None
    assert (row["status"], row["result"], row["result_type"]) == ("cancelled", None, None)
    assert row["error"] == {"type": "Cancelled", "message": "no longer wanted"}
    assert row["finished_at"] is not None


def test_a_cancel_tells_its_own_reason_not_the_last_attempts_error(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.flush(worker, KINDS["retry at once"](claimed))
    (claimed,) = rows.claim(worker)
    rows.cancel(claimed.id, "first reason")
    rows.cancel(claimed.id, "second reason")
    rows.flush(worker, done(claimed))
    row = rows.history(claimed.id)
    assert row is not None
    assert row["error"] == {"type": "Cancelled", "message": "first reason"}


# The fence


def stale_claims(rows: Rows, case: str) -> tuple[int, Claimed]:
    """A worker, and a claim of its that is no longer the truth."""
    worker = rows.worker()
    (claimed,) = rows.claimed(worker, correlation_key="k")
    if case == "another worker":
        return rows.worker(), claimed
    if case == "an older token":
        return worker, claimed._replace(token=claimed.token - 1)
    if case == "a newer token":
        return worker, claimed._replace(token=claimed.token + 1)
    if case == "another version":
        return worker, claimed._replace(version=claimed.version + 1)
    rows.bury(worker)
    if case in ("reaped", "reaped and claimed again"):
        rows.reclaim(worker, [])
        if case != "reaped":
            assert len(rows.claim(rows.worker())) == 1
        return worker, claimed
    if case == "released":
        rows.release(worker, claimed)
        return worker, claimed
    if case == "released and claimed by the same worker":
        rows.fetch("UPDATE {schema}.workers SET dead_at = NULL")
        rows.release(worker, claimed)
        assert len(rows.claim(worker)) == 1
        return worker, claimed
    if case == "retried":
        rows.flush(worker, KINDS["retry at once"](claimed))
        return worker, claimed
    if case == "finished":
        rows.flush(worker, done(claimed, status="failed", result=None, error=ERROR))
        return worker, claimed
    assert case == "gone"
    rows.fetch("DELETE FROM {schema}.instances")
    return worker, claimed


CASES = [
    "another worker",
    "an older token",
    "a newer token",
    "another version",
    "reaped",
    "reaped and claimed again",
    "released",
    "released and claimed by the same worker",
    "retried",
    "finished",
    "gone",
]


@pytest.mark.parametrize("case", CASES)
def test_a_stale_outcome_of_any_kind_changes_nothing(rows: Rows, case: str) -> None:
    worker, claimed = stale_claims(rows, case)
    before = rows.live(claimed.id), rows.history(claimed.id)
    for kind, make in KINDS.items():
        assert rows.flush(worker, make(claimed)) == set(), kind
        assert (rows.live(claimed.id), rows.history(claimed.id)) == before, kind
    names: list[str] = []
    assert rows.atomically(noted(claims.expire(worker, [(claimed.id, claimed.token)]), names)) == {}
    if case == "another version":  # a claim is worker and token: this one is still ours, and ends
        assert names == ["lock_parents", "expire", *END_IN_PLACE]
        assert rows.status(claimed.id) == "cancelled"
    else:
        assert names == ["lock_parents", "expire"], "nothing ended"
        assert (rows.live(claimed.id), rows.history(claimed.id)) == before


@every_kind
def test_one_stale_outcome_leaves_its_neighbours_alone(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 5)
    rows.release(worker, claimed[2])
    committed = rows.flush(worker, *(KINDS[kind](row) for row in claimed))
    assert committed == {row.id for row in claimed} - {claimed[2].id}
    assert rows.status(claimed[2].id) == "runnable"
    assert rows.status(claimed[4].id) != "executing"


@pytest.mark.parametrize("newest_first", [True, False])
def test_of_two_outcomes_of_one_row_that_of_the_claim_that_stands_commits(rows: Rows, newest_first: bool) -> None:
    worker = rows.worker()
    old, neighbour = rows.claimed(worker, 2)
    rows.release(worker, old)
    (new,) = rows.claim(worker, 1)
    first, second = (new, old) if newest_first else (old, new)
    outcomes = [done(claimed, result=Payload("json", str(claimed.token).encode())) for claimed in (first, second)]
    assert rows.flush(worker, *outcomes, done(neighbour)) == {new.id, neighbour.id}
    row = rows.history(new.id)
    assert row is not None
    assert (row["token"], row["result"]) == (new.token, str(new.token).encode())


@pytest.mark.parametrize("kept", [False, True], ids=["moved", "key kept"])
def test_two_outcomes_of_one_child_lower_its_parents_barrier_once(rows: Rows, kept: bool) -> None:
    worker = rows.worker()
    (parent,) = rows.insert(queue="parents")
    rows.fetch(
        "UPDATE {schema}.instances SET status = 'awaiting_children', children_round = 1, children_pending = 2"
        " WHERE id = %s",
        [parent],
    )
    (old,) = rows.claimed(worker, parent_id=parent, parent_round=1)
    rows.release(worker, old)
    (new,) = rows.claim(worker, 1)
    assert rows.flush(worker, *(done(row._replace(keeps_key=kept)) for row in (old, new))) == {new.id}
    row = rows.live(parent)
    assert row is not None
    assert (row["status"], row["children_pending"]) == ("awaiting_children", 1)


def test_a_flush_of_every_kind_at_once_commits_each(rows: Rows) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, len(KINDS))
    committed = rows.flush(worker, *(make(row) for make, row in zip(KINDS.values(), reversed(claimed), strict=True)))
    assert committed == {row.id for row in claimed}
    statuses = [rows.status(row.id) for row in reversed(claimed)]
    assert statuses == ["done", "failed", "cancelled", "runnable", "scheduled", "done"]


def test_an_outcome_the_database_refuses_takes_the_whole_flush_back(rows: Rows) -> None:
    """The flusher halves it then; nothing of a failed flush is there."""
    worker = rows.worker()
    claimed = rows.claimed(worker, 4)
    commits = [done(claimed[0]), KINDS["retry at once"](claimed[1]), KINDS["done, key kept"](claimed[2])]
    for bad in (Commit(claimed[3], "failed", error="no json"), Commit(claimed[3], "failed", error='"\\u0000"')):
        with pytest.raises(psycopg.DataError):
            rows.flush(worker, *commits, bad)
        assert {rows.status(row.id) for row in claimed} == {"executing"}


def test_a_missing_partition_is_an_error_and_nothing_is_lost(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    for (name,) in rows.connection.execute(
        "SELECT c.oid::regclass::text FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid"
        " WHERE inhparent = %s::regclass",
        [f"{rows.schema}.history"],
    ).fetchall():
        rows.fetch(f"DROP TABLE {name}")
    with pytest.raises(psycopg.errors.CheckViolation):
        rows.flush(worker, done(claimed))
    assert rows.status(claimed.id) == "executing"
    assert partitions.ensure(rows.connection, rows.sql) == 16
    assert rows.flush(worker, done(claimed)) == {claimed.id}


# The cost

STATEMENTS = {
    ("done",): ["finish"],
    ("retry later",): ["advance"],
    ("done, key kept",): ["advance", *END_IN_PLACE],
    tuple(KINDS): ["lock_family", "finish", "advance", *END_IN_PLACE],
}
"""Which statements a flush of these kinds runs; more than one, or one that others may follow, in a transaction."""


@pytest.mark.parametrize("mix", STATEMENTS, ids="+".join)
@pytest.mark.parametrize("size", [1, 200], ids=["one of each", "200 of each"])
def test_the_number_of_statements_does_not_depend_on_the_size_of_the_flush(
    rows: Rows, mix: tuple[str, ...], size: int
) -> None:
    worker = rows.worker()

    def commits() -> list[Commit]:
        return [KINDS[mix[n % len(mix)]](row) for n, row in enumerate(rows.claimed(worker, size * len(mix)))]

    names: list[str] = []
    rows.atomically(noted(claims._flush(worker, commits()), names))
    assert names == STATEMENTS[mix]
    rows.fetch("DELETE FROM {schema}.instances")
    batch = commits()
    begin_and_commit = 0 if mix == ("done",) else 2
    assert statements(rows, lambda: rows.flush(worker, *batch)) == len(names) + begin_and_commit


def test_a_claim_is_one_statement(rows: Rows) -> None:
    worker = rows.worker()
    rows.insert(50)
    assert statements(rows, lambda: rows.claim(worker, 50)) == 1


# A lost COMMIT answer


@every_kind
def test_an_outcome_that_had_committed_is_recognised_afterwards(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    commit = KINDS[kind](claimed)
    assert rows.run(claims.resolve([commit])).committed == set(), "not yet"
    rows.flush(worker, commit)
    assert rows.flush(worker, commit) == set(), "the second submission is stale"
    assert rows.run(claims.resolve([commit])).committed == {claimed.id}


def test_a_retry_that_had_committed_is_recognised_although_another_claimed_it_since(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    commit = KINDS["retry at once"](claimed)
    rows.flush(worker, commit)
    (again,) = rows.claim(rows.worker())
    assert again.token == claimed.token + 1
    assert rows.run(claims.resolve([commit])).committed == {claimed.id}


@pytest.mark.parametrize("case", ["reaped", "reaped and claimed again", "released", "gone"])
def test_an_outcome_that_never_committed_is_not_taken_for_one_that_had(rows: Rows, case: str) -> None:
    _, claimed = stale_claims(rows, case)
    assert rows.run(claims.resolve([done(claimed)])).committed == set()
