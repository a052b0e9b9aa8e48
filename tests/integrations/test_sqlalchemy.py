"""SQLAlchemy's sessions as `connection=`: one transaction with the caller's rows, wake-ups after it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from durable import Await, Done, DuplicateError, Durable, Machine, Task, step
from durable.errors import ConnectionUsageError, DatabaseUnavailableError, NoTargetError
from tests.fix_rows import Rows
from tests.integrations.conftest import Ear, count
from tests.machines.driver import Driver


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = {"prefixes": ["TEMP"]}

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def session(engine: sqlalchemy.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def test_a_session_s_commit_makes_it_exist_and_then_notifies(
    task: Task[..., Any], session: Session, rows: Rows, ear: Ear
) -> None:
    result = task.apply_async(connection=session)
    assert session.in_transaction()
    assert (count(rows), ear.heard()) == (0, [])
    session.commit()
    assert (result.status, ear.heard()) == ("runnable", ["default:1:0"])


def test_the_notification_goes_out_on_a_connection_of_ours(
    task: Task[..., Any], session: Session, rows: Rows, ear: Ear
) -> None:
    task.apply_async(connection=session)
    session.commit()
    (notification,) = ear.connection.notifies(timeout=20, stop_after=1)
    query = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
    assert rows.fetch(query, [notification.pid]) == [{"application_name": "durable test"}]


def test_a_rollback_leaves_nothing_and_sends_nothing(
    task: Task[..., Any], session: Session, rows: Rows, ear: Ear
) -> None:
    task.apply_async(connection=session)
    session.rollback()
    session.execute(text("SELECT 1"))
    session.commit()
    assert (count(rows), ear.heard()) == (0, [])


def test_a_session_closed_in_its_transaction_sends_nothing_for_it_later(
    task: Task[..., Any], session: Session, rows: Rows, ear: Ear
) -> None:
    task.apply_async(connection=session)
    session.close()
    session.execute(text("SELECT 1"))
    session.commit()
    assert (count(rows), ear.heard()) == (0, [])


def test_each_transaction_of_a_session_notifies_for_itself_only(
    app: Durable, session: Session, rows: Rows, ear: Ear
) -> None:
    task = app.task(name="task")(lambda: None)
    for queue in ("a", "b", "c"):
        task.apply_async(queue=queue, connection=session)
        session.commit()
        assert ear.heard() == [f"{queue}:1:0"]
    assert count(rows) == 3


def test_two_enqueues_in_one_transaction_notify_once(
    task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear
) -> None:
    with Session(engine) as session, session.begin():
        task.apply_async(connection=session)
        task.apply_async(connection=session)
    assert (count(rows), ear.heard()) == (2, ["default:1:0"])


def test_one_session_serves_two_apps(
    database: str, app: Durable, session: Session, task: Task[..., Any], ear: Ear
) -> None:
    other = Durable("other", dsn=database, schema=app.schema)
    try:
        second = other.task(name="second", queue="second")(lambda: None)
        task.apply_async(connection=session)
        second.apply_async(connection=session)
        session.commit()
        assert ear.heard() == ["default:1:0", "second:1:0"]
    finally:
        other.close()


def test_a_savepoint_rolled_back_takes_its_rows_and_its_notification(
    task: Task[..., Any], session: Session, rows: Rows, ear: Ear
) -> None:
    task.apply_async(queue="kept", connection=session)
    with session.begin_nested() as savepoint:
        task.apply_async(queue="dropped", connection=session)
        with session.begin_nested():
            task.apply_async(queue="released-then-dropped", connection=session)
        savepoint.rollback()
    with session.begin_nested():
        task.apply_async(queue="released", connection=session)
    assert ear.heard() == []
    session.commit()
    assert ear.heard() == ["kept:1:0", "released:1:0"]
    assert count(rows) == 2


def test_a_failed_flush_in_a_savepoint_takes_only_what_was_in_it(
    task: Task[..., Any], session: Session, rows: Rows, ear: Ear
) -> None:
    Base.metadata.create_all(session.connection())
    session.add(Order(id=1))
    session.flush()
    session.expunge_all()
    task.apply_async(queue="kept", connection=session)
    savepoint = session.begin_nested()
    task.apply_async(queue="dropped", connection=session)
    session.add(Order(id=1))
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        savepoint.commit()
    savepoint.rollback()
    session.commit()
    assert (count(rows), ear.heard()) == (1, ["kept:1:0"])


def test_the_session_s_own_rows_and_the_instance_commit_together_without_a_flush_in_between(
    task: Task[..., Any], session: Session, rows: Rows
) -> None:
    Base.metadata.create_all(session.connection())
    session.add(Order(id=1))
    task.apply_async(connection=session)
    assert session.new
    session.flush()
    assert session.get(Order, 1) is not None
    session.commit()
    assert count(rows) == 1


def test_an_error_while_notifying_is_logged_and_the_commit_is_done(
    app: Durable, away: Durable, session: Session, rows: Rows, ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    task = away.task(name="task")(lambda: None)
    task.apply_async(connection=session)
    with caplog.at_level(logging.ERROR, "durable.writer"):
        session.commit()
    assert (count(rows), ear.heard()) == (1, [])
    assert "workers could not be notified after a commit" in caplog.text
    assert "DatabaseUnavailableError" in caplog.text
    assert session.execute(text("SELECT 1")).scalar() == 1


def test_an_abandoned_session_is_not_kept(task: Task[..., Any], engine: sqlalchemy.Engine) -> None:
    session = Session(engine)
    task.apply_async(connection=session)
    session.connection().close()
    known = weakref.ref(session)
    del session
    gc.collect()
    assert known() is None


def test_a_scoped_session_is_its_session(task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear) -> None:
    registry = scoped_session(sessionmaker(engine))
    task.apply_async(connection=registry)
    assert count(rows) == 0
    registry.commit()
    assert (count(rows), ear.heard()) == (1, ["default:1:0"])
    registry.remove()


def test_many_and_batches_and_signals_go_with_the_session(
    app: Durable, task: Task[..., Any], session: Session, rows: Rows, ear: Ear, driver: Driver
) -> None:
    @app.machine(name="sleeper")
    class Sleeper(Machine):
        @step(initial=True)
        def begin(self, ctx: Any) -> object:
            return Await("go", then=self.end)

        @step
        def end(self, ctx: Any) -> object:
            return Done("woken")

    sleeper = app.insert(Sleeper)
    driver.drain()
    ear.heard()
    assert len(app.insert_many([(task, {"queue": "many"})] * 3, connection=session)) == 3
    with app.batch(connection=session):
        batched = task.apply_async(queue="batch")
        task.delay()
    assert app.signal(sleeper.id, "go", {"a": 1}, connection=session)
    assert app.signal_many([{"target": 2**40, "name": "go"}], connection=session) == [None]
    with pytest.raises(NoTargetError):
        app.signal(2**40, "go", connection=session)
    assert (count(rows), ear.heard()) == (1, [])
    session.commit()
    assert batched.status == "runnable"
    assert {"many:3:0", "batch:1:0"} <= set(ear.heard())
    driver.drain()
    assert sleeper.get(timeout=10) == "woken"


def test_an_occupied_key_leaves_the_transaction_usable(task: Task[..., Any], session: Session, rows: Rows) -> None:
    first = task.apply_async(correlation_key="k", connection=session)
    with pytest.raises(DuplicateError) as caught:
        task.apply_async(correlation_key="k", connection=session)
    assert caught.value.existing_id == first.id
    assert task.apply_async(correlation_key="k", on_conflict="return", connection=session).id == first.id
    assert session.execute(text("SELECT 1")).scalar() == 1
    session.commit()
    assert count(rows) == 1


def test_a_session_on_an_autocommit_engine_commits_and_notifies_at_once(
    app: Durable, task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear
) -> None:
    with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        app.insert_many([(task, {})] * 2, connection=session)
        assert (count(rows), ear.heard()) == (2, ["default:2:0"])
        session.commit()
    assert ear.heard() == []


def test_a_session_bound_to_a_connection_does_not_notify_before_that_connection_commits(
    task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear
) -> None:
    with engine.connect() as connection, connection.begin() as transaction:
        with Session(connection) as session:
            task.apply_async(connection=session)
            session.commit()
        assert (count(rows), ear.heard()) == (0, [])
        transaction.commit()
    assert (count(rows), ear.heard()) == (1, ["*"])


def test_a_session_that_needs_a_rollback_is_refused(task: Task[..., Any], session: Session) -> None:
    Base.metadata.create_all(session.connection())
    session.add_all([Order(id=1)])
    session.flush()
    session.expunge_all()
    session.add(Order(id=1))
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        session.flush()
    with pytest.raises(ConnectionUsageError, match=r"connection= can't be used: .*rolled back"):
        task.apply_async(connection=session)
    session.rollback()
    assert task.apply_async(connection=session).id


def test_a_session_without_an_engine_is_refused(task: Task[..., Any]) -> None:
    with pytest.raises(ConnectionUsageError, match="connection= can't be used"):
        task.apply_async(connection=Session())


def test_an_engine_that_can_t_connect_is_the_database_away(task: Task[..., Any]) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://127.0.0.1:1/none")
    with Session(engine) as session, pytest.raises(DatabaseUnavailableError, match="refused"):
        task.apply_async(connection=session)
