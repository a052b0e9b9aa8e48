"""Signals at an end: what a retried step is shown, what stays unread, and `on_unread="rerun"`."""

from __future__ import annotations

import logging
import re
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from durable import Await, Context, Done, Durable, Machine, Next, Stop, step, telemetry
from durable.errors import DefinitionError
from durable.runtime.gc import collect
from durable.storage import inspection, maintenance
from durable.storage.session import run
from tests.machines.driver import Driver, Drivers, View


@pytest.fixture
def checkout(app: Durable) -> type[Machine]:
    """Ships what is paid. Its state says how often shipping fails; "gone": it waits no more when it fails."""

    @app.machine(name="checkout")
    class Checkout(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await(["paid", "gift"], then=self.ship, timeout=3600)

        @step
        def ship(self, ctx: Context) -> Any:
            if not ctx.awaited:
                return Stop("payment never came")
            if failing:
                raise ConnectionError("the warehouse is down")
            return Done([[s.payload for s in ctx.awaited], [s.name for s in ctx.all]])

    failing: list[bool] = []
    Checkout.failing = failing  # type: ignore[attr-defined]
    return Checkout


def unread(app: Durable, instance: int) -> list[tuple[str, Any]]:
    return [(signal.name, signal.payload) for signal in app.result(instance).unread]


# Retried


@pytest.mark.parametrize("scope", [None, ["failed"]])
def test_retry_shows_the_failed_step_its_signals(
    app: Durable, driver: Driver, view: View, checkout: Any, scope: list[str] | None
) -> None:
    checkout.failing.append(True)
    result = app.insert(checkout, correlation_key="order", correlation_scope=scope)
    driver.drain()
    app.signal("order", "note", "ring twice")
    app.signal("order", "paid", 100, dedup_key="event-7")
    driver.drain()
    assert (result.status, result.error and result.error.error_type) == ("failed", "ConnectionError")
    assert view.of(result.id, "awaits", "unread") == (["paid", "gift"], False)

    checkout.failing.clear()
    assert result.retry()
    assert view.of(result.id, "status", "step", "awaits", "deadline") == ("runnable", "ship", ["paid", "gift"], None)
    assert app.signal("order", "paid", 100, dedup_key="event-7") is False, "it was delivered before the failure"
    app.signal("order", "gift", "card")
    driver.drain()
    assert result.get(timeout=5) == [[100, "card"], ["note", "paid", "gift"]]
    assert view.count("signals") == 0


def test_retry_twice_keeps_the_signals(app: Durable, driver: Driver, checkout: Any) -> None:
    checkout.failing.append(True)
    result = checkout.delay()
    driver.drain()
    result.signal("paid", 100)
    for _ in range(3):
        driver.drain()
        assert result.status == "failed"
        assert result.error is not None
        assert result.error.error_type == "ConnectionError"
        assert result.retry()
    checkout.failing.clear()
    driver.drain()
    assert result.get(timeout=5) == [[100], ["paid"]]


def test_retry_after_lost_workers_keeps_the_signals(app: Durable, drivers: Drivers, checkout: Any) -> None:
    result = checkout.delay()
    drivers().drain()
    result.signal("paid", 100)
    for _ in range(3):
        crashing = drivers()
        claimed = crashing.claim()
        crashing.die([(claimed.id, claimed.token)])
    assert (result.status, result.error and result.error.error_type) == ("failed", "WorkerLost")
    assert result.retry()
    drivers().drain()
    assert result.get(timeout=5) == [[100], ["paid"]]


def test_retry_does_not_wake_a_pack_for_shown_parts(app: Durable, driver: Driver, view: View) -> None:
    failing = [True]

    @app.machine(name="pack")
    class Pack(Machine):
        @step(initial=True)
        def look(self, ctx: Context) -> Any:
            if len(ctx.awaited) < 2:
                return Await("part", then=self.look)
            if len(ctx.awaited) == 2 and failing:
                raise ValueError("not yet")
            return Await("part", then=self.look) if len(ctx.awaited) == 2 else Done(len(ctx.awaited))

    result = Pack.delay()
    driver.drain()
    for _ in range(2):
        result.signal("part")
        driver.drain()
    failing.clear()
    result.retry()
    driver.drain()
    assert view.status(result.id) == "awaiting_signal"
    result.signal("part")
    driver.drain()
    assert result.get(timeout=5) == 3


# Unread


class Heard(list[Any]):
    def __call__(self, event: str, measurements: Any, metadata: Any) -> None:
        self.append((event, dict(measurements), dict(metadata)))


@pytest.fixture
def heard() -> Any:
    heard = Heard()
    telemetry.attach("signal.unread", heard)
    yield heard
    telemetry.detach("signal.unread", heard)


@pytest.mark.parametrize("end", ["done", "kept", "failed", "cancelled"])
def test_signal_during_last_step_stays_unread(
    app: Durable, driver: Driver, view: View, heard: Heard, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    @app.machine(name="cart")
    class Cart(Machine):
        @step(initial=True)
        def wait(self, ctx: Context) -> Any:
            return Await("add", then=self.take, timeout=3600)

        @step
        def take(self, ctx: Context) -> Any:
            return Stop("sold out") if end == "failed" else Done([s.payload for s in ctx.awaited])

    options: dict[str, Any] = {"correlation_key": "k", "correlation_scope": ["done"]} if end == "kept" else {}
    result = app.insert(Cart, **options)
    driver.drain()
    result.signal("add", "book")
    commit = driver.execute(driver.claim())
    assert result.signal("add", "pen", dedup_key="event-2") is True
    assert result.signal("add", "pen", dedup_key="event-2") is False
    result.signal("note")
    if end == "cancelled":
        result.cancel()
    with caplog.at_level(logging.WARNING, "durable"):
        driver.flush(commit)

    status = "done" if end == "kept" else end
    assert result.status == status
    assert unread(app, result.id) == [("add", "pen"), ("note", None)]
    assert view.of(result.id, "unread") == (True,)
    assert [line.unread for line in app.run(inspection.listing(None, None, None, None))] == [True]
    assert view.count("signals") == (3 if end == "failed" else 2), "what was shown is kept for a retry alone"
    assert heard == [("signal.unread", {"count": 2}, {"id": result.id, "fsm": "cart", "step": "take", "rerun": False})]
    assert f"instance {result.id} of cart ended in step take with unread signals: 1 add, 1 note" in caplog.text


def test_shown_signals_are_not_unread(app: Durable, driver: Driver, view: View, heard: Heard, checkout: Any) -> None:
    result = checkout.delay()
    driver.drain()
    result.signal("note")
    result.signal("paid", 1)
    driver.drain()
    assert (result.status, unread(app, result.id), view.of(result.id, "unread"), heard) == ("done", [], (False,), [])


def test_task_keeps_unread_signals_too(app: Durable, driver: Driver, view: View) -> None:
    @app.task(name="work")
    def work() -> None: ...

    result = work.delay()
    commit = driver.execute(driver.claim())
    result.signal("late", 1)
    driver.flush(commit)
    assert (result.status, unread(app, result.id)) == ("done", [("late", 1)])


def test_purge_deletes_signals(app: Durable, view: View, checkout: Any) -> None:
    checkout.delay().signal("paid")
    with app._pool.connection() as connection, connection.transaction():
        run(connection, app.sql, inspection.purge(None))
    assert (view.count("instances"), view.count("signals")) == (0, 0)


def test_gc_drops_signals_with_their_partition(
    app: Durable, driver: Driver, view: View, checkout: Any, connection: psycopg.Connection[Any]
) -> None:
    checkout.failing.append(True)
    old, live = checkout.delay(), checkout.delay()
    kept = app.insert(checkout, correlation_key="kept", correlation_scope=["failed"])
    driver.drain()
    for result in (old, kept):
        result.signal("paid", dedup_key="1")
    driver.drain()
    fresh = checkout.delay()
    driver.drain()
    fresh.signal("paid")
    driver.drain()
    live.signal("note")
    everyone = {old.id, live.id, kept.id, fresh.id}

    def targets() -> set[int]:
        return {row[0] for row in view.rows("SELECT DISTINCT target_id FROM {schema}.signals")}

    collect(driver.engine._link, app.conf)
    assert targets() == everyone, "nothing is old enough"
    age_partition(connection, app.schema, old.id)
    view.rows(
        "UPDATE {schema}.instances SET finished_at = finished_at - interval '3 days' WHERE id = %s RETURNING 1", kept.id
    )
    collect(driver.engine._link, app.conf)
    assert (old.status, kept.status) == ("not_found", "not_found")
    assert targets() == {live.id, fresh.id}


def age_partition(connection: psycopg.Connection[Any], schema: str, instance: int) -> None:
    """Move a finished instance to the history's partition of five days ago."""
    (moment,) = connection.execute("SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date").fetchone()  # type: ignore[misc]
    day = moment - timedelta(days=5)
    connection.execute(f"SELECT {schema}.make_partition(%s)", (day,))
    connection.execute(
        f"UPDATE {schema}.history SET finished_at = %s::date + time '12:00' WHERE id = %s", (day, instance)
    )


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_sweep_reaches_every_target_in_bounded_looks(
    app: Durable, driver: Driver, view: View, checkout: Any, limit: int
) -> None:
    results = [checkout.delay() for _ in range(6)]
    for result in results:
        result.signal("paid", dedup_key="1")
        result.signal("note")
    gone = [result.id for result in results[::2]]
    view.rows("DELETE FROM {schema}.instances WHERE id = ANY (%s) RETURNING 1", gone)
    deleted = 0
    for _ in range(1000):
        deleted += app.run(maintenance.sweep_signals(limit))
        if deleted == 6:
            break
    assert deleted == 6
    assert view.rows("SELECT DISTINCT target_id FROM {schema}.signals ORDER BY 1") == [
        (result.id,) for result in results[1::2]
    ]
    assert app.run(maintenance.sweep_signals(limit)) == 0


# Run again


def rerunner(app: Durable, **options: Any) -> type[Machine]:
    """A cart that checks out when nothing was added for a while; its last step tells what it was shown."""

    @app.machine(name="cart", on_unread="rerun", **options)
    class Cart(Machine):
        @step(initial=True)
        def wait(self, ctx: Context) -> Any:
            return Await("add", then=self.take, timeout=0, state={**ctx.state, "items": ctx.state.get("items", [])})

        @step
        def take(self, ctx: Context) -> Any:
            if ctx.awaited:
                items = [*ctx.state["items"], *(s.payload for s in ctx.awaited)]
                return Next(self.wait, {**ctx.state, "items": items})
            return Stop("empty") if ctx.state.get("fails") else Done(ctx.state["items"])

    return Cart


@pytest.mark.parametrize("options", [{}, {"correlation_key": "k", "correlation_scope": ["done", "failed"]}])
@pytest.mark.parametrize("fails", [False, True])
def test_rerun_runs_the_last_step_again(
    app: Durable, driver: Driver, view: View, heard: Heard, fails: bool, options: dict[str, Any]
) -> None:
    result = app.insert(rerunner(app), kwargs={"fails": fails}, **options)
    driver.drain()
    driver.time_out()
    commit = driver.execute(driver.claim())
    assert commit.kind == "end"
    result.signal("add", "pen")
    driver.flush(commit)
    assert view.of(result.id, "status", "step", "attempt", "error") == ("runnable", "take", 0, None)
    assert driver.ready == {"default": 1}
    about = {"id": result.id, "fsm": "cart", "step": "take", "rerun": True}
    assert heard == [("signal.unread", {"count": 1}, about)]
    driver.drain()
    assert view.status(result.id) == "awaiting_signal"
    driver.time_out()
    driver.drain()
    assert (result.status, view.count("signals")) == ("failed" if fails else "done", 0)
    assert result.result == ("empty" if fails else ["pen"])


def test_rerun_of_a_step_that_awaited_nothing(app: Durable, driver: Driver) -> None:
    @app.machine(name="last", on_unread="rerun")
    class Last(Machine):
        @step
        def only(self, ctx: Context) -> Any:
            return Done([[s.name for s in ctx.awaited], [s.name for s in ctx.all]])

    result = Last.delay()
    for name in ("one", "two"):
        commit = driver.execute(driver.claim())
        result.signal(name)
        driver.flush(commit)
        assert result.status == "runnable"
    driver.drain()
    assert result.get(timeout=5) == [[], ["one", "two"]], "ctx.all holds them; each ran it again once"
    assert result.attempts == 3


def test_cancel_wins_over_rerun(app: Durable, driver: Driver) -> None:
    result = rerunner(app).delay()
    driver.drain()
    driver.time_out()
    commit = driver.execute(driver.claim())
    result.signal("add", "pen")
    result.cancel()
    driver.flush(commit)
    assert (result.status, unread(app, result.id)) == ("cancelled", [("add", "pen")])


def test_rerun_undoes_writes_of_the_step(app: Durable, driver: Driver, connection: psycopg.Connection[Any]) -> None:
    connection.execute(f"CREATE TABLE {app.schema}.orders (n int)")

    @app.machine(name="buyer", on_unread="rerun")
    class Buyer(Machine):
        @step
        def buy(self, ctx: Context) -> Any:
            ctx.connection.execute(f"INSERT INTO {app.schema}.orders VALUES (%s)", [len(ctx.all)])
            if not ctx.all:
                app.signal(ctx.id, "more")
            return Done(len(ctx.all))

    result = Buyer.delay()
    driver.drain()
    assert result.get(timeout=5) == 1
    assert connection.execute(f"SELECT n FROM {app.schema}.orders").fetchall() == [(1,)]


def test_rerun_holds_up_no_neighbour(app: Durable, driver: Driver, view: View) -> None:
    cart = rerunner(app)
    results = [cart.delay() for _ in range(3)]
    driver.drain()
    driver.time_out()
    commits = [driver.execute(claimed) for claimed in driver.claims()]
    results[1].signal("add", "pen")
    driver.flush(*commits)
    assert [result.status for result in results] == ["done", "runnable", "done"]


def test_on_unread_is_keep_or_rerun(app: Durable) -> None:
    wrong: Any = "drop"
    with pytest.raises(DefinitionError, match=re.escape("on_unread must be 'keep' or 'rerun', got 'drop'")):
        rerunner_of(app, wrong)


def rerunner_of(app: Durable, on_unread: Any) -> None:
    @app.machine(name="x", on_unread=on_unread)
    class X(Machine):
        @step
        def only(self, ctx: Context) -> Any:
            return Done()
