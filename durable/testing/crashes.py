"""crash_every_commit: run a scenario, die before and after each of its commits, recover, and end the same."""

from __future__ import annotations

import difflib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable.app import Durable
from durable.errors import DurableError
from durable.sql import Statements
from durable.storage import inspection, maintenance, testing, workers
from durable.storage.session import run, run_atomically
from durable.testing import journal, schemas, seams
from durable.testing.commits import CRASHED, Commits
from durable.testing.draining import drain
from durable.testing.forks import Ended, in_child
from durable.testing.picture import draw

Scenario = Callable[[Durable], Any]
_MOST_SHOWN = 3
"""Failures that are shown in full."""
_NOTICED = 10.0
"""Seconds in which a server notices that a process has died."""


@dataclass(frozen=True, slots=True)
class CrashReport:
    """What was tried: the scenario's commits, in order, and how many runs crashed at one."""

    commits: tuple[str, ...]
    runs: int

    def __repr__(self) -> str:
        return f"<CrashReport: {len(self.commits)} commits, {self.runs} crashes>"


def crash_every_commit(
    app: Durable, scenario: Scenario, *, timeout: float = 60.0, max_steps: int = 1000
) -> CrashReport:
    """Run a scenario once for every commit it makes and once more, dying just before and just after that commit.

    scenario   a function of the app: it produces, signals, drains ... and may assert. Everything left is drained
    timeout    seconds for one run
    max_steps  as in `drain`, for the drain at the end

    Each run begins on an empty schema, in a forked process that ends hard. Another process then takes back what the
    dead one held, as a reaper does, has the scenario go on (what it did itself and had committed is not repeated; what
    steps did is, if they run again), and drains. In the end every instance must have the same status, step, state,
    result and children as without a crash.

    Returns a report. Raises AssertionError that names the commits after which it was not so and shows the difference;
    also when the scenario fails or differs without any crash. Raises DurableError for a schema that holds somebody's
    data, and inside of `transaction`: it needs real commits.
    """
    if seams.pool_of(app).borrowed is not None:
        raise DurableError("crash_every_commit needs real commits; call it outside of durable.testing.transaction")
    schemas.prepare(app)
    dsn = app.dsn()
    with tempfile.TemporaryDirectory(prefix="durable-crash-") as folder:
        runs = _Runs(app, scenario, dsn, Path(folder), timeout, max_steps)
        report = runs.all()
    schemas.wipe(app)
    return report


class _Runs:
    """The runs of one scenario."""

    def __init__(
        self, app: Durable, scenario: Scenario, dsn: str, folder: Path, timeout: float, max_steps: int
    ) -> None:
        self._app = app
        self._scenario = scenario
        self._dsn = dsn
        self._folder = folder
        self._timeout = timeout
        self._max_steps = max_steps

    def all(self) -> CrashReport:
        """Run them all. Raises AssertionError."""
        labels, wanted = self._whole("first")
        again, found = self._whole("second")
        if (labels, wanted) != (again, found):
            difference = _difference(wanted, found) or _difference("\n".join(labels), "\n".join(again))
            raise AssertionError(
                "the scenario is not deterministic: two runs without any crash end differently. Random values, times "
                f"and ids do not belong into states, results or decisions here\n{difference}"
            )
        if not labels:
            raise AssertionError("the scenario commits nothing: there is no commit to crash at")
        failures = []
        for number, label in enumerate(labels, 1):
            for when in ("before", "after"):
                problem = self._crash(number, when, wanted)
                if problem is not None:
                    failures.append(f"crash {when} commit {number} of {len(labels)} ({label}):\n{problem}")
        if failures:
            shown = "\n\n".join(failures[:_MOST_SHOWN])
            more = len(failures) - _MOST_SHOWN
            tail = f"\n\n... and {more} more" if more > 0 else ""
            raise AssertionError(f"{len(failures)} of {2 * len(labels)} crashes change the outcome\n\n{shown}{tail}")
        return CrashReport(tuple(labels), 2 * len(labels))

    def _whole(self, which: str) -> tuple[list[str], str]:
        ended = in_child(lambda: self._run(self._folder / which), self._timeout)
        if ended.value is None:
            raise AssertionError(f"the scenario fails without any crash, in its {which} run:\n{_trouble(ended)}")
        return ended.value  # type: ignore[no-any-return]

    def _crash(self, number: int, when: str, wanted: str) -> str | None:
        """Crash at a commit and recover; return what is wrong, if anything is."""
        path = self._folder / f"{number}-{when}"
        ended = in_child(lambda: self._run(path, (number, when)), self._timeout)
        if ended.code != CRASHED:
            if ended.value is not None:
                return "this commit did not come: the scenario is not deterministic"
            return f"the scenario failed before it came to that commit:\n{_trouble(ended)}"
        ended = in_child(lambda: self._recover(path), self._timeout)
        path.unlink()
        if ended.value is None:
            return f"the scenario failed when it went on after the crash:\n{_trouble(ended)}"
        return _difference(wanted, ended.value)

    # In the child

    def _run(self, path: Path, die_at: tuple[int, str] | None = None) -> tuple[list[str], str]:
        """Run the scenario on an empty schema and drain; return its commits and a picture of the end."""
        seams.pin_dsn(self._app, self._dsn)
        run(seams.stand_connected(self._app, "test"), self._app.sql, testing.wipe())
        kept = journal.Journal(path, Commits.die)
        names = {self._app.sql[name]: name for name in Statements.names()}
        commits = Commits(names, kept, die_at)
        commits.wrap_psycopg()
        self._play(kept)
        return commits.labels, self._picture()

    def _recover(self, path: Path) -> str:
        """Take back what the dead process held, go on with the scenario and drain; return a picture of the end."""
        app = self._app
        seams.pin_dsn(app, self._dsn)
        connection = seams.stand_connected(app, "test")
        # Until the server has noticed the death, rows are locked by transactions that it has yet to undo.
        until = time.monotonic() + _NOTICED
        while run(connection, app.sql, maintenance.table_holders(app.schema)) and time.monotonic() < until:
            time.sleep(0.005)
        dead = [process.id for process in run(connection, app.sql, inspection.processes())]
        run(connection, app.sql, workers.bury(dead))
        for worker in dead:
            reclaiming = workers.reclaim(worker, None, app.conf.max_crashes, "its process crashed as told")
            run_atomically(connection, app.sql, reclaiming)
        self._play(journal.Journal(path, Commits.die))
        return self._picture()

    def _play(self, kept: journal.Journal) -> None:
        journal.keep(kept)
        seams.set_writer(self._app, lambda pool, sql: journal.JournalingWriter(pool, sql, kept))
        self._scenario(self._app)
        drain(self._app, max_steps=self._max_steps)

    def _picture(self) -> str:
        with seams.connected(self._app, "test") as connection:
            return draw(self._app, run(connection, self._app.sql, testing.picture()))


def _trouble(ended: Ended) -> str:
    return ended.trouble or f"its process ended with code {ended.code} and said nothing"


def _difference(wanted: str, found: str) -> str | None:
    if wanted == found:
        return None
    lines = difflib.unified_diff(wanted.splitlines(), found.splitlines(), "without a crash", "now", lineterm="", n=3)
    return "\n".join(lines)
