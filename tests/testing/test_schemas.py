"""An app on a schema for tests, and emptying it."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Await, Context, Durable, Machine, step
from durable.errors import DurableError, ValidationError
from durable.testing import drain, on_schema, wipe
from tests.machines.driver import View

KEPT = {"migrations"}
"""Tables that `wipe` leaves as they are; whoever adds one decides here."""


@pytest.fixture
def parked(app: Durable) -> Any:
    @app.machine(name="parked")
    class Parked(Machine):
        @step
        def wait(self, ctx: Context) -> Any:
            return Await("go", then=self.wait)

    return Parked


def test_inside_of_it_the_app_lives_elsewhere_and_afterwards_where_it_was(
    app: Durable, parked: Any, view: View, connection: Any
) -> None:
    before = app.schema, app.sql, app._pool, app.wakeups
    result = parked.delay()
    with on_schema(app, "t_elsewhere", drop=True) as same:
        assert same is app
        assert app.schema == "t_elsewhere"
        assert app.result(result.id).status == "not_found"
        parked.delay()
        drain(app)
        assert connection.execute("SELECT count(*) FROM t_elsewhere.instances").fetchone() == (1,)
    assert (app.schema, app.sql, app._pool, app.wakeups) == before
    assert result.status == "runnable"
    assert view.count("instances") == 1
    assert connection.execute("SELECT to_regnamespace('t_elsewhere')").fetchone() == (None,)


def test_wiping_leaves_no_row_and_begins_to_count_again(app: Durable, parked: Any, view: View) -> None:
    with on_schema(app, "t_wiped", drop=True):
        for _ in range(2):
            assert parked.delay().id == 1
            app.signal(1, "go", dedup_key="k")
            drain(app)
            tables = [
                name
                for (name,) in view.rows(
                    "SELECT tablename::text FROM pg_tables WHERE schemaname = 't_wiped' AND tablename NOT LIKE"
                    " 'history_2%%'"
                )
            ]
            assert {"instances", "history", "signals", "workers", "duties"} <= set(tables)
            view.rows("UPDATE t_wiped.duties SET ran_at = clock_timestamp() RETURNING name")
            wipe(app)
            left = {name for name in tables if view.rows(f"SELECT count(*) FROM t_wiped.{name}") != [(0,)]}
            assert left - KEPT == {"duties"}
            assert view.rows("SELECT count(*) FROM t_wiped.duties WHERE ran_at > '-infinity'") == [(0,)]


def test_somebodys_data_is_neither_wiped_nor_taken_over(app: Durable, parked: Any, view: View, connection: Any) -> None:
    connection.execute(f"COMMENT ON SCHEMA {app.schema} IS NULL")
    parked.delay()
    other = Durable("other", dsn=app.database.dsn())
    with pytest.raises(DurableError, match=r"holds instances[\s\S]*on_schema"):
        wipe(app)
    with pytest.raises(DurableError, match="holds instances"), on_schema(other, app.schema):
        pass
    assert view.count("instances") == 1
    with pytest.raises(ValidationError), on_schema(other, "not a name"):
        pass
    other.close()


def test_a_schema_that_workers_serve_is_not_emptied(app: Durable, view: View, connection: Any) -> None:
    connection.execute(f"COMMENT ON SCHEMA {app.schema} IS NULL")
    connection.execute(
        f"INSERT INTO {app.schema}.workers (kind, name, host, boot_id, pid, command_pid, command_start, expires_at)"
        " VALUES ('worker', 'w', 'h', 'b', 1, 1, 's', clock_timestamp() + interval '1 minute')"
    )
    with pytest.raises(DurableError, match="has workers"):
        wipe(app)
