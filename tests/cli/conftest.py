"""Running commands: in this process where that is enough, as real processes where the process is the subject."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from durable_cli.main import cli

NO_SERVER = "postgresql://somebody:sesame@127.0.0.1:1/nowhere"
"""A DSN nobody listens on, with a password to look for."""


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its one document."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Its one line of error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("Error: "), self.err
        return lines[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of commands in this process; what they import and log to is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("DURABLE_APP", "DURABLE_DSN"):
        monkeypatch.delenv(name, raising=False)
    before, level = set(sys.modules), logging.getLogger("durable").level
    yield tmp_path
    logging.getLogger("durable").setLevel(level)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def durable(here: Path) -> Callable[..., Ran]:
    """Run a command in this process, in the test's folder."""

    def run(*arguments: str, stdin: str | None = None, **environment: str) -> Ran:
        result = CliRunner().invoke(cli, list(arguments), input=stdin, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Ran]:
    """Run a command as a process, to its end."""

    def run(*arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "durable_cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def shop(tasks_module: Callable[[str], Path], here: Path) -> Path:
    """A folder with a tasks.py of three tasks, on a migrated schema of its own."""
    return tasks_module("""
        app.migrate()
        app.close()

        @app.task
        def add(a, b=1):
            return a + b

        @app.task(queue="checkout", max_attempts=1)
        def fail(text):
            raise ValueError(text)

        @app.task
        def say(value):
            return value
    """)


def set_status(connection: psycopg.Connection[Any], schema: str, instance: int, status: str) -> None:
    """Put an instance into a status that a worker would bring it to."""
    worker = "1" if status == "executing" else "NULL"
    connection.execute(
        f"UPDATE {schema}.instances SET status = %s, worker_id = {worker} WHERE id = %s", (status, instance)
    )
