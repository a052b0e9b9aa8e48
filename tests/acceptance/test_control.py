"""Ending what runs: steps that ask whether they are wanted, and steps that are killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until

TASKS = """
    import os, time

    def started(path):
        with open(path, "a") as file: file.write(f"{os.getpid()}\\n")

    @app.task(name="cooperate", bind=True)
    def cooperate(ctx, path):
        started(path)
        while not ctx.cancel_requested: time.sleep(0.01)
        started(path)
"""


@pytest.fixture
def tasks(app: Durable, tasks_module: Callable[[str], Path]) -> dict[str, Any]:
    """The tasks by name, as a producer sees them; tasks.py is written for the workers."""
    folder = tasks_module(TASKS)
    namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
    body = (folder / "tasks.py").read_text().split("\n", 2)[2]
    exec(compile(body, "tasks.py", "exec"), namespace)  # the same text, registered with this test's app
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
