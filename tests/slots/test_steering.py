"""What else holds for many slots: ctx.connection, pauses, replacement, concurrency, what inspect and events tell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from tests.fix_db import wait_until
from tests.slots.conftest import POOLS, START, WAITS, lines


def durable(folder: Path, *arguments: str) -> Any:
    """What a command answers with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "durable_cli", *arguments, "--json"],
        cwd=folder, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture
def ledger(app: Durable, connection: psycopg.Connection[Any]) -> Iterator[str]:
    name = f"{app.schema}.ledger"
    connection.execute(f"CREATE TABLE {name} (id bigint)")
    yield name
    connection.execute(f"DROP TABLE {name}")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ["write", "awrite"])
def test_more_steps_than_connections_write_exactly_once_with_their_outcome(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: START,
    connection: psycopg.Connection[Any],
    ledger: str,
    pool: str,
    name: str,
) -> None:
    with app.batch():
        results = [tasks[name].delay(ledger) for _ in range(30)]
        failing = [tasks[name].delay(ledger, True) for _ in range(10)]
    durable_worker("worker", "-P", pool, "-c", "20")
    for result in results + failing:
        result.get(timeout=30)
    written = connection.execute(f"SELECT id FROM {ledger} ORDER BY id").fetchall()
    assert [row[0] for row in written] == sorted(result.id for result in results + failing)
    assert {result.attempts for result in results} == {1}
    assert {result.attempts for result in failing} == {2}
    sessions = connection.execute(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE application_name LIKE 'durable test step default%%' AND datname = current_database()"
    ).fetchone()
    assert sessions is not None
    assert sessions[0] <= 4


@pytest.mark.parametrize("pool", POOLS)
def test_of_a_paused_queue_no_step_begins(
    app: Durable, tasks: dict[str, Any], durable_worker: START, tmp_path: Path, pool: str
) -> None:
    durable_worker("worker", "-P", pool, "-c", "4")
    started, go = tmp_path / "started", tmp_path / "go"
    name = WAITS[pool]
    running = tasks[name].delay(str(started), str(go))
    wait_until(lambda: lines(started))
    app.pause("default", "a look")
    waiting = tasks["add"].delay(1)
    go.touch()
    assert running.get(timeout=20)
    assert waiting.status == "runnable"
    app.resume("default")
    assert waiting.get(timeout=20) == 2


@pytest.mark.parametrize("pool", POOLS)
def test_a_process_that_has_done_its_share_ends_after_its_steps_and_its_successor_does_not_wait_for_that(
    app: Durable, tasks: dict[str, Any], durable_worker: START, tmp_path: Path, pool: str
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "4", "--max-tasks-per-child", "5")
    started, go = tmp_path / "started", tmp_path / "go"
    long = tasks["await"].delay(str(started), str(go))
    wait_until(lambda: lines(started))
    assert [tasks["add"].delay(n).get(timeout=20) for n in range(30)] == list(range(1, 31))
    assert lines(started)[0] in map(str, worker.children("durable:default"))
    go.touch()
    assert str(long.get(timeout=20)) == lines(started)[0]
    wait_until(lambda: lines(started)[0] not in map(str, worker.children("durable:default")))
    assert long.attempts == 1


@pytest.mark.parametrize("pool", POOLS)
def test_the_concurrency_of_a_queue_is_that_of_its_slots(
    app: Durable, tasks: dict[str, Any], durable_worker: START, tmp_path: Path, pool: str
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "2")
    started, go = tmp_path / "started", tmp_path / "go"
    name = WAITS[pool]
    results = [tasks[name].delay(str(started), str(go)) for _ in range(8)]
    wait_until(lambda: len(lines(started)) == 2)
    durable(tmp_path, "queues", "set", "default", "--concurrency", "5")
    wait_until(lambda: len(lines(started)) == 5)
    durable(tmp_path, "queues", "set", "default", "--concurrency", "1")
    wait_until(lambda: "a concurrency of 1 instead of 5" in worker.output())
    go.touch()
    assert len({result.get(timeout=20) for result in results}) == 1


def test_inspect_and_workers_know_every_step_that_runs(
    app: Durable, tasks: dict[str, Any], durable_worker: START, tmp_path: Path
) -> None:
    durable_worker("worker", "-P", "asyncio", "-c", "30")
    started, go = tmp_path / "started", tmp_path / "go"
    results = [tasks["await"].delay(str(started), str(go)) for _ in range(30)]
    wait_until(lambda: len(lines(started)) == 30)
    assert {entry["id"] for entry in durable(tmp_path, "inspect", "active")} == {result.id for result in results}
    assert [(entry["slots"], entry["busy"]) for entry in durable(tmp_path, "workers")] == [(30, 30)]
    go.touch()
    for result in results:
        result.get(timeout=20)
    wait_until(lambda: durable(tmp_path, "inspect", "active") == [])


def test_autoscale_is_refused_with_a_reason(durable_worker: START, tasks: dict[str, Any]) -> None:
    for pool in POOLS:
        worker = durable_worker("worker", "-P", pool, "--autoscale", "1,4", wait=False)
        assert worker.process.wait(20) == 2
        assert "give -c the most" in worker.output()
