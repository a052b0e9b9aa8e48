"""`ctx.connection`: what a step writes there happens exactly once, together with the step's outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from durable import Cancel, Context, Done, Durable, Machine, Next, Retry, ScheduleChildren, Stop, step
from durable.errors import ConnectionUsageError
from durable.runtime import step_transaction
from tests.fix_db import wait_until
from tests.machines.driver import Driver, Drivers, View

LOCK_WAITS = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


class Effects:
    """A table of the user's, which steps write into."""

    def __init__(self, connection: Any, schema: str) -> None:
        self._connection = connection
        self.table = f'"{schema}".effects'
        connection.execute(f"CREATE TABLE {self.table} (n bigint GENERATED ALWAYS AS IDENTITY, what text)")

    @property
    def insert(self) -> str:
        return f"INSERT INTO {self.table} (what) VALUES (%s)"

    @property
    def seen(self) -> list[str]:
        """What is committed, in order."""
        rows = self._connection.execute(f"SELECT what FROM {self.table} ORDER BY n").fetchall()
        return [row[0] for row in rows]


@pytest.fixture
def effects(app: Durable, connection: Any) -> Effects:
    """The table, empty."""
    return Effects(connection, app.schema)


def test_a_write_commits_together_with_the_result(app: Durable, driver: Driver, view: View, effects: Effects) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> str:
        ctx.connection.execute(effects.insert, ["paid"])
        assert effects.seen == []
        return "ok"

    result = work.delay()
    commit = driver.execute(driver.claim())
    assert effects.seen == ["paid"]
    assert view.of(result.id, "status", "version", "result") == ("done", 1, "ok")
    assert driver.flush(commit) == {result.id}
    assert result.get(1) == "ok"
    assert driver.engine._held == {}


def test_a_step_that_never_asks_for_it_opens_none(app: Durable, driver: Driver) -> None:
    @app.task(name="t")
    def work() -> None: ...

    work.delay()
    assert driver.step().flushed is None
    assert driver.engine._step_connections.idle_since == float("inf")


def test_an_exception_rolls_the_writes_back_and_the_handlers_outcome_commits_alone(
    app: Durable, driver: Driver, view: View, effects: Effects
) -> None:
    @app.machine(name="m")
    class M(Machine):
        @step(initial=True)
        def go(self, ctx: Context[Any]) -> Done:
            ctx.connection.execute(effects.insert, ["lost"])
            raise RuntimeError("no")

        def handle(self, error: BaseException, ctx: Context[Any]) -> Stop:
            with pytest.raises(ConnectionUsageError, match="not in handle"):
                ctx.connection.execute("SELECT 1")
            return Stop(f"handled {error}")

    result = M.delay()
    assert driver.step().flushed is None
    assert effects.seen == []
    assert view.of(result.id, "status", "result") == ("failed", "handled no")


@pytest.mark.parametrize("how", ["returned", "raised", "cancelled"])
def test_a_returned_retry_commits_the_writes_a_raised_one_does_not(
    app: Durable, driver: Driver, view: View, effects: Effects, how: str
) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> Any:
        ctx.connection.execute(effects.insert, [f"attempt {ctx.attempt}"])
        if how == "cancelled":
            raise Cancel("enough")
        if how == "raised":
            raise ctx.retry(countdown=100)
        return Retry(delay=100)

    result = work.delay()
    driver.step()
    assert effects.seen == (["attempt 0"] if how == "returned" else [])
    assert view.of(result.id, "status", "attempt") == (("failed", 0) if how == "cancelled" else ("scheduled", 1))


def test_a_result_that_cannot_be_stored_takes_the_writes_with_it(
    app: Durable, driver: Driver, view: View, effects: Effects
) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> object:
        ctx.connection.execute(effects.insert, ["lost"])
        return object()

    result = work.delay()
    driver.step()
    assert (effects.seen, view.status(result.id)) == ([], "failed")


@pytest.mark.parametrize(
    "end",
    [
        lambda c: c.commit(),
        lambda c: c.rollback(),
        lambda c: c.close(),
        lambda c: c.set_autocommit(True),
        lambda c: setattr(c, "autocommit", False),
        lambda c: c.__enter__(),
    ],
    ids=["commit", "rollback", "close", "set_autocommit", "autocommit", "with"],
)
def test_what_would_end_the_transaction_early_is_refused(
    app: Durable, driver: Driver, effects: Effects, end: Callable[[Any], Any]
) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, ["one"])
        with pytest.raises(ConnectionUsageError, match="ends with the step"):
            end(ctx.connection)
        ctx.connection.execute(effects.insert, ["two"])

    work.delay()
    driver.step()
    assert effects.seen == ["one", "two"]


