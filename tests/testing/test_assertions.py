"""Assertions say what they found; time passes when told."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Await, Context, Done, Durable, Machine, Stop, step
from durable.errors import NotFoundError, ValidationError
from durable.testing import (
    assert_awaiting,
    assert_done,
    assert_failed,
    assert_status,
    drain,
    fire_timeouts,
    travel,
)
from tests.machines.driver import View


@pytest.fixture
def approval(app: Durable) -> Any:
    @app.machine(name="approval")
    class Approval(Machine):
        @step(initial=True)
        def ask(self, ctx: Context) -> Any:
            return Await(["approve", "reject"], then=self.decide, state={"asked": 1}, timeout=3600)

        @step
        def decide(self, ctx: Context) -> Any:
            return Done([signal.name for signal in ctx.awaited]) if ctx.awaited else Stop("nobody answered")

    return Approval


def test_a_park_is_asserted_by_id_by_key_and_by_result(app: Durable, approval: Any) -> None:
    result = app.insert(approval, correlation_key="invoice:7")
    drain(app)
    for target in (result, result.id, "invoice:7"):
        assert assert_awaiting(app, target) == result
        assert assert_awaiting(app, target, "reject") == result
        assert assert_status(app, target, "awaiting_signal") == result


def test_a_wrong_assertion_shows_the_instance(app: Durable, approval: Any) -> None:
    app.insert(approval, correlation_key="invoice:7").signal("question", {"why": 1})
    drain(app)
    with pytest.raises(AssertionError) as raised:
        assert_done(app, "invoice:7")
    story = str(raised.value)
    assert "(approval, key 'invoice:7') is awaiting_signal, not done" in story
    assert "step: decide" in story
    assert "awaits: approve, reject, until 2" in story
    assert "question {'why': 1}" in story
    assert "state: {'asked': 1}" in story
    with pytest.raises(AssertionError, match="not awaiting paid"):
        assert_awaiting(app, "invoice:7", "approve", "paid")
    with pytest.raises(AssertionError, match="not failed"):
        assert_failed(app, "invoice:7")
    with pytest.raises(AssertionError, match="is awaiting_signal, not runnable"):
        assert_status(app, "invoice:7", "runnable")


def test_done_gives_the_result_and_may_demand_it(app: Durable) -> None:
    @app.task(name="double")
    def double(n: int) -> int:
        return 2 * n

    result = double.delay(4)
    drain(app)
    assert assert_done(app, result) == 8
    assert assert_done(app, result, 8) == 8
    with pytest.raises(AssertionError, match="with result 8, not None"):
        assert_done(app, result, None)


def test_a_failure_is_asserted_by_type_and_message_and_its_traceback_is_shown(app: Durable) -> None:
    @app.task(name="bad", max_attempts=1)
    def bad() -> None:
        raise KeyError("colour")

    result = app.insert(bad, correlation_key="k")
    drain(app)
    assert assert_failed(app, result).message == "'colour'"
    assert assert_failed(app, "k", KeyError, match="col").error_type == "KeyError"
    assert assert_failed(app, result, "KeyError").id == result.id
    with pytest.raises(AssertionError, match="with KeyError, not ValueError"):
        assert_failed(app, result, ValueError)
    with pytest.raises(AssertionError, match=r"does not match 'size'[\s\S]*in bad\n[\s\S]*KeyError"):
        assert_failed(app, result, match="size")


def test_a_key_means_who_has_it_now_else_who_had_it_last(app: Durable) -> None:
    @app.task(name="note")
    def note(n: int) -> int:
        return n

    for n in (1, 2):
        app.insert(note, args=(n,), correlation_key="k")
        drain(app)
    assert assert_done(app, "k") == 2
    live = app.insert(note, args=(3,), correlation_key="k")
    assert assert_status(app, "k", "runnable") == live


def test_who_is_not_there_is_told(app: Durable) -> None:
    with pytest.raises(AssertionError, match="no instance 12345"):
        assert_done(app, 12345)
    with pytest.raises(AssertionError, match="no instance with correlation key 'nobody'"):
        assert_done(app, "nobody")
    with pytest.raises(NotFoundError, match="nobody"):
        fire_timeouts(app, "nobody")


def test_a_drain_never_fires_timeouts_firing_them_does(app: Durable, approval: Any) -> None:
    first, second = app.insert(approval, correlation_key="a"), approval.delay()
    drain(app)
    assert drain(app) == {"steps": 0}
    assert fire_timeouts(app, "a") == 1
    assert drain(app) == {"steps": 1, "failed": 1}
    assert assert_failed(app, first, "Stop").message == "nobody answered"
    assert_awaiting(app, second)
    assert fire_timeouts(app, "a") == 0
    assert fire_timeouts(app) == 1
    drain(app)
    assert_failed(app, second)


def test_timeouts_fire_in_the_order_of_their_deadlines(app: Durable, view: View) -> None:
    woken = []

    @app.machine(name="waiter")
    class Waiter(Machine):
        @step(initial=True)
        def wait(self, ctx: Context) -> Any:
            return Await("go", then=self.end, timeout=ctx.state["timeout"])

        @step
        def end(self, ctx: Context) -> Any:
            woken.append(ctx.state["timeout"])
            return Done(None)

    for timeout in (300, 100, 200):
        app.insert(Waiter, state={"timeout": timeout})
    drain(app)
    assert fire_timeouts(app) == 3
    drain(app)
    assert woken == [100, 200, 300]


def test_travelling_makes_due_what_comes_due_in_that_time_and_nothing_else(app: Durable, approval: Any) -> None:
    @app.task(name="note")
    def note() -> None: ...

    soon, late = note.apply_async(countdown=50), note.apply_async(countdown=500)
    stale = note.apply_async(countdown=500, expires=550)
    asked = approval.delay()
    drain(app, with_scheduled=False)
    assert travel(app, 60) == 1
    assert drain(app, with_scheduled=False) == {"steps": 1, "done": 1}
    assert [r.status for r in (soon, late, asked)] == ["done", "scheduled", "awaiting_signal"]
    assert travel(app, 0) == 0
    assert travel(app, 495) == 2
    assert drain(app, with_scheduled=False) == {"steps": 1, "done": 1}
    assert_status(app, stale, "cancelled")
    assert travel(app, 3600) == 1
    drain(app)
    assert_failed(app, asked)
    with pytest.raises(ValidationError):
        travel(app, -1)
