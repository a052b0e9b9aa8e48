"""`ctx.cancel_requested`: a long step asks whether it is still wanted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from durable import Context, Done, Durable, Machine, step
from durable.context import CANCEL_LOOK
from durable.storage.session import Operation
from tests.machines.driver import Driver


@pytest.fixture
def asked(app: Durable, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the statements that this process's producer connections ran."""
    names: list[str] = []
    run = app.run

    def noting(operation: Operation[Any]) -> Any:
        def noted() -> Operation[Any]:
            rows = None
            while True:
                try:
                    call = operation.send(rows)  # type: ignore[arg-type]
                except StopIteration as stop:
                    return stop.value
                names.append(call[0])
                rows = yield call

        return run(noted())

    monkeypatch.setattr(app, "run", noting)
    return names


def test_a_step_sees_the_request_that_comes_while_it_runs(app: Durable, driver: Driver) -> None:
    seen: list[bool] = []

    @app.task(name="task", bind=True)
    def task(ctx: Context) -> str:
        seen.append(ctx.cancel_requested)
        app.cancel(ctx.id, "enough")
        time.sleep(CANCEL_LOOK)
        seen.append(ctx.cancel_requested)
        return "too late"

    result = task.delay()
    driver.drain()
    assert seen == [False, True]
    assert (result.status, result.result) == ("cancelled", None)
    assert result.error is not None
    assert result.error.message == "enough"


def test_a_machine_and_an_async_step_see_it_too(app: Durable, driver: Driver) -> None:
    seen: list[bool] = []

    @app.machine(name="machine")
    class Loop(Machine):
        @step(initial=True)
        async def start(self, ctx: Context) -> Any:
            seen.append(ctx.cancel_requested)
            await app.acancel(ctx.id)
            await asyncio.sleep(CANCEL_LOOK)
            seen.append(ctx.cancel_requested)
            await app.aclose()
            return Done()

    result = Loop.delay()
    driver.drain()
    assert seen == [False, True]
    assert result.status == "cancelled"


def test_the_database_is_asked_at_most_ten_times_a_second_and_never_after_a_yes(
    app: Durable, driver: Driver, asked: list[str]
) -> None:
    looks: list[int] = []

    @app.task(name="task", bind=True)
    def task(ctx: Context) -> None:
        until = time.monotonic() + 3.5 * CANCEL_LOOK
        while time.monotonic() < until:
            assert not ctx.cancel_requested
        looks.append(len(asked))
        app.cancel(ctx.id)
        while not ctx.cancel_requested:
            pass
        asked.clear()
        time.sleep(2 * CANCEL_LOOK)
        assert ctx.cancel_requested
        looks.append(len(asked))

    result = task.delay()
    driver.drain()
    assert result.status == "cancelled", result.error
    assert 2 <= looks[0] <= 4
    assert looks[1] == 0


@pytest.mark.parametrize("claimed_again", [False, True])
def test_a_step_that_lost_its_claim_is_not_wanted_any_more(
    app: Durable, driver: Driver, drivers: Callable[..., Driver], claimed_again: bool
) -> None:
    seen: list[bool] = []

    @app.task(name="task", bind=True)
    def task(ctx: Context) -> None:
        seen.append(ctx.cancel_requested)
        driver.die()
        if claimed_again:
            drivers().claim()
        time.sleep(CANCEL_LOOK)
        seen.append(ctx.cancel_requested)

    result = task.delay()
    driver.execute(driver.claim())
    assert seen == [False, True], "its outcome would count for nothing"
    assert result.status == ("executing" if claimed_again else "runnable")


def test_a_database_that_is_away_never_fails_the_step(
    app: Durable, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bool] = []

    @app.task(name="task", bind=True)
    def task(ctx: Context) -> None:
        away = Durable("away", dsn="postgresql://nobody@127.0.0.1:1/x", connect_timeout=0.5)
        with monkeypatch.context() as patched:
            patched.setattr(app, "run", away.run)
            seen.append(ctx.cancel_requested)
        away.close()

    result = task.delay()
    driver.drain()
    assert seen == [False]
    assert result.status == "done"
    assert "whether it is cancelled" in caplog.text
