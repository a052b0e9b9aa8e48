"""Producers that go on whatever happens and keep what they were told; and what must be true of it in the end."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from durable import Durable
from durable.errors import DatabaseUnavailableError
from tests.fix_db import wait_until

SCHEMA = "around"
TASKS = """
import os, time
from durable import Durable
app = Durable("around", dsn={dsn!r}, schema={schema!r}, {settings})

@app.task(name="work")
def work(n):
    time.sleep(0.003)
    with open(os.environ["EFFECTS"], "a") as file: file.write(f"{{n}}\\n")
    return n
"""
HANGS = 30.0
"""Seconds after which a call of a producer is said to hang."""


class Call(NamedTuple):
    """One call of a producer: the id it was given or the error it met, and how long that took."""

    number: int
    id: int | None
    error: BaseException | None
    seconds: float


class Load:
    """Two threads of one producer process, each with a call after the other.

    dsn       where they produce, and workers that run the tasks.py in `folder`; both with these settings of the app
    admin     where the test looks at rows, whatever befalls the other way
    timeout   their connect_timeout
    more      what tasks.py has besides the task `work`
    """

    def __init__(
        self, dsn: str, admin: str, folder: Path, *, timeout: float = 2.0, more: str = "", **settings: Any
    ) -> None:
        self.app = Durable("around", dsn=dsn, schema=SCHEMA, connect_timeout=timeout, pool_size=2, **settings)
        self.app.task(name="work")(_never)
        self.effects = folder / "effects"
        self.calls: list[Call] = []
        self._admin = admin
        self._timeout = timeout
        self._stop = threading.Event()
        written = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        (folder / "tasks.py").write_text(TASKS.format(dsn=dsn, schema=SCHEMA, settings=written) + more)
        self.environment = {"EFFECTS": str(self.effects)}
        self._threads = [threading.Thread(target=self._produce, args=(first,), daemon=True) for first in (0, 1)]

    def start(self) -> None:
        """Begin, and wait until something has been acknowledged."""
        for thread in self._threads:
            thread.start()
        self.progress(20)

    @property
    def acknowledged(self) -> dict[int, int]:
        """Id -> number of each call that was told of its commit."""
        return {call.id: call.number for call in list(self.calls) if call.id is not None}

    @property
    def errors(self) -> list[BaseException]:
        """What the other calls met."""
        return [call.error for call in list(self.calls) if call.error is not None]

    def progress(self, calls: int = 50) -> None:
        """Wait until so many more calls have been acknowledged."""
        enough = len(self.acknowledged) + calls
        wait_until(lambda: len(self.acknowledged) >= enough, 40, f"{calls} more acknowledged calls")

    def finished(self, jobs: int = 50) -> None:
        """Wait until workers have finished so many more."""
        enough = self._count("history") + jobs
        wait_until(lambda: self._count("history") >= enough, 40, f"{jobs} more finished jobs")

    def stop(self) -> None:
        """End the producers; none of them may hang."""
        self._stop.set()
        for thread in self._threads:
            thread.join(HANGS)
        assert not any(thread.is_alive() for thread in self._threads), "a producer hangs"
        self.app.close()

    def abandon(self) -> None:
        """End the producers, if they still run, and ask nothing."""
        self._stop.set()
        self.app.close()

    def settle(self, longest: float | None = None) -> None:
        """Stop, wait until all is finished, and see that everything was told the truth.

        longest  seconds that a call may have taken; else its wait for a connection, and a look at why there is none
        """
        self.stop()
        wait_until(lambda: self._count("instances") == 0, 60, "the end of all work")
        rows = self._rows("SELECT id, status, version, result, machine FROM around.instance_view")
        there = {row[0]: row[1:4] for row in rows}
        assert len(there) == len(rows)
        for number, n in self.acknowledged.items():
            assert there[number] == ("done", 1, n)
        assert {row[1:3] for row in rows if row[4] == "work"} == {("done", 1)}
        assert set(self.acknowledged.values()) <= {int(line) for line in self.effects.read_text().split()}
        slowest = max(self.calls, key=lambda call: call.seconds)
        assert slowest.seconds < (longest or self._timeout + 3.0), slowest
        for error in self.errors:
            assert isinstance(error, DatabaseUnavailableError), repr(error)
            assert re.fullmatch(r"(?s).+: .+; .+", str(error)), error

    def said(self, text: str) -> int:
        """Count the producers' errors that hold a text."""
        return sum(text in str(error) for error in self.errors)

    def _count(self, table: str) -> int:
        return int(self._rows(f"SELECT count(*) FROM {SCHEMA}.{table}")[0][0])

    def _rows(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self._admin, autocommit=True) as connection:
            return connection.execute(statement).fetchall()

    def _produce(self, first: int) -> None:
        number = first
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                instance: int | None = self.app.insert("work", args=(number,)).id
                error: BaseException | None = None
            except Exception as caught:
                instance, error = None, caught
            self.calls.append(Call(number, instance, error, time.monotonic() - began))
            number += 2
            time.sleep(0.005)


def _never(n: int) -> int:
    raise AssertionError("runs on workers only")
