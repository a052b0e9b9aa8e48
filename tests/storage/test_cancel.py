"""Cancelling by id and by key: at once what waits, when its step ends what executes, False what is over."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Durable, Task
from durable.errors import ValidationError
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
