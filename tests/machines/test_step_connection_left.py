"""What a step leaves behind on `ctx.connection`, or in the middle of, is nobody else's trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from durable import Context, Durable
from durable.runtime import soft_limit, step_transaction
from tests.fix_db import wait_until
from tests.machines.driver import Driver, View

Step = Callable[[Any], Any]


@pytest.fixture
def two(app: Durable, driver: Driver, view: View) -> Callable[[Step], list[Any]]:
    """Run one step twice, each on the connection; return status and the error's type."""

    def run(body: Step) -> list[Any]:
        @app.task(bind=True, name="t", max_attempts=1)
        def work(ctx: Context) -> None:
            body(ctx.connection)

        results = [work.delay() for _ in range(2)]
        driver.drain(1)
        return [
            (status, error and error["type"]) for r in results for status, error in [view.of(r.id, "status", "error")]
        ]

    return run


@pytest.mark.parametrize(
    "statement",
    ["CREATE TEMP TABLE staging (n int)", "DECLARE mine CURSOR WITH HOLD FOR SELECT 1"],
    ids=["temporary table", "cursor"],
)
def test_what_is_made_for_a_session_is_gone_in_the_next_step(two: Callable[[Step], list[Any]], statement: str) -> None:
    assert two(lambda connection: connection.execute(statement)) == [("done", None)] * 2


def test_a_session_lock_does_not_outlive_the_next_begin(
    two: Callable[[Step], list[Any]], connection: Any, app: Durable
) -> None:
    key = f"hashtext('{app.schema}')"
    free: list[bool] = []

    def body(own: Any) -> None:
        free.append(connection.execute(f"SELECT pg_try_advisory_xact_lock({key})").fetchone()[0])
        own.execute(f"SELECT pg_advisory_lock({key})")

    assert two(body) == [("done", None)] * 2
    assert free == [True, True]


def _pipeline(connection: Any) -> object:
    entered = connection.pipeline()
    entered.__enter__()
    connection.execute("SELECT 1").fetchone()
    return entered


def _copy_out(connection: Any) -> object:
    copy = connection.cursor().copy("COPY (SELECT generate_series(1, 1000000)) TO STDOUT")
    copy.__enter__().read()
    return copy


def _copy_in(connection: Any) -> object:
    connection.execute("CREATE TEMP TABLE staging (n int)")
    copy = connection.cursor().copy("COPY staging FROM STDIN")
    copy.__enter__().write("1\n")
    return copy


@pytest.mark.parametrize("leave", [_pipeline, _copy_out, _copy_in], ids=["pipeline", "copy out", "copy in"])
def test_what_a_step_leaves_open_fails_it_and_no_other(
    app: Durable, driver: Driver, view: View, leave: Callable[[Any], object]
) -> None:
    left: list[object] = []

    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context, first: bool) -> Any:
        if first:
            left.append(leave(ctx.connection))
        return ctx.connection.execute("SELECT 7").fetchone() if not first else None

    results = [work.delay(first) for first in (True, False)]
    driver.drain(1)
    (error,) = view.of(results[0].id, "error")
    assert error["type"] == "ConnectionUsageError"
    assert results[1].get(1) == [7]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_statement_that_a_soft_limit_interrupts_ends_on_the_server_too(
    app: Durable, driver: Driver, view: View, connection: Any, asynchronous: bool
) -> None:
    pids: list[int] = []

    @app.task(bind=True, name="sync", max_attempts=1, soft_time_limit=0.3)
    def work(ctx: Context) -> None:
        pids.append(ctx.connection.info.backend_pid)
        ctx.connection.execute("SELECT pg_sleep(30)")

    @app.task(bind=True, name="async", max_attempts=1, soft_time_limit=0.3)
    async def awork(ctx: Context) -> None:
        pids.append(ctx.connection.info.backend_pid)
        await ctx.connection.execute("SELECT pg_sleep(30)")

    soft_limit.install()
    result = awork.delay() if asynchronous else work.delay()
    driver.step()
    assert view.of(result.id, "error")[0]["type"] == "SoftTimeLimitExceeded"
    count = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: connection.execute(count, pids).fetchone()[0] == 0, what="the statement to end")


def test_a_transaction_that_the_server_ends_for_its_length_fails_the_step(
    app: Durable, driver: Driver, view: View
) -> None:
    runs: list[int] = []

    @app.task(bind=True, name="t", max_attempts=2)
    def work(ctx: Context) -> None:
        runs.append(ctx.attempt)
        if len(runs) < 5:
            ctx.connection.execute("SET idle_in_transaction_session_timeout = '50ms'")
            time.sleep(0.2)

    result = work.delay()
    driver.step()
    assert (runs, view.of(result.id, "attempt")) == ([0], (1,))


def test_threads_of_a_step_share_its_connection(app: Durable, driver: Driver) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> list[bool]:
        seen: list[object] = []
        threads = [threading.Thread(target=lambda: seen.append(ctx.connection), daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2.0)
        return [connection is seen[0] for connection in seen]

    result = work.delay()
    driver.step()
    assert result.get(1) == [True] * 4


def test_a_soft_limit_does_not_interrupt_the_opening_half_way(
    app: Durable, driver: Driver, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(step_transaction.StepTransaction):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            time.sleep(0.4)  # between having a connection and the step's knowing of it

    @app.task(bind=True, name="t", max_attempts=1, soft_time_limit=0.2)
    def work(ctx: Context) -> Any:
        return ctx.connection.execute("SELECT 7").fetchone()

    soft_limit.install()
    results = [work.delay() for _ in range(2)]
    monkeypatch.setattr(step_transaction, "StepTransaction", Slow)
    driver.step()
    assert view.of(results[0].id, "error")[0]["type"] == "SoftTimeLimitExceeded"
    monkeypatch.undo()
    driver.step()
    assert results[1].get(1) == [7]
