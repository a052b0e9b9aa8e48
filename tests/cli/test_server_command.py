"""`durable server`, on an embedded server of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from durable.embedded import Server
from tests.cli.conftest import Ran
from tests.fix_db import wait_until


@pytest.fixture
def home() -> Iterator[Path]:
    """Not below tmp_path: root's is closed to the account that Postgres runs as."""
    folder = Path(tempfile.mkdtemp(prefix="durable-cli-"))
    folder.chmod(0o755)
    yield folder / "pg"
    if (folder / "pg").exists():
        Server(folder / "pg").stop("immediate")
    shutil.rmtree(folder)


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    return {"DURABLE_HOME": str(home), "DURABLE_DSN": ""}


def test_start_holds_it_until_it_is_stopped(process: Callable[..., Ran], environment: dict[str, str]) -> None:
    before = process("server", "status", "--json", env=environment)
    assert before.code == 0
    assert before.json["running"] is False
    assert process("server", "stop", env=environment).out == "it was not running\n"

    start = subprocess.Popen(
        [sys.executable, "-m", "durable_cli", "server", "start", "--json"],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert start.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            line = start.stdout.readline()
            assert line, start.communicate()
            lines.append(line)
        told = json.loads("".join(lines))
        with psycopg.connect(told["dsn"]) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)

        running = process("server", "status", "--json", env=environment).json
        assert (running["running"], running["pid"], running["holders"]) == (True, told["pid"], True)
        assert running["dsn"] == told["dsn"]
        assert "running" in process("server", "status", env=environment).out

        ran = process("server", "psql", "-Atc", "SELECT 40 + 2", env=environment)
        assert (ran.code, ran.out) == (0, "42\n")
        assert process("server", "psql", "-c", "SELECT nonsense", env=environment).code == 1

        # No DSN anywhere: the embedded server is it. Looking at a schema does not make it, migrating does.
        assert process("list", "--schema", "shop", env=environment).code == 3
        assert process("migrate", "--schema", "shop", env=environment).code == 0
        assert process("list", "--schema", "shop", "--json", env=environment).json == []

        stopped = process("server", "stop", env=environment)
        assert (stopped.code, stopped.out) == (0, "stopped\n")
        assert "Warning: other processes use the server" in stopped.err
        _, said = start.communicate(timeout=20)
        assert start.returncode == 1
        assert said == "Error: the embedded server was stopped\n"
    finally:
        start.kill()
        start.communicate()


def test_a_worker_without_dsn_starts_the_server_and_makes_its_schema(
    durable_worker: Callable[..., object], environment: dict[str, str], tmp_path: Path, process: Callable[..., Ran]
) -> None:
    (tmp_path / "tasks.py").write_text(
        "from durable import Durable\napp = Durable('shop')\n@app.task\ndef add(a, b):\n    return a + b\n"
    )
    worker = durable_worker("worker", "-c", "1", **environment)
    wait_until(lambda: "database  embedded" in worker.output(), what="the banner")  # type: ignore[attr-defined]
    ran = process("call", "tasks.add", "--args", "[40, 2]", "--wait", "20", env=environment)
    assert (ran.code, ran.out) == (0, "42\n")
    assert process("server", "status", "--json", env=environment).json["holders"] is True
    assert worker.stop(signal.SIGTERM) == 0  # type: ignore[attr-defined]
