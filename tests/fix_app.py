"""Apps on a clean schema, and real worker processes that are stopped when the test ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from durable import Durable
from tests.fix_db import wait_until

FAST_SETTINGS = {
    "DURABLE_LEASE_TTL": "3",
    "DURABLE_HEARTBEAT_INTERVAL": "0.5",
    "DURABLE_REAPER_INTERVAL": "0.5",
    "DURABLE_REAPER_GRACE": "0",
    "DURABLE_RECONCILE_INTERVAL": "2",
    "DURABLE_POLL_INTERVAL": "0.3",
}
"""Short times for worker processes, so that leases run out within a test."""


@pytest.fixture
def app(database: str, schema: str) -> Iterator[Durable]:
    """A migrated app without tasks."""
    app = Durable("test", dsn=database, schema=schema)
    app.migrate()
    yield app
    app.close()


@pytest.fixture
def tasks_module(tmp_path: Path, database: str, schema: str) -> Callable[[str], Path]:
    """Write a tasks.py with an app on this test's schema, and return its folder."""

    def write(body: str) -> Path:
        head = f"from durable import Durable\napp = Durable('test', dsn={database!r}, schema={schema!r})\n"
        (tmp_path / "tasks.py").write_text(head + textwrap.dedent(body))
        return tmp_path

    return write


class Command:
    """A running `durable` command.

    inside  what executes it in another surrounding, as the same process: `ip netns exec NAME`
    """

    def __init__(
        self, folder: Path, arguments: list[str], environment: dict[str, str], inside: Sequence[str] = ()
    ) -> None:
        self.log = folder / f"{arguments[0]}-{os.urandom(3).hex()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", "durable_cli", *arguments],
                cwd=folder,
                env={**os.environ, **FAST_SETTINGS, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def children(self, title: str = "durable:") -> list[int]:
        """Pids of its children whose process name starts with `title` (names are cut to 15 characters)."""
        found = []
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                text = status.read_text(errors="replace")
            except OSError:
                continue
            fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            if int(fields["PPid"]) == self.pid and fields["Name"].startswith(title) and fields["State"][0] != "Z":
                found.append(int(status.parent.name))
        return sorted(found)

    def started(self, title: str = "durable:", count: int = 1) -> list[int]:
        """Wait until it has that many such children (each names itself after its fork); return their pids."""
        wait_until(lambda: len(self.children(title)) == count, what=f"{count} children named {title}")
        return self.children(title)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """Send a signal, wait for the end, return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@pytest.fixture
def durable_worker(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start `durable` commands (`durable_worker("worker", "-c", "2")`) in the test's folder; stopped at its end."""
    commands: list[Command] = []

    def start(
        *arguments: str, folder: Path = tmp_path, wait: bool = True, inside: Sequence[str] = (), **environment: str
    ) -> Command:
        command = Command(folder, list(arguments), environment, inside)
        commands.append(command)
        if wait and arguments[0] == "worker":
            wait_until(
                lambda: command.children("durable:") or command.process.poll() is not None, what="a worker child"
            )
        return command

    yield start
    for command in commands:
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGQUIT)
    for command in commands:
        try:
            command.process.wait(10)
        except subprocess.TimeoutExpired:
            command.process.kill()
            command.process.wait()
