"""Schemas for tests: an app on a schema of its own, and emptying it. A schema with somebody's data is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from durable import validation
from durable.app import Durable
from durable.errors import DurableError
from durable.storage import migrations, testing
from durable.storage.session import Connection, run
from durable.testing import seams


@contextmanager
def on_schema(app: Durable, schema: str, *, drop: bool = False) -> Iterator[Durable]:
    """Let the app live in another schema of its database until the block ends, made if it is not there.

    drop  drop it at the end
    Raises DurableError for a schema that holds instances and was not made for tests.
    """
    with seams.elsewhere(app, validation.schema(schema)):
        prepare(app)
        try:
            yield app
        finally:
            if drop:
                remove(app)


def wipe(app: Durable) -> None:
    """Delete every instance and signal of the app's schema; ids begin at 1 again.

    Raises DurableError for a schema that was not made for tests (see `on_schema`) and holds instances.
    """
    with seams.connected(app, "test", borrow=False) as connection:
        check(connection, app)
        run(connection, app.sql, testing.wipe())


def prepare(app: Durable) -> None:
    """Make the app's schema if it is not there, and mark it as one for tests. Raises as `on_schema`."""
    with seams.connected(app, "test", borrow=False) as connection:
        migrations.migrate(connection, app.schema)
        check(connection, app)
        testing.mark(connection, app.schema)


def remove(app: Durable) -> None:
    """Drop the app's schema, which must be one for tests. Raises DurableError."""
    app.close()
    with seams.connected(app, "test", borrow=False) as connection:
        check(connection, app)
        testing.drop(connection, app.schema)


def check(connection: Connection, app: Durable) -> None:
    """Refuse a schema that a test must not empty. Raises DurableError, naming the remedy."""
    if testing.is_marked(connection, app.schema):
        return
    filled, worked_on = run(connection, app.sql, testing.in_use())
    if filled or worked_on:
        what = "holds instances" if filled else "has workers"
        raise DurableError(
            f"schema {app.schema!r} {what} and was not made for tests, so it is not emptied. Use a schema of its own: "
            '`with durable.testing.on_schema(app, "some_name"):`, or the fixture durable_app'
        )
