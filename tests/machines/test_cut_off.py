"""What the package reads and writes for a step may be cut off, or find no room: that is no failure of the step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from tests.fix_app import Command
from tests.test_docs import load

# Each of these reads blocks on a lock; the session that waits for it is ended by the server, once.
TASKS = """
    import threading
    import psycopg
    from durable import Done, Machine, Next, RateLimit, ScheduleChildren, step
    from durable.limit_rows import LimitRows

    app.limit_rows = LimitRows({"mail": RateLimit(100, 1.0)}, {})

    @app.task(name="leaf")
    def leaf(n): return n

    def hurt(table, like):
        with open("entered", "a") as file:
            file.write("x")
            if file.tell() > 1: return
        held = threading.Event()
        def run():
            with psycopg.connect(app.dsn()) as holder, psycopg.connect(app.dsn(), autocommit=True) as killer:
                holder.execute(f"LOCK TABLE {app.schema}.{table} IN ACCESS EXCLUSIVE MODE")
                held.set()
                while not killer.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock' AND query LIKE %s", [f"%{like}%"]).fetchall(): pass
        threading.Thread(target=run).start()
        held.wait()

    @app.machine(name="family")
    class Family(Machine):
        @step(initial=True)
        def out(self, ctx): return ScheduleChildren([(leaf, {"args": (n,)}) for n in range(3)], then=self.join)

        @step
        def join(self, ctx):
            hurt("history", "AS family")
            return Done(sum(child.result for child in ctx.children))

    @app.machine(name="limited")
    class Limited(Machine):
        @step(initial=True)
        def one(self, ctx):
            hurt("limits", "limits")
            return Next(self.two, rate_limit="mail")

        @step
        def two(self, ctx): return Done("two")

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def out(self, ctx):
            hurt("limits", "limits")
            return ScheduleChildren([(leaf, {"args": (7,), "rate_limit": "mail"})], then=self.join)

        @step
        def join(self, ctx): return Done(ctx.children[0].result)
"""


@pytest.mark.parametrize(("machine", "result"), [("family", 3), ("limited", "two"), ("parent", 7)])
def test_a_step_runs_again_when_a_read_of_ours_is_cut_off(
    machine: str,
    result: object,
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    folder = tasks_module(TASKS)
    module = load(folder / "tasks.py")
    module.app.migrate()
    try:
        durable_worker("worker", "-c", "1")
        assert module.app.insert(machine).get(timeout=60) == result
        # Once more, unless the read was repeated by itself because its lock timeout was over before the server cut it.
        assert (folder / "entered").read_text() in ("x", "xx")
    finally:
        module.app.close()
        del sys.modules["tasks"]


FULL = """
    from durable import Done, Machine, step

    @app.machine(name="writer")
    class Writer(Machine):
        @step(initial=True)
        def write(self, ctx):
            ctx.connection.execute(f"INSERT INTO {app.schema}.written VALUES (%s)", [ctx.attempt])
            return Done("written")
"""


def test_a_step_that_finds_the_servers_disk_full_runs_again(
    app: Durable,
    connection: psycopg.Connection[Any],
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The server refuses as it does when it can't extend a file, three times.
    connection.execute(f"""
        CREATE TABLE {app.schema}.written (attempt int);
        CREATE SEQUENCE {app.schema}.tries;
        CREATE FUNCTION {app.schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('{app.schema}.tries') <= 3 THEN
                RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
            END IF;
            RETURN new;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON {app.schema}.written FOR EACH ROW EXECUTE FUNCTION {app.schema}.refuse();
    """)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    module = load(tasks_module(FULL) / "tasks.py")
    try:
        durable_worker("worker", "-c", "1")
        assert module.app.insert("writer").get(timeout=60) == "written"
    finally:
        module.app.close()
        del sys.modules["tasks"]
    assert connection.execute(f"SELECT attempt FROM {app.schema}.written").fetchall() == [(0,)]
