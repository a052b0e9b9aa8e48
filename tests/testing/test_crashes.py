"""crash_every_commit dies before and after every commit of a scenario and demands the same end."""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Any

import psycopg
import pytest

from durable import Await, Context, Done, Durable, Machine, Next, Retry, ScheduleChildren, step
from durable.errors import DuplicateError, DurableError
from durable.testing import (
    assert_awaiting,
    assert_done,
    crash_every_commit,
    drain,
    fire_timeouts,
    on_schema,
    travel,
)
from tests.machines.driver import View


@pytest.fixture
def order(app: Durable) -> Any:
    @app.task(name="square")
    def square(n: int) -> int:
        if n == 2:
            raise ValueError("two")
        return n * n

    @app.machine(name="order", inline=True)
    class Order(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            if not ctx.attempt:
                raise ConnectionError("not yet")
            return Next(self.wait, {"seen": []})

        @step
        def wait(self, ctx: Context) -> Any:
            return Await("paid", then=self.paid, timeout=60)

        @step
        def paid(self, ctx: Context) -> Any:
            if not ctx.awaited:
                return Next(self.wait, {"seen": [*ctx.state["seen"], "timeout"]}, inline=False)
            children = [(square, {"args": (n,), "max_attempts": 1}) for n in range(3)]
            return ScheduleChildren(children, then=self.end, state={"seen": [*ctx.state["seen"], "paid"]})

        @step
        def end(self, ctx: Context) -> Any:
            return Done({"sum": sum(child.result or 0 for child in ctx.children), **ctx.state})

        def handle(self, error: BaseException, ctx: Context) -> Any:
            return Retry(delay=30)

    return Order


def test_a_machine_that_keeps_to_its_outcomes_survives_every_crash(app: Durable, order: Any, view: View) -> None:
    def scenario(app: Durable) -> None:
        result = app.insert(order, correlation_key="o:1")
        drain(app)
        assert_awaiting(app, "o:1", "paid")
        assert fire_timeouts(app) == 1
        drain(app)
        assert travel(app, 10) == 0
        assert app.signal("o:1", "paid", {"amount": 3}, dedup_key="e")
        drain(app)
        assert assert_done(app, result) == {"sum": 1, "seen": ["timeout", "paid"]}

    report = crash_every_commit(app, scenario)
    assert report.runs == 2 * len(report.commits)
    assert [label for label in report.commits if label == "insert_one_keyed"] == ["insert_one_keyed"]
    assert "COMMIT of advance, consume, insert_many, raise_barrier" in report.commits
    assert 20 <= len(report.commits) <= 60
    assert view.count("instances") == view.count("history") == 0, "it leaves the schema empty"
    assert crash_every_commit(app, lambda app: order.delay()).commits, "the same app can be used again"


def test_what_the_scenario_leaves_to_run_is_drained_and_crashed_too(app: Durable) -> None:
    @app.task(name="note")
    def note(n: int) -> int:
        return n

    report = crash_every_commit(app, lambda app: note.delay(1))
    assert report.commits == ("insert_one", "register", "claim", "finish", "bury")


def test_a_step_that_enqueues_without_a_key_is_caught_with_commit_and_difference(app: Durable) -> None:
    @app.task(name="mail")
    def mail(to: str) -> None: ...

    @app.task(name="order")
    def order() -> None:
        mail.delay("ann")

    with pytest.raises(AssertionError) as raised:
        crash_every_commit(app, lambda app: order.delay())
    told = str(raised.value)
    assert "crash after commit 4 of" in told
    assert "(insert_one)" in told
    assert re.search(r'^ mail: done at run\n   state .*"ann"', told, re.MULTILINE)
    assert "+mail: done at run" in told

    @app.task(name="keyed")
    def keyed(n: int) -> None:
        mail.apply_async(args=("ann",), correlation_key=f"mail:{n}", correlation_scope=("done",), on_conflict="return")

    crash_every_commit(app, lambda app: keyed.delay(1))


def test_a_scenario_that_differs_without_crashes_is_called_so(app: Durable) -> None:
    @app.machine(name="random")
    class Random(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.end, {"id": uuid.uuid4().hex})

        @step
        def end(self, ctx: Context) -> Any:
            return Done(None)

    with pytest.raises(AssertionError, match=r'not deterministic: [\s\S]*\n-  state \{"id": "[\s\S]*\n\+  state'):
        crash_every_commit(app, lambda app: Random.delay())


def test_a_scenario_that_fails_is_reported_with_its_traceback(app: Durable) -> None:
    def scenario(app: Durable) -> None:
        drain(app)
        raise LookupError("my own mistake")

    with pytest.raises(AssertionError, match=r"without any crash[\s\S]*in scenario\n[\s\S]*LookupError: my own"):
        crash_every_commit(app, scenario)


def test_a_scenario_that_hangs_is_killed_and_says_where(app: Durable) -> None:
    def scenario(app: Durable) -> None:
        time.sleep(60)

    with pytest.raises(AssertionError, match=r"did not end within 0\.5 s[\s\S]*in scenario"):
        crash_every_commit(app, scenario, timeout=0.5)


def test_a_scenario_that_dies_is_reported(app: Durable) -> None:
    with pytest.raises(AssertionError, match="code -9"):
        crash_every_commit(app, lambda app: os.kill(os.getpid(), 9))


def test_a_scenario_without_commits_is_refused(app: Durable) -> None:
    with pytest.raises(AssertionError, match="commits nothing"):
        crash_every_commit(app, lambda app: None)


def test_what_the_scenario_did_and_committed_is_not_repeated_whatever_it_returned_or_raised(app: Durable) -> None:
    @app.task(name="note")
    def note(n: int) -> int:
        return n

    def scenario(app: Durable) -> None:
        first = app.insert(note, args=(1,), correlation_key="k", schedule_in=3600)
        with pytest.raises(DuplicateError) as raised:
            app.insert(note, args=(2,), correlation_key="k")
        assert raised.value.existing_id == first.id
        with app.batch():
            note.delay(3)
            note.delay(4)
        app.signal(first.id, "hello")
        assert first.cancel("enough")
        drain(app)
        note.delay(5)
        drain(app)

    crash_every_commit(app, scenario)


def test_a_transaction_of_the_scenarios_own_happens_once(app: Durable, database: str) -> None:
    @app.task(name="note")
    def note(n: int) -> int:
        return n

    def scenario(app: Durable) -> None:
        with psycopg.connect(database) as connection:
            note.apply_async(args=(1,), connection=connection)
            note.apply_async(args=(2,), connection=connection)
            connection.commit()
            note.apply_async(args=(3,), connection=connection)
            connection.rollback()
            with connection.transaction():
                note.apply_async(args=(4,), connection=connection)
        drain(app)

    report = crash_every_commit(app, scenario)
    assert report.commits[:2] == ("COMMIT of insert_one, insert_one", "COMMIT of insert_one")


def test_coroutines_and_their_connections_count_too(app: Durable, database: str) -> None:
    @app.task(name="second", bind=True)
    async def second(ctx: Context, n: int) -> int:
        async with await psycopg.AsyncConnection.connect(database) as connection:
            await connection.execute("CREATE TEMP TABLE notes (n int)")
        return n

    @app.task(name="first", bind=True)
    async def first(ctx: Context) -> int:
        result = await second.aapply_async(
            args=(1,), correlation_key="s", correlation_scope=("done",), on_conflict="return"
        )
        return result.id * 0

    report = crash_every_commit(app, lambda app: first.delay())
    assert "COMMIT of CREATE TEMP TABLE notes (n int)" in report.commits
    assert {"insert_one", "insert_one_keyed"} <= set(report.commits)


def test_a_crash_that_exhausts_the_crashes_of_a_step_is_a_difference(app: Durable) -> None:
    @app.task(name="note")
    def note() -> None: ...

    app.conf.max_crashes = 1
    with pytest.raises(AssertionError, match=r"after commit 3[\s\S]*\+note: failed at run[\s\S]*error WorkerLost"):
        crash_every_commit(app, lambda app: note.delay())


def test_a_schema_with_somebodys_data_is_refused_and_one_of_its_own_helps(
    app: Durable, view: View, connection: Any
) -> None:
    @app.task(name="note")
    def note() -> None: ...

    connection.execute(f"COMMENT ON SCHEMA {app.schema} IS NULL")
    result = note.delay()
    with pytest.raises(DurableError, match=r"holds instances[\s\S]*on_schema"):
        crash_every_commit(app, lambda app: note.delay())
    with on_schema(app, "t_crashing", drop=True):
        assert crash_every_commit(app, lambda app: note.delay()).runs == 10
    assert result.status == "runnable"
    assert view.rows("SELECT to_regclass('t_crashing.instances')") == [(None,)]
