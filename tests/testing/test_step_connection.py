"""ctx.connection in a drain, inside of a test's transaction, and across crashes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from durable import Context, Done, Durable, Machine, Next, Stop, step
from durable.testing import assert_done, assert_failed, crash_every_commit, drain, transaction
from tests.machines.driver import View


@pytest.fixture
def notes(app: Durable, connection: Any) -> Iterator[Any]:
    """A table of the user's; returns a function that reads it."""
    connection.execute("CREATE TABLE notes (n int UNIQUE)")
    yield lambda: [n for (n,) in connection.execute("SELECT n FROM notes ORDER BY n").fetchall()]
    connection.execute("DROP TABLE notes")


@pytest.fixture
def writer(app: Durable) -> Any:
    @app.task(name="writer", bind=True, max_attempts=2)
    def writer(ctx: Context, n: int, how: str = "") -> int:
        ctx.connection.execute("INSERT INTO notes VALUES (%s)", [n])
        if how == "cancel":
            app.cancel(ctx.id)
        if how == "swallow":
            try:
                ctx.connection.execute("INSERT INTO notes VALUES (%s)", [n])
            except Exception:
                return n
        if how == "raise":
            raise LookupError
        return n

    return writer


def story(app: Durable, writer: Any, connection: Any = None) -> None:
    one, again, wrong = writer.delay(1), writer.delay(1), writer.delay(2, "raise")
    swallowed = writer.delay(3, "swallow")
    assert drain(app) == {"steps": 7, "done": 1, "retry": 3, "failed": 3}
    assert_done(app, one, 1)
    assert_failed(app, again, "UniqueViolation")
    assert_failed(app, wrong, LookupError)
    assert_failed(app, swallowed, "ConnectionUsageError")


def test_a_drain_commits_it_with_the_outcome(app: Durable, writer: Any, notes: Any) -> None:
    story(app, writer)
    cancelled = writer.delay(5, "cancel")
    assert drain(app) == {"steps": 1, "cancelled": 1}
    assert cancelled.status == "cancelled"
    assert notes() == [1]


def test_inside_of_a_transaction_it_is_that_ones_connection(app: Durable, writer: Any, notes: Any, view: View) -> None:
    with transaction(app) as own:
        story(app, writer)
        writer.delay(5, "cancel")
        assert drain(app) == {"steps": 1, "cancelled": 1}
        assert own.execute("SELECT n FROM notes").fetchall() == [(1,)]
    assert notes() == []
    assert view.count("history") == 0


def test_async_steps_have_it_in_a_drain_and_are_refused_it_inside_of_a_transaction(app: Durable, notes: Any) -> None:
    @app.task(name="writer", bind=True, max_attempts=1)
    async def writer(ctx: Context, n: int) -> int:
        await ctx.connection.execute("INSERT INTO notes VALUES (%s)", [n])
        return n

    writer.delay(1)
    assert drain(app) == {"steps": 1, "done": 1}
    assert notes() == [1]
    with transaction(app):
        refused = writer.delay(2)
        drain(app)
        assert_failed(app, refused, "ConnectionUsageError", match="on_schema")


def test_what_is_written_there_happens_once_whatever_crashes(app: Durable, notes: Any) -> None:
    @app.task(name="mail")
    def mail(to: str) -> None: ...

    @app.machine(name="order")
    class Order(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            mail.apply_async(args=("ann",), connection=ctx.connection)
            return Next(self.note)

        @step
        async def note(self, ctx: Context) -> Any:
            await mail.aapply_async(args=("bob",), connection=ctx.connection)
            return Done(None)

        def handle(self, error: BaseException, ctx: Context) -> Any:
            return Stop(error)

    report = crash_every_commit(app, lambda app: Order.delay())
    assert any(label.startswith("COMMIT of insert_one, ") for label in report.commits)
