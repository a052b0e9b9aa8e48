"""Another session's lock delays the outcomes that need it, and no others."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from durable import Context, Done, Durable, Machine, Next, ScheduleChildren, step
from durable.storage import workers
from tests.fix_db import wait_until
from tests.machines.driver import Driver, View


@pytest.fixture
def other(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A session of somebody else, whose transaction stays open."""
    with psycopg.connect(database, application_name="somebody") as connection:
        yield connection
        connection.rollback()


def work(app: Durable, count: int, **options: Any) -> list[int]:
    """Enqueue instances that end at once."""
    task = app.definitions.get(("work", 1)) or app.task(name="work")(_nothing)
    return [int(result.id) for result in app.insert_many([(task, options)] * count) if result is not None]


def _nothing() -> None: ...


def retry_until(driver: Driver, waiting: int) -> None:
    """Turn the engine's retries until so many outcomes wait for locks."""

    def turned() -> bool:
        driver.engine._flush_locked()
        return len(driver.engine._locked) == waiting

    wait_until(turned, what=f"{waiting} waiting outcomes")


def family(app: Durable, driver: Driver, count: int) -> int:
    """A parent that waits for children, which are runnable."""
    child = app.task(name="child")(_nothing)

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def split(self, ctx: Context) -> Any:
            return ScheduleChildren([child.s() for _ in range(count)], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            return Done(len(ctx.children))

    result = Parent.delay()
    driver.step()
    return int(result.id)


def test_locked_row_delays_only_its_own_outcome(
    app: Durable, driver: Driver, view: View, other: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    ids = work(app, 20)
    commits = [driver.execute(claimed) for claimed in driver.claims()]
    app.signal(ids[7], "note", connection=other)
    with caplog.at_level(logging.WARNING):
        assert driver.flush(*commits) == set(ids) - {ids[7]}
    assert [view.status(instance) for instance in ids].count("done") == 19
    assert view.status(ids[7]) == "executing"
    assert driver.engine.owns(commits[7].claimed)
    assert f"{ids[7]} (work run); held by somebody (pid {other.info.backend_pid}, its transaction is 0 s" in caplog.text
    time.sleep(0.06)
    driver.engine._flush_locked()
    assert len(driver.engine._locked) == 1
    other.commit()
    retry_until(driver, 0)
    assert view.status(ids[7]) == "done"
    assert not driver.engine._held


def test_waiting_outcome_slows_no_other_flush(app: Durable, driver: Driver, other: psycopg.Connection[Any]) -> None:
    (held,) = work(app, 1)
    commit = driver.execute(driver.claim())
    app.signal(held, "note", connection=other)
    assert driver.flush(commit) == set()
    driver.engine._link.connection.execute("SET lock_timeout = '20s'")  # to wait for a lock again takes that long
    began = time.monotonic()
    for _ in range(5):
        ids = work(app, 3)
        assert driver.flush(*map(driver.execute, driver.claims())) == set(ids)
        time.sleep(0.06)
        driver.engine._flush_locked()
    assert len(driver.engine._locked) == 1
    assert time.monotonic() - began < 10


def test_locked_parent_delays_only_its_children(
    app: Durable, driver: Driver, view: View, other: psycopg.Connection[Any]
) -> None:
    parent = family(app, driver, 4)
    ids = work(app, 3)
    commits = [driver.execute(claimed) for claimed in driver.claims()]
    children = [commit for commit in commits if commit.claimed.id not in ids]
    app.signal(parent, "note", connection=other)
    assert driver.flush(*children[:2], *(commit for commit in commits if commit.claimed.id in ids)) == set(ids)
    driver.engine._link.connection.execute("SET lock_timeout = '20s'")
    assert driver.flush(*children[2:]) == set(), "put aside without a try: the parent is known to be held"
    assert len(driver.engine._locked) == 4
    other.commit()
    retry_until(driver, 0)
    assert [view.status(commit.claimed.id) for commit in children] == ["done"] * 4
    assert view.status(parent) == "runnable"


def test_held_key_of_a_child_delays_only_its_parent(
    app: Durable, driver: Driver, view: View, other: psycopg.Connection[Any]
) -> None:
    task = app.task(name="keyed")(_nothing)

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def split(self, ctx: Context) -> Any:
            return ScheduleChildren([task.s().set(correlation_key="k")], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            return Done(None)

    parent = int(Parent.delay().id)
    ids = work(app, 10)
    commits = [driver.execute(claimed) for claimed in driver.claims()]
    task.apply_async(correlation_key="k", connection=other)
    assert driver.flush(*commits) == set(ids)
    assert view.status(parent) == "executing"
    other.rollback()
    retry_until(driver, 0)
    assert view.status(parent) == "awaiting_children"


def test_inline_hop_goes_on_once_its_row_is_free(
    app: Durable, driver: Driver, view: View, other: psycopg.Connection[Any]
) -> None:
    @app.machine(name="hops", inline=True)
    class Hops(Machine):
        @step(initial=True)
        def one(self, ctx: Context) -> Any:
            return Next(self.two)

        @step
        def two(self, ctx: Context) -> Any:
            return Done([signal.payload for signal in ctx.all])

    instance = int(Hops.delay().id)
    commit = driver.execute(driver.claim())
    assert commit.status == "executing"
    app.signal(instance, "note", 5, connection=other)
    assert driver.flush(commit) == set()
    assert len(driver.engine.buffer) == 0
    other.commit()
    retry_until(driver, 0)
    driver.flush(driver.execute(driver.claim()))
    assert app.result(instance).get() == [5]


def test_waiting_outcome_is_fenced(
    app: Durable, driver: Driver, view: View, other: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its claim is taken back while it waits: the outcome is stale, and another worker's counts."""
    (instance,) = work(app, 1)
    commit = driver.execute(driver.claim())
    app.signal(instance, "note", connection=other)
    driver.flush(commit)
    other.rollback()
    driver.die(entered=[])
    retry_until(driver, 0)
    assert "stale" in caplog.text
    assert view.of(instance, "status", "crashes", "version") == ("runnable", 0, 0)


def test_lease_that_ends_drops_waiting_outcomes(
    app: Durable, driver: Driver, other: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    (instance,) = work(app, 1)
    commit = driver.execute(driver.claim())
    app.signal(instance, "note", connection=other)
    driver.flush(commit)
    driver.run(workers.bury([driver.worker]))
    driver.engine._start_over()
    assert len(driver.engine._locked) == 0
    assert "stale" in caplog.text


def test_process_with_waiting_outcomes_goes_idle(app: Durable, driver: Driver, other: psycopg.Connection[Any]) -> None:
    """Else its agent would not wake it for a new row."""
    (instance,) = work(app, 1)
    commit = driver.execute(driver.claim())
    app.signal(instance, "note", connection=other)
    driver.flush(commit)
    assert driver.engine._held
    assert driver.engine._may_sleep()


def test_drain_commits_what_comes_free_in_time(
    app: Durable, driver: Driver, view: View, other: psycopg.Connection[Any]
) -> None:
    ids = work(app, 2)
    commits = [driver.execute(claimed) for claimed in driver.claims()]
    app.signal(ids[0], "note", connection=other)
    assert driver.flush(*commits) == {ids[1]}
    driver.stop_at = time.monotonic() + 20
    other.commit()
    _drained(driver)
    assert view.status(ids[0]) == "done"


def test_drain_ends_beside_a_row_that_stays_locked(
    app: Durable, driver: Driver, view: View, other: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    ids = work(app, 3)
    commits = [driver.execute(claimed) for claimed in driver.claims()]
    app.signal(ids[0], "note", connection=other)
    driver.flush(commits[0])
    driver.stop_at = time.monotonic() + 0.3
    _drained(driver)
    assert f"these instances run again: [{ids[0]}]" in caplog.text
    assert [view.status(instance) for instance in ids[1:]] == ["runnable"] * 2, "released beside it"
    assert view.rows("SELECT FROM {schema}.workers WHERE id = %s AND dead_at IS NULL", driver.worker) == []
    other.rollback()
    assert driver.run(workers.reclaim(driver.worker, [], 3, "it left")).ids == [ids[0]]


def test_retiring_process_waits_bounded_for_locks(
    app: Durable, driver: Driver, other: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    app.conf.update(drain_timeout=0.3)
    (instance,) = work(app, 1)
    commit = driver.execute(driver.claim())
    app.signal(instance, "note", connection=other)
    driver.flush(commit)
    driver.stop_at = math.inf
    _drained(driver)
    assert f"these instances run again: [{instance}]" in caplog.text


def _drained(driver: Driver) -> None:
    """Let the engine drain; its slot has no thread that would end."""
    driver.engine.slot.ended = True
    driver.engine._drain()
