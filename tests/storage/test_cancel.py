"""Cancelling by id and by key: at once what waits, when its step ends what executes, False what is over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Durable, Task
from durable.errors import ValidationError
from durable.storage import workers
from tests.fix_rows import Rows, done


@pytest.fixture
def task(app: Durable) -> Task[..., Any]:
    return app.task(name="task")(lambda: None)


@pytest.mark.parametrize("options", [{}, {"countdown": 60}, {"correlation_key": "k"}])
def test_a_waiting_instance_is_cancelled_at_once(
    app: Durable, task: Task[..., Any], rows: Rows, options: dict[str, Any]
) -> None:
    result = task.apply_async(**options)
    assert app.cancel(result.id, "not needed")
    row = rows.history(result.id)
    assert row is not None
    assert rows.live(result.id) is None
    assert (row["status"], row["error"]) == ("cancelled", {"type": "Cancelled", "message": "not needed"})
    assert (row["finished_at"] is not None, row["version"]) == (True, 0)
    assert rows.claim(rows.worker()) == []


def test_without_a_reason_it_just_says_cancelled(app: Durable, task: Task[..., Any]) -> None:
    result = task.delay()
    assert app.cancel(result.id)
    error = result.error
    assert error is not None
    assert (error.error_type, error.message) == ("Cancelled", "cancelled")


def test_an_executing_instance_is_cancelled_when_its_step_ends(app: Durable, task: Task[..., Any], rows: Rows) -> None:
    result = task.delay()
    worker = rows.worker()
    (claimed,) = rows.claim(worker)
    assert app.cancel(result.id)
    assert app.cancel(result.id), "still true: it is not over"
    row = rows.live(result.id)
    assert row is not None
    assert (row["status"], row["worker_id"], row["cancel_requested"]) == ("executing", worker, True)
    rows.flush(worker, done(claimed))
    assert result.status == "cancelled"
    assert not app.cancel(result.id)


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
@pytest.mark.parametrize("scope", [None, ("done", "failed", "cancelled")])
def test_what_is_over_is_not_cancelled_and_not_changed(
    app: Durable, task: Task[..., Any], rows: Rows, end: str, scope: Any
) -> None:
    result = task.apply_async(correlation_key="k", correlation_scope=scope)
    worker = rows.worker()
    (claimed,) = rows.claim(worker)
    rows.flush(worker, done(claimed, status=end))
    before = rows.live(result.id) or rows.history(result.id)
    assert not app.cancel(result.id)
    assert not app.cancel("k")
    assert not result.cancel()
    assert (rows.live(result.id) or rows.history(result.id)) == before


@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a cancel"])
def test_terminating_what_executes_marks_its_claim_and_no_other(
    app: Durable, task: Task[..., Any], rows: Rows, before: bool
) -> None:
    result, other = task.delay(), task.delay()
    worker = rows.worker()
    mine, others = rows.claim(worker)
    claims = [(mine.id, mine.token), (others.id, others.token)]
    if before:
        app.cancel(result.id, "please")
    assert rows.run(workers.terminations(claims)) == []
    assert app.cancel(result.id, "now", terminate=True)
    assert rows.run(workers.terminations(claims)) == [claims[0]]
    assert rows.run(workers.terminations([(mine.id, mine.token + 1), (mine.id, mine.token - 1)])) == []
    assert app.cancel(result.id, "a plain one takes nothing back")
    assert rows.run(workers.terminations(claims)) == [claims[0]]

    rows.bury(worker)
    reclaimed = rows.reclaim(worker, [claims[0]])
    assert (reclaimed.crashed, reclaimed.by_queue) == ([], {"default": 1})
    row = rows.history(result.id)
    assert row is not None
    assert (row["status"], row["crashes"], row["error"]["message"]) == ("cancelled", 0, "please" if before else "now")
    assert rows.run(workers.terminations(claims)) == []
    assert other.status == "runnable"


@pytest.mark.parametrize("by_key", [False, True])
def test_terminating_what_waits_is_a_plain_cancel(app: Durable, task: Task[..., Any], rows: Rows, by_key: bool) -> None:
    result = task.apply_async(correlation_key="k")
    assert app.cancel("k" if by_key else result.id, "no", terminate=True)
    assert (result.status, result.error and result.error.message) == ("cancelled", "no")
    assert not app.cancel(result.id, terminate=True)


def test_an_outcome_that_commits_before_the_kill_is_cancelled_all_the_same(
    app: Durable, task: Task[..., Any], rows: Rows
) -> None:
    result = task.delay()
    worker = rows.worker()
    (claimed,) = rows.claim(worker)
    app.cancel(result.id, terminate=True)
    assert rows.flush(worker, done(claimed)) == {result.id}
    assert result.status == "cancelled"
    assert rows.run(workers.terminations([(claimed.id, claimed.token)])) == []


def test_coroutines_terminate_too(app: Durable, task: Task[..., Any], rows: Rows) -> None:
    result = task.delay()
    (claimed,) = rows.claim(rows.worker())

    async def end() -> bool:
        try:
            return await result.acancel("now", terminate=True)
        finally:
            await app.aclose()

    assert asyncio.run(end())
    assert rows.run(workers.terminations([(claimed.id, claimed.token)])) == [(claimed.id, claimed.token)]


def test_both_tables_have_the_same_columns_in_the_same_order(rows: Rows) -> None:
    """A finished row moves with `SELECT *`."""
    live, history = (
        [
            (row["name"], row["type"])
            for row in rows.fetch(
                "SELECT attname AS name, atttypid::regtype::text AS type FROM pg_attribute"
                " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
                [f"{rows.schema}.{table}"],
            )
        ]
        for table in ("instances", "history")
    )
    assert live == history


def test_a_key_cancels_whoever_occupies_it_now(app: Durable, task: Task[..., Any]) -> None:
    first = task.apply_async(correlation_key="k")
    assert app.cancel("k", "first")
    second = task.apply_async(correlation_key="k")
    assert app.cancel("k", "second")
    assert (first.status, second.status) == ("cancelled", "cancelled")
    assert second.error is not None
    assert second.error.message == "second"
    assert not app.cancel("k")


def test_a_cancelled_key_that_is_reserved_stays_in_place(app: Durable, task: Task[..., Any], rows: Rows) -> None:
    result = task.apply_async(correlation_key="k", correlation_scope=["cancelled"])
    assert app.cancel("k")
    row = rows.live(result.id)
    assert row is not None
    assert row["status"] == "cancelled"
    assert not app.cancel("k")


def test_nobody_is_false_and_nonsense_an_error(app: Durable) -> None:
    assert not app.cancel(2**40)
    assert not app.cancel("no such key")
    for target in ("", "a\0", -1, 2**63, None, 1.5):
        with pytest.raises(ValidationError):
            app.cancel(target)  # type: ignore[arg-type]
    for reason in ("", "a\0", "x" * 20_000, 5, "\ud800"):
        with pytest.raises(ValidationError, match="reason"):
            app.cancel(1, reason)  # type: ignore[arg-type]
