"""Ending what runs: steps that ask whether they are wanted, and steps that are killed."""

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

TASKS = """
    import ctypes, hashlib, os, time
    from pathlib import Path
    from durable import Done, Machine, ScheduleChildren, step

    def started(path):
        with open(path, "a") as file: file.write(f"{os.getpid()}\\n")

    @app.task(name="cooperate", bind=True)
    def cooperate(ctx, path):
        started(path)
        while not ctx.cancel_requested: time.sleep(0.01)
        started(path)

    @app.task(name="sleep")
    def sleep(path):
        started(path)
        time.sleep(600)

    @app.task(name="burn")
    def burn(path):
        started(path)
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2**31 - 1)

    @app.task(name="hold_gil")
    def hold_gil(path):
        started(path)
        ctypes.PyDLL(None).sleep(600)

    @app.task(name="wait_for")
    def wait_for(path, go):
        started(path)
        while not Path(go).exists(): time.sleep(0.01)
        return os.getpid()

    @app.task(name="add")
    def add(n): return n + 1

    @app.machine(name="family")
    class Family(Machine):
        @step(initial=True)
        def start(self, ctx):
            children = [(sleep, {"args": (ctx.state["path"],)}), (add, {"args": (1,), "schedule_in": 3600})]
            return ScheduleChildren(children, then=self.end)

        @step
        def end(self, ctx): return Done()
"""


@pytest.fixture
def tasks(app: Durable, tasks_module: Callable[[str], Path]) -> dict[str, Any]:
    """The tasks by name, as a producer sees them; tasks.py is written for the workers."""
    folder = tasks_module(TASKS)
    namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
    body = (folder / "tasks.py").read_text().split("\n", 2)[2]
    exec(
        compile(body, "tasks.py", "exec", dont_inherit=True), namespace
    )  # the same text, registered with this test's app
    return {task.name: task for task in app.tasks.values()}


def pids(path: Path) -> list[int]:
    """Processes that have entered the step that writes there, in order."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_a_long_step_that_looks_leaves_when_it_is_cancelled(
    tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    path = tmp_path / "started"
    durable_worker("worker", "-c", "1")
    result = tasks["cooperate"].delay(str(path))
    wait_until(lambda: pids(path), what="the step")
    assert result.cancel("not needed")

    wait_until(result.ready, what="its end")
    assert (result.status, result.error.message) == ("cancelled", "not needed")
    assert len(pids(path)) == 2, "it left by itself"


@pytest.mark.parametrize("kind", ["sleep", "burn", "hold_gil"])
def test_a_terminated_step_ends_within_seconds_and_its_neighbour_lives_on(
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    schema: str,
    tmp_path: Path,
    kind: str,
) -> None:
    path, other, go = (tmp_path / name for name in ("started", "other", "go"))
    worker = durable_worker("worker", "-c", "2", DURABLE_POLL_INTERVAL="3600")
    neighbour = tasks["wait_for"].delay(str(other), str(go))
    wait_until(lambda: pids(other), what="the neighbour")
    result = tasks[kind].delay(str(path))
    wait_until(lambda: pids(path), what="the step")

    assert result.cancel("takes too long", terminate=True)
    wait_until(result.ready, what="its end, long before the step's own")
    assert (result.status, result.error.error_type, result.error.message) == (
        "cancelled",
        "Cancelled",
        "takes too long",
    )
    assert not result.cancel(terminate=True)
    go.touch()
    assert neighbour.get(timeout=20) == pids(other)[0]
    assert len(pids(path)) == 1, "it was not run again"
    assert tasks["add"].delay(1).get(timeout=20) == 2
    crashes = connection.execute(f"SELECT count(*) FROM {schema}.history WHERE crashes > 0").fetchone()
    assert crashes == (0,)
    assert worker.output().count("SIGKILL") == 1


def test_what_was_buffered_behind_it_is_run_by_others_and_counts_no_crash(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    schema: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "started"
    with app.batch():
        first = tasks["hold_gil"].delay(str(path))
        behind = [tasks["add"].delay(n) for n in range(8)]
    durable_worker("worker", "-c", "1", "--prefetch", "10")
    wait_until(lambda: pids(path), what="the step")
    held = connection.execute(f"SELECT count(*) FROM {schema}.instances WHERE status = 'executing'").fetchone()
    assert held == (9,), "while it holds the GIL, its process can't give them back"

    assert app.cancel(first.id, terminate=True)
    assert [result.get(timeout=20) for result in behind] == list(range(1, 9))
    assert first.status == "cancelled"
    rows = connection.execute(f"SELECT DISTINCT crashes, attempt, token FROM {schema}.history WHERE status = 'done'")
    assert rows.fetchall() == [(0, 0, 2)]


def test_a_buffered_row_that_is_terminated_kills_nobody(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    path = tmp_path / "started"
    with app.batch():
        first = tasks["hold_gil"].delay(str(path))
        behind = tasks["sleep"].delay(str(path))
    worker = durable_worker("worker", "-c", "1", "--prefetch", "10")
    wait_until(lambda: pids(path), what="the step")
    assert behind.status == "executing"
    assert behind.cancel(terminate=True)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 1, what="a few looks of the agent")
    assert first.status == "executing"
    assert "SIGKILL" not in worker.output()

    first.cancel(terminate=True)
    wait_until(behind.ready, what="the end of both")
    assert (first.status, behind.status) == ("cancelled", "cancelled")
    assert len(pids(path)) == 1


def test_the_poll_finds_what_no_notification_told(
    tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    path = tmp_path / "started"
    durable_worker("worker", "-c", "1", DURABLE_POOLER="true")
    result = tasks["sleep"].delay(str(path))
    wait_until(lambda: pids(path), what="the step")
    assert result.cancel(terminate=True)
    wait_until(result.ready, what="its end")
    assert result.status == "cancelled"


def test_a_cascade_terminates_the_tree(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    path = tmp_path / "started"
    durable_worker("worker", "-c", "1")
    parent = app.insert("family", state={"path": str(path)})
    wait_until(lambda: pids(path), what="the child's step")
    assert parent.cancel(cascade=True, terminate=True)
    wait_until(lambda: [child.status for child in parent.children] == ["cancelled"] * 2, 10, "the end of the children")
    assert parent.status == "cancelled"


def test_the_command_line_terminates_too(
    tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    path = tmp_path / "started"
    durable_worker("worker", "-c", "1")
    result = tasks["sleep"].delay(str(path))
    wait_until(lambda: pids(path), what="the step")
    cancel = durable_worker("cancel", str(result.id), "--terminate", "--reason", "too long")
    assert cancel.process.wait(20) == 0
    assert cancel.output() == f"{result.id}: is killed, and then cancelled\n"
    wait_until(result.ready, what="its end")
    assert (result.status, result.error.message) == ("cancelled", "too long")
