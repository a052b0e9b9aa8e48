"""`durable inspect` while workers run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until

TASKS = """
    import os, time
    from pathlib import Path

    @app.task(name="wait_for")
    def wait_for(path, go):
        Path(path).write_text(str(os.getpid()))
        while not Path(go).exists(): time.sleep(0.01)
"""


def inspect(folder: Path, what: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "durable_cli", "inspect", what, "--json"],
        cwd=folder, env=os.environ, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_a_step_is_seen_at_once_where_it_runs_and_no_longer_when_it_has_ended(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    """With heartbeats half a minute apart: the agents answer the question."""
    folder = tasks_module(TASKS)
    slow = {"DURABLE_HEARTBEAT_INTERVAL": "30", "DURABLE_LEASE_TTL": "90"}
    durable_worker("worker", "-c", "2", "-n", "one", **slow)
    durable_worker("worker", "-c", "1", "-n", "two", **slow)
    began, go = tmp_path / "began", tmp_path / "go"

    @app.task(name="wait_for")
    def wait_for(path: str, go: str) -> None: ...

    wait_until(lambda: sum(len(row["queues"]) for row in inspect(folder, "registered")) == 2, what="two commands")
    result = wait_for.delay(str(began), str(go))
    wait_until(lambda: began.exists() and began.read_text(), what="the step")
    (active,) = inspect(folder, "active")
    assert (active["id"], active["task"], active["step"], active["queue"]) == (result.id, "wait_for", "run", "default")
    assert active["pid"] == int(began.read_text())
    assert active["host"] == os.uname().nodename
    assert inspect(folder, "reserved") == []
    assert [(row["worker"], row["tasks"]) for row in inspect(folder, "registered")] == [
        ("one", ["wait_for:1"]),
        ("two", ["wait_for:1"]),
    ]
    go.touch()
    result.get(timeout=20)
    assert inspect(folder, "active") == []