def test_savepoints_are_the_steps_own(app: Durable, driver: Driver, effects: Effects) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> None:
        with ctx.connection.transaction():
            ctx.connection.execute(effects.insert, ["kept"])
        with suppress(psycopg.errors.DivisionByZero), ctx.connection.transaction():
            ctx.connection.execute(effects.insert, ["undone"])
            ctx.connection.execute("SELECT 1 / 0")

    work.delay()
    driver.step()
    assert effects.seen == ["kept"]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
def test_ending_it_in_sql_is_an_error_of_the_step(
    app: Durable, driver: Driver, view: View, effects: Effects, statement: str
) -> None:
    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        ctx.connection.execute(statement)

    result = work.delay()
    driver.step()
    (error,) = view.of(result.id, "error")
    assert error["type"] == "ConnectionUsageError"
    assert "the runtime" in error["message"]


def test_a_swallowed_database_error_is_an_error_of_the_step(
    app: Durable, driver: Driver, view: View, effects: Effects
) -> None:
    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, ["lost"])
        with pytest.raises(psycopg.Error):
            ctx.connection.execute("SELECT 1 / 0")

    result = work.delay()
    driver.step()
    (error,) = view.of(result.id, "error")
    assert (error["type"], effects.seen) == ("ConnectionUsageError", [])
    assert "transaction()" in error["message"]


def test_a_stale_outcome_takes_the_writes_with_it(app: Durable, drivers: Drivers, view: View, effects: Effects) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, [str(ctx._claimed.token)])
        if ctx._claimed.token == 1:
            first.die()  # its lease ends in the middle of the step, and the row is taken back

    first, second = drivers(), drivers()
    result = work.delay()
    assert first.flush(first.execute(first.claim())) == set()
    assert (effects.seen, view.status(result.id)) == ([], "runnable")
    second.drain()
    assert effects.seen == ["2"]
    assert view.of(result.id, "status", "version") == ("done", 1)


def test_a_cancel_during_the_step_takes_the_writes_with_it(
    app: Durable, driver: Driver, view: View, effects: Effects
) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> str:
        ctx.connection.execute(effects.insert, ["lost"])
        assert app.cancel(ctx.id, "changed my mind")
        return "ok"

    result = work.delay()
    driver.step()
    assert (effects.seen, view.status(result.id)) == ([], "cancelled")


