"""SQLAlchemy's connections as `connection=`: they tell nobody of a commit, so that it carries the wake-ups itself."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from durable import Durable, Task
from durable.errors import ConnectionUsageError
from tests.fix_rows import Rows
from tests.integrations.conftest import Ear, count


def test_a_connection_s_commit_makes_it_exist_and_notifies(
    task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear
) -> None:
    with engine.connect() as connection:
        result = task.apply_async(connection=connection)
        task.apply_async(connection=connection)
        assert connection.in_transaction(), "as after a statement of its own"
        assert (count(rows), ear.heard()) == (0, [])
        connection.commit()
        assert (result.status, ear.heard()) == ("runnable", ["*"])
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
        task.apply_async(connection=connection)
    assert (count(rows), ear.heard()) == (3, ["*"])


def test_what_a_connection_rolls_back_leaves_nothing(
    task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear
) -> None:
    with engine.connect() as connection:
        task.apply_async(connection=connection)
        connection.rollback()
        task.apply_async(connection=connection)
    with contextlib.suppress(ZeroDivisionError), engine.begin() as connection:
        task.apply_async(connection=connection)
        1 / 0
    with engine.begin() as connection:
        with connection.begin_nested() as savepoint:
            task.apply_async(connection=connection)
            savepoint.rollback()
        connection.execute(text("SELECT 1"))
    assert (count(rows), ear.heard()) == (0, [])


def test_a_connection_may_leave_waking_to_the_poll(
    task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear
) -> None:
    with engine.begin() as connection:
        task.apply_async(connection=connection, notify_in_transaction=False)
    assert (count(rows), ear.heard()) == (1, [])


def test_sqlalchemy_s_commit_event_of_a_connection_comes_before_the_commit(
    engine: sqlalchemy.Engine, rows: Rows, task: Task[..., Any]
) -> None:
    """Why a Connection's own transaction carries the wake-ups: there is no event after it."""
    seen = []
    with engine.connect() as connection:
        event.listen(connection, "commit", lambda _: seen.append(count(rows)))
        task.apply_async(connection=connection)
        connection.commit()
    assert (seen, count(rows)) == ([0], 1)


def test_an_autocommit_connection_commits_and_notifies_at_once(
    app: Durable, task: Task[..., Any], engine: sqlalchemy.Engine, rows: Rows, ear: Ear
) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        app.insert_many([(task, {})] * 2, connection=connection)
        assert (count(rows), ear.heard()) == (2, ["default:2:0"])
        with connection.begin():
            task.apply_async(connection=connection)
        assert count(rows) == 3


def test_a_closed_connection_and_an_inactive_transaction_are_refused(
    task: Task[..., Any], engine: sqlalchemy.Engine
) -> None:
    with engine.connect() as connection:
        with pytest.raises(sqlalchemy.exc.DataError):
            connection.execute(text("SELECT 1 / 0"))
        with pytest.raises(ConnectionUsageError, match="in a failed transaction; roll it back first"):
            task.apply_async(connection=connection)
        connection.rollback()
        transaction, savepoint = connection.begin(), connection.begin_nested()
        transaction.rollback()
        assert not savepoint.is_active
        assert task.apply_async(connection=connection).id
    with pytest.raises(ConnectionUsageError, match="connection= is closed"):
        task.apply_async(connection=connection)


def test_another_driver_is_named_with_the_remedy(task: Task[..., Any]) -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    message = r"speaks sqlite\+pysqlite; make its engine with create_engine\('postgresql\+psycopg://"
    with engine.connect() as connection, pytest.raises(ConnectionUsageError, match=message):
        task.apply_async(connection=connection)
    with Session(engine) as session:
        with pytest.raises(ConnectionUsageError, match=message):
            task.apply_async(connection=session)
        assert not session.in_transaction()
    engine.dispose()


def test_an_engine_is_not_a_connection(task: Task[..., Any], engine: sqlalchemy.Engine) -> None:
    with pytest.raises(ConnectionUsageError, match="is an Engine, which has no transaction"):
        task.apply_async(connection=engine)
