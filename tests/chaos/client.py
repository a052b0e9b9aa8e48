"""A producer process: `python -m tests.chaos.client NAME SEED LOG`. What it asks for and is told goes into its log.

Each call is two lines: `invoke` before it, and afterwards `ok`, `fail` (definite: nothing happened) or `unknown` (the
connection was lost, or nothing answered in time: it may have happened).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from durable import Durable
from durable.errors import DatabaseUnavailableError, DurableError, NoTargetError
from tests.chaos.application import SCHEMA, build
from tests.chaos.model import Spec, draw, poison

BACKLOG = 150
"""Rows that may run, beyond which nobody inserts."""
BATCH = 16
WAITING = f"""SELECT count(*) FROM (
    SELECT FROM {SCHEMA}.instances WHERE status IN ('runnable', 'executing') AND lane IS NULL LIMIT %s) AS w"""


class Log:
    """A client log: one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._calls = 0
        self._name = path.stem

    def write(self, **fields: Any) -> None:
        os.write(self._file, (json.dumps({"at": time.monotonic(), **fields}) + "\n").encode())

    def call(self, op: str, does: Callable[[], Any], **what: Any) -> tuple[str, Any]:
        """Log a call and how it ended; return that and its value."""
        self._calls += 1
        name = f"{self._name}:{self._calls}"
        self.write(call=name, op=op, type="invoke", **what)
        try:
            value = does()
        except (DatabaseUnavailableError, psycopg.OperationalError) as error:
            self.write(call=name, op=op, type="unknown", error=type(error).__name__)
            return "unknown", None
        except NoTargetError:
            self.write(call=name, op=op, type="fail", error="NoTargetError")
            return "fail", None
        except DurableError as error:
            self.write(call=name, op=op, type="fail", error=f"{type(error).__name__}: {error}")
            return "fail", None
        self.write(call=name, op=op, type="ok", value=value)
        return "ok", value


def signal_once(log: Log, app: Durable, target: int, key: str, i: int) -> tuple[str, Any]:
    """Deliver the signal of that number to one of ours; again and again is the same as once."""
    return log.call(
        "signal",
        lambda: app.signal(target, "go", {"i": i, "k": key}, dedup_key=f"go-{i}"),
        target=target, key=key, dedup=f"go-{i}",
    )  # fmt: skip


def cancel(log: Log, app: Durable, target: int, key: str) -> tuple[str, Any]:
    """Cancel one of ours."""
    return log.call("cancel", lambda: app.cancel(target, "chaos"), target=target, key=key)


class Producer:
    """Inserts the mix as fast as it is worked off, and sends what the inserted ones wait for."""

    def __init__(self, name: str, seed: str, log: Path) -> None:
        self.name = name
        self.app = build()
        self.log = Log(log)
        self._dice = random.Random(seed)
        self._made = 0
        self._due: list[tuple[float, Callable[[], tuple[str, Any]]]] = []
        self._known: list[int] = []
        self._look_at, self._enough = 0.0, False
        self.stopping = False

    def run(self) -> None:
        """Go on until told to stop."""
        while not self.stopping:
            if self._too_much():
                self._send_due()
                time.sleep(0.02)
                continue
            self._dice.choices((self._many, self._one, self._own_transaction, self._look), (10, 4, 1, 3))[0]()
            self._send_due()

    def _too_much(self) -> bool:
        """Whether enough waits already; asked now and then."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + 0.1
            try:
                with self.app._pool.connection() as connection:
                    row = connection.execute(WAITING, [BACKLOG]).fetchone()
            except DatabaseUnavailableError:
                return True
            self._enough = row is None or row[0] >= BACKLOG
        return self._enough

    def _spec(self) -> Spec:
        self._made += 1
        key = f"{self.name}-{self._made}"
        # Poison is rare, since it costs its worker three processes; a short storm has it all the same.
        return poison(key) if self._made == 7 else draw(key, self._dice)

    def _many(self) -> None:
        specs = [self._spec() for _ in range(BATCH)]
        outcome, ids = self.log.call(
            "insert",
            lambda: [result.id for result in self.app.insert_many([spec.entry() for spec in specs])],
            specs=[spec.as_json() for spec in specs],
        )
        if outcome == "ok":
            for spec, instance_id in zip(specs, ids, strict=True):
                self._later(spec, instance_id)

    def _one(self) -> None:
        """With a key of its own, again after an unknown end: the retry of a client makes one row."""
        spec = self._spec()
        machine, options = spec.entry()
        options = {**options, "correlation_key": spec.key, "on_conflict": "return"}
        options["correlation_scope"] = ["runnable", "executing", "scheduled", "awaiting_signal", "awaiting_children",
                                        "done", "failed", "cancelled"]  # fmt: skip
        outcome, instance_id = "unknown", None
        while outcome == "unknown" and not self.stopping:
            outcome, instance_id = self.log.call(
                "insert",
                lambda: self.app.insert(machine, **options).id,
                specs=[spec.as_json()],
                keyed=True,
            )
        if outcome == "ok":
            self._later(spec, instance_id)

    def _own_transaction(self) -> None:
        """An insert beside a row of our own; half of the transactions are rolled back."""
        spec = self._spec()
        machine, options = spec.entry()
        keep = self._dice.random() < 0.5

        def transact() -> list[int]:
            with psycopg.connect(os.environ["DURABLE_DSN"], application_name="durable own", connect_timeout=4) as mine:
                mine.execute("INSERT INTO public.markers (key) VALUES (%s)", [spec.key])
                instance_id = self.app.insert(machine, connection=mine, **options).id
                if not keep:
                    mine.rollback()
            return [instance_id]

        outcome, ids = self.log.call("insert", transact, specs=[spec.as_json()], rolled_back=not keep, marked=True)
        if outcome == "ok" and keep:
            self._later(spec, ids[0])

    def _look(self) -> None:
        """Read how one of ours has ended, if it has."""
        if self._known:
            instance_id = self._dice.choice(self._known)
            self.log.call("look", lambda: self._status(instance_id), target=instance_id)

    def _status(self, instance_id: int) -> str | None:
        snapshot = self.app.fetch(instance_id)
        return None if snapshot is None else snapshot.status

    def _later(self, spec: Spec, instance_id: int) -> None:
        self._known.append(instance_id)
        now = time.monotonic()
        for i in range(spec.signals if not spec.cancel else 0):
            for _ in range(self._dice.choice((1, 2, 3))):
                at = now + self._dice.choice((0.0, self._dice.uniform(0, 2)))
                self._due.append((at, lambda i=i: signal_once(self.log, self.app, instance_id, spec.key, i)))
        if spec.cancel:
            at = now + self._dice.uniform(0, 1.5)
            self._due.append((at, lambda: cancel(self.log, self.app, instance_id, spec.key)))

    def _send_due(self) -> None:
        now = time.monotonic()
        due = [one for one in self._due if one[0] <= now]
        self._due = [one for one in self._due if one[0] > now]
        for at, does in due:
            if self.stopping or does()[0] == "unknown":
                self._due.append((at + 0.2, does))


@contextmanager
def producing(producer: Producer) -> Iterator[None]:
    def stop(*_: object) -> None:
        producer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    yield
    producer.app.close()


def main() -> None:
    name, seed, log = sys.argv[1:]
    producer = Producer(name, seed, Path(log))
    with producing(producer):
        producer.run()


if __name__ == "__main__":
    main()