def test_a_cancel_waits_for_the_outcome_that_holds_the_row(
    app: Durable, driver: Driver, view: View, effects: Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> str:
        ctx.connection.execute(effects.insert, ["kept"])
        return "ok"

    result = work.delay()
    cancelled: list[bool] = []
    canceller = threading.Thread(target=lambda: cancelled.append(app.cancel(result.id)))
    end = step_transaction._Sync.end

    def held(self: Any) -> None:
        canceller.start()
        wait_until(lambda: view.rows(LOCK_WAITS))
        end(self)

    monkeypatch.setattr(step_transaction._Sync, "end", held)
    driver.step()
    canceller.join(10)
    assert (effects.seen, view.status(result.id), cancelled) == (["kept"], "done", [False])


def test_a_deadlock_runs_the_step_again_at_no_cost(
    app: Durable, driver: Driver, view: View, effects: Effects, database: str, connection: Any
) -> None:
    connection.execute(f"CREATE TABLE {effects.table}_rows AS SELECT n, 0 AS hits FROM generate_series(1, 2) AS n")
    update = f"UPDATE {effects.table}_rows SET hits = hits + 1 WHERE n = %s"
    runs: list[int] = []

    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        runs.append(ctx.attempt)
        ctx.connection.execute(effects.insert, ["once"])
        ctx.connection.execute(update, [1])
        if len(runs) > 1:
            return
        ctx.connection.execute("SET LOCAL deadlock_timeout = '20ms'")  # ours is the victim
        rival.start()
        wait_until(lambda: view.rows(LOCK_WAITS))
        ctx.connection.execute(update, [2])

    def other() -> None:
        with psycopg.connect(database) as second:
            second.execute("SET LOCAL deadlock_timeout = '10s'")
            second.execute(update, [2])
            second.execute(update, [1])

    rival = threading.Thread(target=other)
    result = work.delay()
    driver.step()
    rival.join(10)
    assert runs == [0, 0]
    assert effects.seen == ["once"]
    assert view.of(result.id, "status", "version", "attempt") == ("done", 1, 0)


def test_a_serialization_failure_runs_the_step_again(
    app: Durable, driver: Driver, view: View, effects: Effects, connection: Any
) -> None:
    connection.execute(f"CREATE TABLE {effects.table}_rows AS SELECT 0 AS hits")
    update = f"UPDATE {effects.table}_rows SET hits = hits + 1"
    runs: list[int] = []

    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        runs.append(ctx.attempt)
        ctx.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        ctx.connection.execute(f"SELECT FROM {effects.table}_rows")
        if len(runs) == 1:
            connection.execute(update)
        try:
            ctx.connection.execute(update)
        except psycopg.Error as error:
            raise RuntimeError("wrapped") from error

    result = work.delay()
    driver.step()
    assert (runs, view.status(result.id)) == ([0, 0], "done")
    assert connection.execute(f"SELECT hits FROM {effects.table}_rows").fetchone() == (2,)


def test_a_signal_that_comes_under_repeatable_read_is_not_overlooked(
    app: Durable, driver: Driver, view: View, effects: Effects
) -> None:
    """The park's snapshot is older than the signal: the row itself, which the delivery touched, makes it fail."""
    from durable import Await

    runs: list[int] = []

    @app.machine(name="m")
    class M(Machine):
        @step(initial=True)
        def go(self, ctx: Context[Any]) -> Await:
            runs.append(1)
            ctx.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            ctx.connection.execute(effects.insert, ["once"])
            if len(runs) == 1:
                app.signal(ctx.id, "paid")
            return Await("paid", then=self.end)

        @step
        def end(self, ctx: Context[Any]) -> Done:
            return Done([signal.name for signal in ctx.awaited])

    result = M.delay()
    driver.drain()
    assert (len(runs), effects.seen) == (2, ["once"])
    assert result.get(1) == ["paid"]


@pytest.mark.parametrize("moment", ["in the step", "before the commit"])
def test_a_lost_connection_runs_the_step_again(
    app: Durable, driver: Driver, view: View, effects: Effects, connection: Any, moment: str
) -> None:
    runs: list[int] = []

    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        runs.append(ctx.attempt)
        ctx.connection.execute(effects.insert, ["once"])
        if len(runs) == 1:
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", [ctx.connection.info.backend_pid])
            if moment == "in the step":
                ctx.connection.execute("SELECT 1")

    result = work.delay()
    driver.step()
    assert (runs, effects.seen, view.status(result.id)) == ([0, 0], ["once"], "done")


@pytest.mark.parametrize("took_place", [True, False])
@pytest.mark.parametrize("kind", ["end", "next", "hop"])
def test_when_the_answer_to_commit_is_lost_the_row_tells(
    app: Durable,
    driver: Driver,
    view: View,
    effects: Effects,
    monkeypatch: pytest.MonkeyPatch,
    took_place: bool,
    kind: str,
) -> None:
    runs: list[str] = []

    @app.machine(name="m")
    class M(Machine):
        @step(initial=True)
        def go(self, ctx: Context[Any]) -> Any:
            runs.append("go")
            ctx.connection.execute(effects.insert, ["go"])
            return Done("end") if kind == "end" else Next(self.last, inline=kind == "hop")

        @step
        def last(self, ctx: Context[Any]) -> Done:
            runs.append("last")
            return Done("end")

    end = step_transaction._Sync.end
    lost: list[bool] = []

    def lossy(self: Any) -> None:
        if lost:
            return end(self)
        lost.append(True)
        if took_place:
            end(self)
        self.connection.pgconn.finish()
        raise psycopg.OperationalError("the answer was lost")

    monkeypatch.setattr(step_transaction._Sync, "end", lossy)
    result = M.delay()
    driver.drain()
    assert effects.seen == ["go"]
    assert runs == ["go"] * (1 if took_place else 2) + ([] if kind == "end" else ["last"])
    assert view.of(result.id, "status", "version") == ("done", 1 if kind == "end" else 2)


def test_a_commit_that_did_not_take_place_before_the_claim_was_lost_is_stale(
    app: Durable, drivers: Drivers, view: View, effects: Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, ["once"])

    def lossy(self: Any) -> None:
        monkeypatch.setattr(step_transaction._Sync, "end", end)
        pid = self.connection.info.backend_pid
        self.connection.pgconn.finish()
        # Until the server has noticed, the reaper would pass by the row that this session holds.
        wait_until(lambda: not view.rows("SELECT FROM pg_stat_activity WHERE pid = %s", pid), what="its end")
        first.die()
        raise psycopg.OperationalError("the answer was lost")

    first, second = drivers(), drivers()
    end = step_transaction._Sync.end
    monkeypatch.setattr(step_transaction._Sync, "end", lossy)
    result = work.delay()
    assert first.flush(first.execute(first.claim())) == set()
    assert (effects.seen, view.status(result.id)) == ([], "runnable")
    second.drain()
    assert (effects.seen, view.status(result.id)) == (["once"], "done")


def test_async_steps_get_an_async_connection(app: Durable, driver: Driver, view: View, effects: Effects) -> None:
    @app.task(bind=True, name="t")
    async def work(ctx: Context, what: str) -> str:
        async with ctx.connection.transaction():
            await ctx.connection.execute(effects.insert, [what])
        with pytest.raises(ConnectionUsageError, match="ends with the step"):
            await ctx.connection.commit()
        if what == "bad":
            raise RuntimeError
        return str(isinstance(ctx.connection, psycopg.AsyncConnection))

    results = [work.delay(what) for what in ("a", "bad", "b")]
    for _ in results:
        driver.step()
    assert effects.seen == ["a", "b"]
    assert [view.status(result.id) for result in results] == ["done", "scheduled", "done"]
    assert results[0].get(1) == "True"


def test_sync_and_async_steps_take_turns_on_one_connection(app: Durable, driver: Driver, connection: Any) -> None:
    @app.task(bind=True, name="a")
    async def asynchronous(ctx: Context) -> Any:
        return await (await ctx.connection.execute("SELECT pg_backend_pid()")).fetchone()

    @app.task(bind=True, name="s")
    def synchronous(ctx: Context) -> Any:
        return ctx.connection.execute("SELECT pg_backend_pid()").fetchone()

    for work in (asynchronous, synchronous, asynchronous):
        work.delay()  # type: ignore[attr-defined]
        driver.step()
    count = """SELECT count(*) FROM pg_stat_activity
               WHERE application_name LIKE 'durable test step%' AND datname = current_database()"""
    wait_until(lambda: connection.execute(count).fetchone()[0] == 1)
    driver.engine._step_connections.close_idle(0.0)
    wait_until(lambda: connection.execute(count).fetchone()[0] == 0)


def test_every_hop_of_an_inline_chain_commits_its_own_writes(
    app: Durable, driver: Driver, view: View, effects: Effects
) -> None:
    @app.machine(name="m", inline=True)
    class M(Machine):
        @step(initial=True)
        def one(self, ctx: Context[Any]) -> Next:
            ctx.connection.execute(effects.insert, ["one"])
            return Next(self.two, {"n": 1})

        @step
        def two(self, ctx: Context[Any]) -> Next:
            assert effects.seen == ["one"]
            ctx.connection.execute(effects.insert, ["two"])
            return Next(self.three)

        @step
        def three(self, ctx: Context[Any]) -> Done:
            assert effects.seen == ["one", "two"]
            return Done(ctx.state["n"])

    result = M.delay()
    driver.drain()
    assert result.get(1) == 1
    assert view.of(result.id, "version", "token") == (3, 1)


def test_children_signals_and_enqueued_instances_ride_with_the_writes(
    app: Durable, driver: Driver, view: View, effects: Effects
) -> None:
    @app.task(bind=True, name="child")
    def child(ctx: Context, n: int) -> int:
        ctx.connection.execute(effects.insert, [f"child {n}"])
        return n

    @app.machine(name="m")
    class M(Machine):
        @step(initial=True)
        def go(self, ctx: Context[Any]) -> ScheduleChildren:
            ctx.connection.execute(effects.insert, ["go"])
            child.apply_async((9,), connection=ctx.connection)
            return ScheduleChildren([(child, {"args": (n,)}) for n in range(2)], then=self.join)

        @step
        def join(self, ctx: Context[Any]) -> Done:
            ctx.connection.execute(effects.insert, ["join"])
            return Done([one.result for one in ctx.children])

    result = M.delay()
    driver.drain()
    assert result.get(1) == [0, 1]
    assert sorted(effects.seen) == ["child 0", "child 1", "child 9", "go", "join"]
    assert view.count("instances") == 0


def test_a_missing_partition_is_made_and_the_step_runs_again(
    app: Durable, driver: Driver, view: View, effects: Effects, connection: Any
) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, ["once"])

    for (name,) in view.rows(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = '{schema}.history'::regclass"
    ):
        connection.execute(f"DROP TABLE {name}")
    result = work.delay()
    driver.step()
    assert (effects.seen, view.status(result.id)) == (["once"], "done")


