"""`app.retry`: a failed instance goes on from its failed step; and `on_conflict`."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from durable import Await, Context, Done, DuplicateError, Durable, Machine, Next, ScheduleChildren, step
from durable.errors import ValidationError
from tests.machines.driver import Driver, Drivers


def test_a_failed_machine_goes_on_from_its_failed_step(
    app: Durable, driver: Driver, connection: psycopg.Connection[Any]
) -> None:
    broken = [True]

    @app.machine(name="two")
    class Two(Machine):
        @step(initial=True)
        def first(self, ctx: Context) -> Any:
            return Next(self.second, {"n": 1})

        @step
        def second(self, ctx: Context) -> Any:
            if broken[0]:
                raise RuntimeError("the service was down")
            return Done(ctx.state["n"])

    result = Two.delay()
    driver.drain()
    assert result.status == "failed"
    before = connection.execute(f"SELECT token, version, step FROM {app.schema}.history").fetchone()
    broken[0] = False

    assert app.retry(result.id) is True
    assert connection.execute(
        f"SELECT token, version, step, status::text, attempt FROM {app.schema}.instances"
    ).fetchall() == [(*before, "runnable", 0)]  # type: ignore[misc]
    driver.drain()

    again = app.result(result.id)
    assert (again.status, again.result, again.attempts) == ("done", 1, 3)
    assert app.retry(result.id) is False


async def retried(app: Durable, *ids: int) -> list[bool]:
    try:
        return [await app.aretry(instance) for instance in ids]
    finally:
        await app.aclose()


def test_coroutines_retry_too(app: Durable, driver: Driver) -> None:
    task = app.task(name="boom", max_attempts=1)(_boom)
    failed = task.apply_async(correlation_key="k")
    driver.drain()
    assert asyncio.run(retried(app, failed.id, failed.id, 2**40)) == [True, False, False]
    driver.drain()
    rival = task.apply_async(correlation_key="k")
    with pytest.raises(DuplicateError) as refused:
        asyncio.run(retried(app, failed.id))
    assert refused.value.existing_id == rival.id


def test_a_handle_that_was_retried_follows_the_new_run(app: Durable, driver: Driver) -> None:
    outcomes = [RuntimeError("no"), RuntimeError("no"), None]

    @app.task(name="third", max_attempts=1)
    def third() -> str:
        if error := outcomes.pop(0):
            raise error
        return "well"

    result = third.delay()
    driver.drain()
    assert (result.failed(), result.attempts) == (True, 1)
    assert result.retry() is True
    assert result.status == "runnable"
    assert result.retry() is False
    driver.drain()
    assert result.failed()

    async def again() -> bool:
        try:
            return await result.aretry()
        finally:
            await app.aclose()

    assert asyncio.run(again()) is True
    driver.drain()
    assert result.get(timeout=5) == "well"
    assert result.retry() is False


def test_what_is_not_failed_is_not_retried(app: Durable) -> None:
    task = app.task(name="noop")(lambda: None)
    assert app.retry(task.delay().id) is False
    assert app.retry(2**40) is False


def test_a_retry_never_takes_an_occupied_key(app: Durable, driver: Driver) -> None:
    task = app.task(name="boom", max_attempts=1)(_boom)
    failed = task.apply_async(correlation_key="order:1")
    driver.drain()
    rival = task.apply_async(correlation_key="order:1")

    with pytest.raises(DuplicateError) as refused:
        app.retry(failed.id)
    assert refused.value.existing_id == rival.id
    assert app.result(failed.id).status == "failed"


def test_a_retried_child_is_not_counted_twice(app: Durable, driver: Driver, drivers: Drivers) -> None:
    task = app.task(name="boom", max_attempts=1)(_boom)
    slow = app.task(name="slow", queue="other")(lambda: None)

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([task, slow], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            return Done([child.status for child in ctx.children_all])

    parent = Parent.delay()
    driver.drain()
    (failed,) = [child for child in parent.children if child.status == "failed"]
    assert app.retry(failed.id)
    driver.drain()
    assert parent.status == "awaiting_children"  # the other child has not ended

    drivers(queue="other").drain()
    driver.drain()
    assert parent.status == "done"


def test_on_conflict_returns_the_occupant(app: Durable) -> None:
    task = app.task(name="noop")(lambda: None)
    first = task.apply_async(correlation_key="k")

    assert task.apply_async(correlation_key="k", on_conflict="return").id == first.id
    assert app.insert(task, correlation_key="k", on_conflict="return").id == first.id
    with pytest.raises(ValidationError, match="on_conflict"):
        task.apply_async(correlation_key="k", on_conflict="ignore")


def _boom() -> None:
    raise RuntimeError("no")


def test_a_signal_that_came_with_the_failure_is_shown_after_the_retry(app: Durable, driver: Driver) -> None:
    broken = [True]

    @app.machine(name="waits")
    class Waits(Machine):
        @step(initial=True)
        def first(self, ctx: Context) -> Any:
            if broken[0]:
                raise RuntimeError("the service was down")
            return Await("paid", then=self.second)

        @step
        def second(self, ctx: Context) -> Any:
            return Done([signal.payload for signal in ctx.awaited])

    results = [Waits.delay(), app.insert(Waits, correlation_key="kept", correlation_scope=["failed"])]
    commits = [driver.execute(claimed) for claimed in driver.claims()]
    for result in results:
        result.signal("paid", 5)
    driver.flush(*commits)
    assert [result.status for result in results] == ["failed", "failed"]
    broken[0] = False
    for result in results:
        assert app.retry(result.id)
    driver.drain()
    assert [app.result(result.id).get(timeout=1) for result in results] == [[5], [5]]
