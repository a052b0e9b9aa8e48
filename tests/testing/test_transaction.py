"""Inside of a test's transaction everything runs on its connection, and nothing of it remains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from durable import Await, Context, Done, Durable, Machine, ScheduleChildren, step
from durable.errors import (
    ConnectionUsageError,
    DuplicateError,
    DurableError,
    NotFoundError,
    ResultTimeout,
    SchemaError,
    TaskFailed,
)
from durable.testing import (
    assert_awaiting,
    assert_done,
    assert_failed,
    assert_status,
    crash_every_commit,
    drain,
    fire_timeouts,
    transaction,
    travel,
)
from tests.fix_db import wait_until
from tests.machines.driver import View


@pytest.fixture
def order(app: Durable) -> Any:
    @app.task(name="square")
    def square(n: int) -> int:
        return n * n

    @app.machine(name="order")
    class Order(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("paid", then=self.paid, timeout=60)

        @step
        def paid(self, ctx: Context) -> Any:
            if not ctx.awaited:
                raise TimeoutError("unpaid")
            return ScheduleChildren([(square, {"args": (n,)}) for n in range(4)], then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done(sum(child.result for child in ctx.children))

    return Order


def story(app: Durable, order: Any) -> None:
    """Every call there is."""
    result = app.insert(order, correlation_key="o:1")
    drain(app)
    assert_awaiting(app, "o:1", "paid")
    with pytest.raises(DuplicateError) as raised:
        app.insert(order, correlation_key="o:1")
    assert raised.value.existing_id == result.id
    with pytest.raises(ResultTimeout, match="drain"):
        result.get()
    assert app.signal("o:1", "paid", dedup_key="e")
    assert not app.signal("o:1", "paid", dedup_key="e")
    assert drain(app)["done"] == 5
    assert assert_done(app, result, 14) == result.get(timeout=60) == app.result(result.id).get()
    assert len(result.children) == 4

    unpaid, later = order.delay(), app.insert(order, schedule_in=3600)
    drain(app, with_scheduled=False)
    assert fire_timeouts(app, unpaid) == 1
    drain(app, with_scheduled=False)
    assert_failed(app, unpaid, TimeoutError)
    assert travel(app, 3600) == 1
    drain(app)
    assert later.cancel("enough")
    assert_status(app, later, "cancelled")
    assert app.retry(unpaid.id)
    with app.batch():
        order.delay()
    with pytest.raises(NotFoundError):
        app.result(10**15).get()


def test_the_app_works_in_it_and_nothing_remains(app: Durable, order: Any, view: View) -> None:
    with transaction(app) as connection:
        story(app, order)
        assert connection.execute(f"SELECT count(*) FROM {app.schema}.history").fetchone() != (0,)
        assert view.count("history") == view.count("instances") == view.count("workers") == 0
    assert view.count("history") == view.count("instances") == view.count("signals") == view.count("workers") == 0


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_it_may_be_the_callers_own_connection(
    app: Durable, database: str, order: Any, view: View, autocommit: bool, begun: bool
) -> None:
    with psycopg.connect(database, autocommit=autocommit) as connection:
        if begun:
            connection.execute("BEGIN" if autocommit else "SELECT 1")
        with transaction(app, connection) as same:
            assert same is connection
            story(app, order)
            assert view.count("instances") == 0
        assert not connection.closed
        connection.rollback()
    assert view.count("instances") == view.count("history") == 0


def test_the_callers_own_work_in_a_step_is_part_of_it(app: Durable, connection: Any) -> None:
    with transaction(app) as own:
        own.execute("CREATE TEMP TABLE notes (n int UNIQUE)")

        @app.task(name="note", max_attempts=2)
        def note(n: int) -> None:
            own.execute("INSERT INTO notes VALUES (%s)", [n])

        note.delay(1)
        again = note.delay(1)
        assert drain(app) == {"steps": 3, "done": 1, "retry": 1, "failed": 1}
        assert assert_failed(app, again, "UniqueViolation").message.startswith("duplicate key")
        assert own.execute("SELECT n FROM notes").fetchall() == [(1,)]


def test_what_coroutines_do_is_part_of_it(app: Durable, view: View) -> None:
    @app.task(name="second")
    async def second() -> str:
        return "second"

    @app.task(name="first")
    async def first() -> int:
        return (await second.adelay()).id

    async def test() -> Any:
        result = await first.adelay()
        assert await result.astatus() == "runnable"
        with pytest.raises(ResultTimeout):
            await result.aget(timeout=60)
        drain(app)
        return await app.result(await result.aget()).aget()

    with transaction(app):
        assert asyncio.run(test()) == "second"
    assert view.count("history") == 0


def test_other_threads_use_it_too(app: Durable, view: View) -> None:
    @app.task(name="note")
    def note() -> None: ...

    with transaction(app):
        threads = [threading.Thread(target=note.delay) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert drain(app) == {"steps": 4, "done": 4}
    assert view.count("instances") == 0


def test_a_wait_begun_before_goes_on_by_its_own_connection(app: Durable, view: View) -> None:
    @app.task(name="note")
    def note() -> str:
        return "done"

    result = note.delay()
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.append(result.get(timeout=30)))
    waiter.start()
    wait_until(lambda: app._watchers and next(iter(app._watchers.values()))._waiting, what="a wait")
    other = Durable("other", dsn=app.database.dsn(), schema=app.schema)
    other.definitions.update(app.definitions)
    with transaction(app) as connection:
        connection.execute("SELECT 1")
        drain(other)
        waiter.join(20)
        assert got == ["done"]
    other.close()


def test_it_nests(app: Durable) -> None:
    @app.task(name="note")
    def note() -> None: ...

    with transaction(app):
        first = note.delay()
        with transaction(app):
            second = note.delay()
            assert drain(app) == {"steps": 2, "done": 2}
        assert (first.status, app.result(second.id).status) == ("runnable", "not_found")


def test_after_it_the_app_is_as_it_was(app: Durable, view: View) -> None:
    @app.task(name="note")
    def note() -> None: ...

    def failing() -> None:
        with transaction(app):
            note.delay()
            raise LookupError

    with pytest.raises(LookupError):
        failing()
    result = note.delay()
    assert view.count("instances") == 1
    with pytest.raises(ResultTimeout, match=r"0\.05"):
        result.get(timeout=0.05)
    drain(app)
    result.get(timeout=5)


def test_connections_that_cannot_be_used_are_refused(app: Durable, database: str) -> None:
    with pytest.raises(ConnectionUsageError, match="str"), transaction(app, "postgresql://"):
        pass
    connection = psycopg.connect(database)
    with pytest.raises(psycopg.Error):
        connection.execute("SELECT wrong")
    with pytest.raises(ConnectionUsageError, match="failed transaction"), transaction(app, connection):
        pass
    connection.close()
    with pytest.raises(ConnectionUsageError, match="closed"), transaction(app, connection):
        pass


@pytest.fixture
def bare(database: str) -> Iterator[Durable]:
    app = Durable("bare", dsn=database, schema="t_bare")
    yield app
    app.close()


def test_a_schema_that_is_not_there_is_told(bare: Durable, database: str) -> None:
    with pytest.raises(SchemaError, match="migrate"), transaction(bare):
        pass
    with (
        psycopg.connect(database) as connection,
        pytest.raises(SchemaError, match="migrate"),
        transaction(bare, connection),
    ):
        pass


def test_a_missing_partition_is_told_before_anything_runs(bare: Durable, database: str, connection: Any) -> None:
    bare.migrate()
    try:
        for (name,) in connection.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 't_bare.history'::regclass"
        ).fetchall():
            connection.execute(f"DROP TABLE {name}")
        with (
            psycopg.connect(database) as own,
            pytest.raises(SchemaError, match=r"partition for today.*migrate"),
            transaction(bare, own),
        ):
            pass
        with transaction(bare):  # on a connection of ours they can be made first
            assert drain(bare) == {"steps": 0}
    finally:
        connection.execute("DROP SCHEMA t_bare CASCADE")


def test_a_failed_instance_is_reported_in_it(app: Durable) -> None:
    @app.task(name="bad", max_attempts=1)
    def bad() -> None:
        raise ValueError("no")

    with transaction(app):
        result = bad.delay()
        drain(app)
        with pytest.raises(TaskFailed, match="ValueError: no"):
            result.get()


def test_an_outcome_that_the_database_refuses_fails_its_instance_and_leaves_the_transaction_usable(
    app: Durable,
) -> None:
    @app.task(name="note")
    def note() -> str:
        return "x"

    with transaction(app) as own:
        own.execute(f"ALTER TABLE {app.schema}.history ADD CONSTRAINT refused CHECK (result IS NULL)")
        result = note.delay()
        assert drain(app) == {"steps": 1, "failed": 1}
        assert assert_failed(app, result, "OutcomeError", match="refused")
        assert own.execute("SELECT 1").fetchone() == (1,)


def test_crashing_needs_real_commits(app: Durable) -> None:
    with transaction(app), pytest.raises(DurableError, match="real commits"):
        crash_every_commit(app, lambda app: None)


def test_sqlalchemys_connection_and_session_are_taken_as_they_are(
    app: Durable, database: str, order: Any, view: View
) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    orm = pytest.importorskip("sqlalchemy.orm")
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(database), poolclass=sqlalchemy.pool.NullPool
    )
    with engine.connect() as connection:
        outer = connection.begin()
        with orm.Session(bind=connection, join_transaction_mode="create_savepoint") as session:
            with transaction(app, session):
                story(app, order)
                app.insert(order, correlation_key="session", connection=session)
                session.commit()
                drain(app)
                assert_awaiting(app, "session", "paid")
            session.rollback()
        outer.rollback()
    engine.dispose()
    assert view.count("instances") == view.count("history") == 0
