"""Every event of the table comes from real processes: none can be declared and then forgotten."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import RateLimit, telemetry
from durable.storage import limits
from durable.storage.session import connect, run_atomically
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.test_docs import load

BODY = """
import json, os, pathlib, time
from durable import Await, ConcurrencyLimit, Done, Machine, RateLimit, step, telemetry
from durable.context import current
from durable.limit_rows import LimitRows
import psycopg

app.limit_rows = LimitRows({"slow": RateLimit(2, 1.0, burst=1)}, {"gate": ConcurrencyLimit(1)})
log = pathlib.Path(__file__).with_name("events.txt")

def write(event, measurements, metadata):
    with log.open("a") as file:
        file.write(json.dumps([event, list(measurements), list(metadata), dict(metadata)]) + "\\n")

for event in telemetry.EVENTS:
    telemetry.attach(event, write)

@app.task
def work(seconds=0.0):
    time.sleep(seconds)

@app.task
def hold(file):
    while not log.with_name(file).exists():
        time.sleep(0.02)

@app.task
def robbed():
    # As if somebody else had claimed it meanwhile: the outcome of the first run is stale.
    ctx = current()
    with psycopg.connect(app.dsn(), autocommit=True) as connection:
        connection.execute(f"UPDATE {app.schema}.instances SET token = token + 1 WHERE id = %s AND token = 1", [ctx.id])

@app.task
def signalled():
    app.signal(current().id, "late")

@app.machine
class Sleeper(Machine):
    @step(initial=True)
    def park(self, ctx):
        return Await("go", then=self.end, timeout=0.05)

    @step
    def end(self, ctx):
        return Done()
"""


@pytest.fixture
def tasks(tasks_module: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    tasks = load(tasks_module(BODY) / "tasks.py")
    telemetry.attached.clear()  # what this process does is no part of the run
    tasks.app.migrate()
    yield tasks
    tasks.app.close()
    del sys.modules["tasks"]


def emitted() -> set[str]:
    """Names of events that the package's own code emits, as it is written."""
    names = set()
    for path in (Path(telemetry.__file__).parent / "runtime").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("telemetry.emit"):
                names.add(ast.literal_eval(node.args[0]))
    return names


def test_the_code_emits_the_events_of_the_table_and_no_others() -> None:
    assert emitted() == set(telemetry.EVENTS)


def test_every_event_is_heard_from_real_processes(
    tasks: Any, tmp_path: Path, database: str, durable_worker: Callable[..., Command], connection: Any
) -> None:
    app, work = tasks.app, tasks.work

    def heard(name: str) -> list[Any]:
        file = tmp_path / "events.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event[0] == name]

    def wait_for(name: str) -> None:
        wait_until(lambda: heard(name), 20, name)

    with closing(connect(database, "by hand")) as by_hand:
        run_atomically(by_hand, app.sql, limits.put({("rate", "gone"): RateLimit(1)}, pin=True))
        work.apply_async(rate_limit="gone")
        run_atomically(by_hand, app.sql, limits.drop("rate", "gone"))

    worker = durable_worker("worker", "-c", "2")
    durable_worker("beat", wait=False)
    for name in ("rate_limit.unknown", "gc.swept", "scheduler.saturation"):
        wait_for(name)

    tasks.Sleeper.delay()
    tasks.robbed.delay()
    tasks.signalled.delay()
    for name in ("signal.unread", "await.timeout", "outcome.stale", "step.stop", "pick.stop"):
        wait_for(name)

    with psycopg.connect(database) as other, other.transaction():
        other.execute(app.sql["try_names"], {"names": ["rate slow"]})  # as another claim would
        for _ in range(4):
            work.apply_async(rate_limit="slow")
        wait_for("rate_limit.contended")
    wait_for("rate_limit.throttled")

    def running(key: str) -> bool:
        sql = f"SELECT FROM {app.schema}.instances WHERE status = 'executing' AND concurrency_key = %s"
        return bool(connection.execute(sql, [key]).fetchall())

    for key, event in (("one", "concurrency.contended"), ("gate:one", "concurrency.throttled")):
        tasks.hold.apply_async(args=(event,), concurrency_key=key)
        wait_until(lambda key=key: running(key), what=key)  # type: ignore[misc]
        work.apply_async(concurrency_key=key)
        wait_for(event)
        (tmp_path / event).touch()

    work.apply_async(args=(30.0,), concurrency_key="dies")
    wait_until(lambda: running("dies"))
    # First one process is gone, which its agent sees to; then the whole command, which the reaper sees to.
    (holder,) = connection.execute(
        f"SELECT w.pid FROM {app.schema}.workers AS w JOIN {app.schema}.instances AS i ON i.worker_id = w.id"
        " WHERE i.concurrency_key = 'dies'"
    ).fetchone()
    os.kill(holder, signal.SIGKILL)
    wait_for("scheduler.reclaimed")
    wait_until(lambda: running("dies"), 20)
    other_command = durable_worker("worker", "-c", "1")
    assert other_command.stop() == 0
    wait_for("scheduler.drain")
    for pid in [worker.pid, *worker.children("durable:")]:
        os.kill(pid, signal.SIGKILL)
    wait_for("reaper.reaped")

    everything = [json.loads(line) for line in (tmp_path / "events.txt").read_text().splitlines()]
    assert {name for name, *_ in everything} == set(telemetry.EVENTS)
    for name, measurements, metadata, _ in everything:
        assert (tuple(measurements), tuple(metadata)) == telemetry.EVENTS[name][:2], name