def test_a_constraint_that_fails_at_commit_is_an_error_of_the_step(
    app: Durable, driver: Driver, view: View, effects: Effects, connection: Any
) -> None:
    connection.execute(f"ALTER TABLE {effects.table} ADD UNIQUE (what) DEFERRABLE INITIALLY DEFERRED")

    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, ["twice"])
        ctx.connection.execute(effects.insert, ["twice"])

    result = work.delay()
    driver.step()
    assert effects.seen == []
    (error,) = view.of(result.id, "error")
    assert error["type"] == "UniqueViolation"


def test_what_a_step_sets_in_the_session_is_gone_in_the_next(app: Durable, driver: Driver) -> None:
    @app.task(bind=True, name="t")
    def work(ctx: Context) -> Any:
        value = ctx.connection.execute("SHOW work_mem").fetchone()
        ctx.connection.row_factory = dict_row
        ctx.connection.execute("SET work_mem = '77MB'")
        return value

    results = [work.delay() for _ in range(2)]
    driver.drain()
    first, second = (result.get(1) for result in results)
    assert first == second != ["77MB"]


def test_no_connection_to_be_had_runs_the_step_again_until_there_is(
    app: Durable, driver: Driver, view: View, effects: Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        try:
            ctx.connection.execute(effects.insert, ["once"])
        except Exception:  # what a careful step does; it must not eat this
            return

    opened = step_transaction.open_step_connection
    refused: list[int] = []

    def refuse(*args: Any, **options: Any) -> Any:
        if len(refused) < 2:
            refused.append(1)
            raise psycopg.OperationalError("too many connections")
        return opened(*args, **options)

    monkeypatch.setattr(step_transaction, "open_step_connection", refuse)
    result = work.delay()
    driver.step()
    assert (len(refused), effects.seen, view.status(result.id)) == (2, ["once"], "done")


def test_a_step_that_is_asked_to_stop_while_it_cannot_happen_is_given_back(
    app: Durable, driver: Driver, view: View, effects: Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(bind=True, name="t", max_attempts=1)
    def work(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, ["lost"])

    def refuse(*args: Any, **options: Any) -> Any:
        driver.stop_at = 1.0
        raise psycopg.OperationalError("too many connections")

    monkeypatch.setattr(step_transaction, "open_step_connection", refuse)
    result = work.delay()
    assert driver.engine.slot.step(driver.claim()) is None
    driver.engine._leave()
    assert view.of(result.id, "status", "attempt", "crashes") == ("runnable", 0, 0)


@pytest.mark.parametrize("machine", [False, True], ids=["end", "next"])
def test_writes_need_the_outcome_they_belong_to(
    app: Durable, driver: Driver, effects: Effects, connection: Any, database: str, machine: bool
) -> None:
    """The process gets another lease (its old one was found dead) while the outcome waits for a locked row."""
    stranger = psycopg.connect(database)

    def body(ctx: Context) -> None:
        ctx.connection.execute(effects.insert, ["paid"])
        stranger.execute(f"SELECT FROM {app.schema}.instances WHERE id = %s FOR UPDATE", [ctx.id])

    @app.task(bind=True, name="t")
    def work(ctx: Context) -> None:
        body(ctx)

    @app.machine(name="m")
    class Pays(Machine):
        @step(initial=True)
        def pay(self, ctx: Context) -> Next:
            body(ctx)
            return Next(self.pay)

    def new_lease() -> None:
        wait_until(lambda: connection.execute(LOCK_WAITS).fetchone(), what="the outcome to wait")
        driver.engine._register()
        stranger.rollback()

    app.insert(Pays if machine else work)
    claimed = driver.claim()
    other = threading.Thread(target=new_lease)
    other.start()
    commit = driver.execute(claimed)
    other.join(10)
    stranger.close()
    committed = commit.flushed is not None and claimed.id in commit.flushed.committed
    assert effects.seen == ["paid"] * committed
    assert committed, "its row was locked until then, and held by the old lease"
