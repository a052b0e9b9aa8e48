"""Connections that are open when worker processes are forked: each is named by a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg

from durable import Durable
from durable.runtime.inherited import open_connections
from tests.fix_app import Command

TASKS = """
    import psycopg, psycopg_pool, sqlalchemy

    connection = psycopg.connect(app.dsn())
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://user:secret@host/db", creator=lambda: psycopg.connect(app.dsn())
    )
    engine.connect().close()
    unused = sqlalchemy.create_engine("postgresql+psycopg://user:secret@host/db")
    pool = psycopg_pool.ConnectionPool(app.dsn(), min_size=1, open=True, name="mine")
    pool.wait()
    closed = psycopg.connect(app.dsn())
    closed.close()

    @app.task(name="early")
    def early(): return 1

    early.delay()  # the app's own connections cross a fork safely
"""
WARNING = re.compile(r"\] (.*) was opened before the worker processes are forked")


def test_each_connection_made_at_import_is_named(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command]
) -> None:
    tasks_module(TASKS)
    worker = durable_worker("worker", "-c", "2")
    worker.started("durable:default", 2)
    found = WARNING.findall(worker.output())
    assert [re.sub(" to [^ ]*", "", text) for text in found] == [
        "a SQLAlchemy engine (connections open: 1) (tasks.engine)",
        "a psycopg pool 'mine', whose threads are not forked (tasks.pool)",
        "a psycopg connection (tasks.connection)",
    ]
    assert "@app.on_process_start" in worker.output()
    assert "secret" not in worker.output()


def test_a_worker_without_any_warns_of_none(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command]
) -> None:
    tasks_module("import sqlalchemy, psycopg_pool")
    worker = durable_worker("worker", "-c", "1", "-B")
    worker.started("durable:default")
    assert not WARNING.findall(worker.output())


SOCKETS = """
import asyncio, os, socket
from durable.runtime.inherited import open_connections

class Lazy:
    @property
    def __class__(self): raise AssertionError("it is looked at by isinstance")

lazy = Lazy()
loop = asyncio.new_event_loop()
listening = socket.create_server(("127.0.0.1", 0))
assert open_connections() == [], open_connections()
connected = socket.create_connection(listening.getsockname())
other = os.dup(connected.fileno())
address = "127.0.0.1:%d" % listening.getsockname()[1]
assert open_connections() == [f"a socket to {address} (__main__.connected)", f"a socket to {address}"]
connected.close()
os.close(other)
assert open_connections() == []
"""


def test_sockets_are_found_whoever_holds_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SOCKETS)
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)


def test_the_scan_leaves_connections_usable(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    assert any("psycopg connection" in text for text in open_connections())
    assert connection.execute("SELECT 1").fetchone() == (1,)
    assert os.fstat(connection.fileno())
