"""A worker in this process that moves only when told: the production engine, its loop turned by hand.

driver.drain()                      claim, run and commit until nothing is runnable
claimed = driver.claim()            one claim, its inbox loaded
commit = driver.execute(claimed)    the step has run, nothing is written
driver.flush(commit)                its outcome is committed, or stale
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from durable import Durable
from durable.instance import Claimed
from durable.runtime.engine import Engine
from durable.runtime.flusher import Flusher
from durable.runtime.lookout import Lookout
from durable.runtime.shared import Bell, SharedSeats
from durable.storage import maintenance, workers
from durable.storage.admission import Demand, claim_limited
from durable.storage.claims import Commit, Flushed
from durable.storage.session import Operation


class _NotingFlusher(Flusher):
    """Keeps what the last flush did."""

    last = Flushed()

    def flush(self, worker: int, batch: Sequence[Commit]) -> Flushed:
        self.last = super().flush(worker, batch)
        return self.last


class Driver:
    """One worker process's engine with a lease of its own; nothing runs but by these methods."""

    def __init__(self, app: Durable, queue: str = "default") -> None:
        self.app = app
        self._seats = SharedSeats(1)
        self._seats.database_up = True
        self._bell = Bell()
        self.stop_at: float | None = None
        seat, lookout = self._seats.seat(0), Lookout(self._seats.traffic(0))
        self.engine = Engine(app, queue, "driver", self._seats, seat, self._bell, lambda: self.stop_at, lookout)
        self._flusher = self.engine._flusher = _NotingFlusher(self.engine._link, self.engine._waiting.pause)
        self.engine._register()
        self.trace: list[tuple[int, str, str]] = []
        """(id, step, kind of outcome) of every commit, in order."""

    @property
    def worker(self) -> int:
        """Its worker id."""
        return self.engine._worker

    def run(self, operation: Operation[Any]) -> Any:
        """Run a storage operation in a transaction on the engine's connection."""
        return self.engine._link.run_atomically(operation)

    def claims(self, limit: int = 100) -> list[Claimed]:
        """Rows that an inline hop put into the buffer, else at most `limit` claimed ones, suspects too."""
        engine = self.engine
        if len(engine.buffer):
            return list(reversed(engine.buffer.take_back()))
        engine._picker.rescan()
        demand = Demand(self.worker, engine._queue, limit, slots=limit, alone=True)
        return (
            engine._claimed(engine._picker.claim(self.worker, limit))
            or engine._claimed(engine._picker.claim_suspect(self.worker))
            or engine._claimed(self.run(claim_limited(demand)).rows)
        )

    def claim(self) -> Claimed:
        """Claim one row; there must be one."""
        (claimed,) = self.claims(1)
        return claimed

    def execute(self, claimed: Claimed) -> Commit:
        """Run its step."""
        commit = self.engine.slot.step(claimed)
        assert commit is not None, "the step did not happen"
        return commit

    def flush(self, *commits: Commit) -> set[int]:
        """Commit outcomes; return the ids of those that were not stale."""
        for commit in commits:
            self.engine.outbox.hand_over(commit)
        self._flusher.last = Flushed()
        self.engine._flush(self.engine.outbox.take(len(commits)))
        for commit in commits:
            self._flusher.last.add(commit.flushed or Flushed())
        committed = self._flusher.last.committed
        self.trace += [(c.claimed.id, c.claimed.step, c.kind) for c in commits if c.claimed.id in committed]
        return committed

    @property
    def ready(self) -> Counter[str]:
        """Rows that the last flush made runnable, per queue."""
        return self._flusher.last.ready

    def step(self) -> Commit:
        """Claim one row, run its step, commit the outcome."""
        commit = self.execute(self.claim())
        assert commit.claimed.id in self.flush(commit)
        return commit

    def drain(self, limit: int = 100) -> list[tuple[int, str, str]]:
        """Run until nothing is runnable, in batches of `limit`; return what was committed."""
        before = len(self.trace)
        for _ in range(1000):
            claimed = self.claims(limit)
            if not claimed:
                return self.trace[before:]
            self.flush(*map(self.execute, claimed))
        raise AssertionError("the machines do not come to rest")

    def steps(self, instance: int) -> list[str]:
        """Which steps of an instance this driver committed."""
        return [step for committed, step, _ in self.trace if committed == instance]

    def time_out(self) -> dict[str, int]:
        """Wake parks whose deadline has passed, as beats and agents do."""
        return self.run(maintenance.time_out())  # type: ignore[no-any-return]

    def promote(self) -> dict[str, int]:
        """Make due rows runnable, as beats and agents do."""
        return self.run(maintenance.promote())  # type: ignore[no-any-return]

    def die(self, entered: Sequence[tuple[int, int]] | None = None, most: int = 3) -> workers.Reclaimed:
        """End its lease and have everything it holds taken back, as a reaper does."""
        self.run(workers.bury([self.worker]))
        return self.run(workers.reclaim(self.worker, entered, most, "it died"))  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give its connection and its pipe back."""
        self.engine._link.drop()
        self.engine._step_connections.close_idle(0.0)
        self.engine.slot.close()
        os.close(self._bell.reader)
        os.close(self._bell._writer)


class Drivers:
    """Makes drivers, and closes them all at the end."""

    def __init__(self, app: Durable) -> None:
        self._app = app
        self._made: list[Driver] = []

    def __call__(self, queue: str = "default") -> Driver:
        self._made.append(Driver(self._app, queue))
        return self._made[-1]

    def close(self) -> None:
        for driver in self._made:
            driver.close()


@pytest.fixture
def drivers(app: Durable) -> Iterator[Drivers]:
    """Makes workers of this test's app."""
    drivers = Drivers(app)
    yield drivers
    drivers.close()


@pytest.fixture
def driver(drivers: Drivers) -> Driver:
    """A worker of this test's app on queue `default`."""
    return drivers()


class View:
    """Reads instances as people do who query by hand."""

    def __init__(self, connection: Any, schema: str) -> None:
        self._connection = connection
        self.schema = schema

    def rows(self, query: str, *parameters: Any) -> list[Any]:
        """Rows of a query in which {schema} stands for the schema."""
        return self._connection.execute(query.replace("{schema}", self.schema), parameters).fetchall()  # type: ignore[no-any-return]

    def of(self, instance: int, *columns: str) -> tuple[Any, ...]:
        """Columns of one instance in the view; it must be in one place."""
        (row,) = self.rows(f"SELECT {', '.join(columns)} FROM {{schema}}.instance_view WHERE id = %s", instance)
        return tuple(row)

    def status(self, instance: int) -> str:
        """Its status."""
        return str(self.of(instance, "status")[0])

    def state(self, instance: int) -> Any:
        """Its state, as jsonb has it."""
        return self.of(instance, "state")[0]

    def inbox(self, instance: int) -> list[tuple[str, Any]]:
        """(name, payload) of its unconsumed signals, oldest first."""
        return self.rows(
            "SELECT name, payload FROM {schema}.signal_view WHERE target_id = %s AND NOT consumed ORDER BY id", instance
        )

    def count(self, table: str) -> int:
        """How many rows a table has."""
        return int(self.rows(f"SELECT count(*) FROM {{schema}}.{table}")[0][0])


@pytest.fixture
def view(app: Durable, connection: Any) -> View:
    """The database as it is seen by hand."""
    return View(connection, app.schema)
