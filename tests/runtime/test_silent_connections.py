"""Processes whose connections stay open and never answer: each replaces them, and SIGTERM ends each in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.fix_proxy import CountingProxy

TASKS = """
import os, time
from durable import Durable
app = Durable('test', dsn={dsn!r}, schema={schema!r})

@app.task(name="one")
def one():
    return 1

@app.task(name="write", bind=True)
def write(ctx):
    ctx.connection.execute("INSERT INTO {schema}.written VALUES (1)")
    with open("begun", "a") as file: file.write("x")
    while not os.path.exists("go"): time.sleep(0.01)
"""


@pytest.fixture
def behind(
    app: Durable, counting_proxy: CountingProxy, tmp_path: Path, durable_worker: Callable[..., Command]
) -> Callable[..., Command]:
    """Start a command that reaches the database through the proxy."""

    def start(*arguments: str) -> Command:
        (tmp_path / "tasks.py").write_text(TASKS.format(dsn=counting_proxy.dsn, schema=app.schema))
        return durable_worker(*arguments)

    return start


def leases(connection: psycopg.Connection[Any], app: Durable, kind: str) -> int:
    query = f"SELECT count(*) FROM {app.schema}.workers WHERE kind = '{kind}' AND dead_at IS NULL"
    (count,) = connection.execute(query).fetchone() or (0,)
    return int(count)


def test_worker_replaces_silent_connections(
    app: Durable,
    behind: Callable[..., Command],
    counting_proxy: CountingProxy,
    connection: psycopg.Connection[Any],
) -> None:
    one = app.task(name="one")(lambda: 1)
    worker = behind("worker", "-c", "2")
    assert one.delay().get(timeout=20) == 1
    wait_until(lambda: leases(connection, app, "worker") == 2, what="both leases")
    before = worker.children()
    wait_until(lambda: counting_proxy.open >= 4, what="two processes, an agent and its listener")
    counting_proxy.silence()
    results = [one.delay() for _ in range(4)]
    assert [result.get(timeout=40) for result in results] == [1] * 4
    assert worker.children() == before
    assert worker.stop() == 0


def test_silent_step_connection_repeats_the_step(
    app: Durable,
    behind: Callable[..., Command],
    counting_proxy: CountingProxy,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    connection.execute(f"CREATE TABLE {app.schema}.written (n int)")
    try:
        write = app.task(name="write")(lambda: None)
        worker = behind("worker", "-c", "1")
        result = write.delay()
        wait_until((tmp_path / "begun").exists, what="the step")
        counting_proxy.silence()
        (tmp_path / "go").touch()
        assert result.get(timeout=60) is None
        assert connection.execute(f"SELECT count(*) FROM {app.schema}.written").fetchone() == (1,)
        assert worker.stop() == 0
    finally:
        connection.execute(f"DROP TABLE {app.schema}.written")


@pytest.mark.parametrize(
    "command", [("beat",), ("worker", "-c", "1", "-B", "--drain-timeout", "2")], ids=["beat", "worker"]
)
def test_sigterm_ends_a_silenced_command(
    app: Durable,
    behind: Callable[..., Command],
    counting_proxy: CountingProxy,
    connection: psycopg.Connection[Any],
    command: tuple[str, ...],
) -> None:
    started = behind(*command)
    wait_until(lambda: leases(connection, app, "beat") == 1, what="the beat's lease")
    counting_proxy.silence(new=True)
    began = time.monotonic()
    assert started.stop(seconds=30) == 0
    assert time.monotonic() - began < 15
