"""Django's connections as `connection=`: the instance is part of atomic(), and on_commit sends its wake-ups."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import django
import pytest
from django.conf import settings
from django.db import DatabaseError, connections, models, transaction
from django.db import connection as default
from psycopg.conninfo import conninfo_to_dict

from durable import DuplicateError, Durable, Task
from durable.errors import ConnectionUsageError, DatabaseUnavailableError
from tests.fix_rows import Rows
from tests.integrations.conftest import Ear, count


@pytest.fixture(scope="session", autouse=True)
def configured(database: str) -> None:
    """Django is configured once in a process."""
    dsn = conninfo_to_dict(database)
    postgres = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": dsn.pop("dbname"),
        "USER": dsn.pop("user", ""),
        "PASSWORD": dsn.pop("password", ""),
        "HOST": dsn.pop("host", ""),
        "PORT": dsn.pop("port", ""),
    }
    settings.configure(
        USE_TZ=True,
        TIME_ZONE="America/New_York",
        LOGGING_CONFIG=None,
        DATABASES={
            "default": postgres,
            "bound": {**postgres, "OPTIONS": {"server_side_binding": True, "prepare_threshold": 0}},
            "lite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
            "away": {**postgres, "HOST": "127.0.0.1", "PORT": "1"},
        },
    )
    django.setup()


@pytest.fixture(autouse=True)
def closed(configured: None) -> Iterator[None]:
    yield
    connections.close_all()


@pytest.fixture(params=["default", "bound"])
def alias(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_atomic_s_commit_makes_it_exist_and_then_notifies_once(
    app: Durable, task: Task[..., Any], rows: Rows, ear: Ear, alias: str
) -> None:
    with transaction.atomic(using=alias):
        result = task.apply_async(connection=connections[alias], countdown=0)
        task.apply_async(connection=connections[alias])
        app.insert_many([(task, {})] * 2, connection=connections[alias])
        with app.batch(connection=connections[alias]):
            task.delay()
        assert app.signal(result.id or 0, "go", {"a": [1, None]}, dedup_key="d", connection=connections[alias])
        assert (count(rows), ear.heard()) == (0, [])
    assert (count(rows), ear.heard()) == (5, ["default:1:0"])


def test_the_usual_connection_proxy_is_the_default_connection(task: Task[..., Any], rows: Rows, ear: Ear) -> None:
    with transaction.atomic():
        task.apply_async(connection=default)
        assert (count(rows), ear.heard()) == (0, [])
    assert (count(rows), ear.heard()) == (1, ["default:1:0"])


def test_an_exception_out_of_atomic_leaves_nothing_and_sends_nothing(
    task: Task[..., Any], rows: Rows, ear: Ear
) -> None:
    def fail() -> None:
        with transaction.atomic():
            task.apply_async(connection=default)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with transaction.atomic(), default.cursor() as cursor:
        cursor.execute("SELECT 1")
    assert (count(rows), ear.heard()) == (0, [])


def test_a_nested_atomic_rolled_back_takes_its_rows_and_its_notification(
    task: Task[..., Any], rows: Rows, ear: Ear
) -> None:
    with transaction.atomic():
        task.apply_async(queue="kept", connection=default)
        with transaction.atomic():
            task.apply_async(queue="dropped", connection=default)
            transaction.set_rollback(True)
        with transaction.atomic():
            task.apply_async(queue="released", connection=default)
        assert ear.heard() == []
    assert (count(rows), ear.heard()) == (2, ["kept:1:0", "released:1:0"])


def test_outside_atomic_it_commits_and_notifies_at_once(
    app: Durable, task: Task[..., Any], rows: Rows, ear: Ear, alias: str
) -> None:
    app.insert_many([(task, {})] * 2, connection=connections[alias])
    assert (count(rows), ear.heard()) == (2, ["default:2:0"])


def test_with_autocommit_off_the_transaction_carries_the_notification(
    task: Task[..., Any], rows: Rows, ear: Ear
) -> None:
    transaction.set_autocommit(False)
    task.apply_async(connection=default)
    assert (count(rows), ear.heard()) == (0, [])
    transaction.commit()
    assert (count(rows), ear.heard()) == (1, ["*"])
    with transaction.atomic():
        task.apply_async(connection=default)
    assert (count(rows), ear.heard()) == (1, []), "atomic() is only a savepoint here"
    transaction.commit()
    assert (count(rows), ear.heard()) == (2, ["*"])


def test_an_occupied_key_leaves_the_transaction_usable(task: Task[..., Any], rows: Rows) -> None:
    with transaction.atomic():
        first = task.apply_async(correlation_key="k", connection=default)
        with pytest.raises(DuplicateError):
            task.apply_async(correlation_key="k", connection=default)
        assert task.apply_async(correlation_key="k", on_conflict="return", connection=default).id == first.id
        with default.cursor() as cursor:
            cursor.execute("SELECT %s", ["usable"])
            assert cursor.fetchone() == ("usable",)
    assert count(rows) == 1


def test_an_error_while_notifying_is_logged_and_the_commit_is_done(
    app: Durable, away: Durable, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    task = away.task(name="task")(lambda: None)
    later = []
    with caplog.at_level(logging.ERROR), transaction.atomic():
        task.apply_async(connection=default)
        transaction.on_commit(lambda: later.append("ran"))
    assert (count(rows), later) == (1, ["ran"])
    errors = [record.name for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == ["durable.writer"], "and Django has nothing to say"


def test_a_broken_atomic_block_is_refused(task: Task[..., Any], rows: Rows) -> None:
    with transaction.atomic():
        transaction.set_rollback(True)
        with pytest.raises(ConnectionUsageError, match=r"can't be used: .*atomic"):
            task.apply_async(connection=default)
    assert count(rows) == 0


def test_a_failed_transaction_is_refused(task: Task[..., Any]) -> None:
    with transaction.atomic():
        with pytest.raises(DatabaseError), default.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")
        with pytest.raises(ConnectionUsageError, match="in a failed transaction"):
            task.apply_async(connection=default)
        transaction.set_rollback(True)


def test_a_connection_of_another_thread_is_refused(task: Task[..., Any]) -> None:
    wrapper = connections["default"]

    async def main() -> None:
        with pytest.raises(ConnectionUsageError, match=r"can't be used: .*thread"):
            await asyncio.to_thread(task.apply_async, connection=wrapper)

    asyncio.run(main())


def test_a_database_that_can_t_be_reached_is_the_database_away(task: Task[..., Any]) -> None:
    with pytest.raises(DatabaseUnavailableError, match="refused"):
        task.apply_async(connection=connections["away"])


def test_another_backend_and_another_driver_are_named_with_the_remedy(task: Task[..., Any]) -> None:
    remedy = "use ENGINE 'django.db.backends.postgresql' with psycopg 3"
    with pytest.raises(ConnectionUsageError, match=f"'lite', which is sqlite; {remedy}"):
        task.apply_async(connection=connections["lite"])
    wrapper = connections["default"].copy()
    wrapper.connection = sqlite3.connect(":memory:")
    with pytest.raises(ConnectionUsageError, match=f"'default', whose driver is sqlite3; {remedy}"):
        task.apply_async(connection=wrapper)
    wrapper.connection.close()


def test_async_calls_say_what_to_do_instead(task: Task[..., Any]) -> None:
    with pytest.raises(ConnectionUsageError, match="make the sync call, inside sync_to_async"):
        asyncio.run(task.aapply_async(connection=default))


def test_the_example_in_the_docs_does_what_it_shows(app: Durable, rows: Rows) -> None:
    page = (Path(__file__).parents[2] / "docs" / "transactions.md").read_text()
    (example,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    send = app.task(name="send")(lambda order_id: None)

    class Order(models.Model):
        customer = models.TextField()

        class Meta:
            app_label = "docs"
            db_table = "docs_orders"

    with default.schema_editor() as editor:
        editor.create_model(Order)
    modules = {"shop": None, "shop.models": {"Order": Order}, "shop.tasks": {"send": send}}
    namespace: dict[str, Any] = {}
    for name, contents in modules.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents or {})
    try:
        exec(example, namespace)
        namespace["place_order"]("you")
    finally:
        for name in modules:
            del sys.modules[name]
    (order,) = Order.objects.all()
    assert order.customer == "you"
    assert count(rows) == 1
    with default.schema_editor() as editor:
        editor.delete_model(Order)
