"""Transactions held open at a chosen statement, so that two sessions meet exactly where a test wants them to.

`Held` drives an operation statement by statement. Who comes second either waits for a lock (`wait_blocked` asserts it)
or passes by; then the first goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from durable.instance import Claimed, NewSignal, Payload
from durable.storage import claims, signals, workers
from durable.storage.claims import Commit, Flushed
from durable.storage.session import Operation, execute
from tests.fix_db import wait_until
from tests.fix_rows import Rows, Session, done, new

GO = Payload("json", b"1")


class Held:
    """An operation whose transaction is opened here, driven statement by statement and committed when told."""

    def __init__(self, session: Session, operation: Operation[Any]) -> None:
        self.session = session
        self._operation = operation
        self._pending: tuple[str, Mapping[str, Any]] | None = None
        self._result: Any = None
        session.connection.execute("BEGIN")
        self._advance(None)

    def _advance(self, rows: Any) -> None:
        try:
            self._pending = self._operation.send(rows)
        except StopIteration as stop:
            self._pending, self._result = None, stop.value

    def until(self, name: str | None) -> Held:
        """Run statements up to, not including, the one of that name; None: all."""
        while self._pending is not None and self._pending[0] != name:
            self._advance(execute(self.session.connection, self.session.sql, *self._pending))
        assert name is None or self._pending is not None, f"there was no statement {name}"
        return self

    def step(self) -> str | None:
        """Run the next statement and return its name; None when all have been run."""
        if self._pending is None:
            return None
        name, parameters = self._pending
        self._advance(execute(self.session.connection, self.session.sql, name, parameters))
        return name

    def commit(self) -> Any:
        """Run the rest, commit, return what the operation returns."""
        self.until(None)
        self.session.connection.execute("COMMIT")
        return self._result

    def rollback(self) -> None:
        """Undo everything."""
        self.session.connection.execute("ROLLBACK")


def flushing(worker: int, *commits: Commit) -> Operation[Flushed]:
    return claims._flush(worker, commits)


def delivering(*targets: int | str, name: str = "go") -> Operation[signals.Delivery]:
    return signals.deliver([NewSignal(target, name, GO) for target in targets])


def awaiting(claimed: Claimed, *names: str, **options: Any) -> Commit:
    return Commit(claimed, "awaiting_signal", kind="await", step="woken", awaits=names or ("go",), **options)


def spawning(claimed: Claimed, count: int = 2) -> Commit:
    children = [new(queue="kids") for _ in range(count)]
    return Commit(claimed, "awaiting_children", kind="children", step="join", children=children)


def going_on(claimed: Claimed, **options: Any) -> Commit:
    return Commit(claimed, "runnable", kind="next", step="more", delay=0.0, **options)


ERROR = '{"type": "ValueError", "message": "bad"}'

OUTCOMES: dict[str, Callable[[Claimed, Sequence[int]], Commit]] = {
    "done": lambda row, shown: done(row),
    "done, key kept": lambda row, shown: done(row._replace(keeps_key=True)),
    "failed": lambda row, shown: Commit(row, "failed", error=ERROR),
    "stop": lambda row, shown: Commit(row, "failed", GO, error=ERROR),
    "cancel": lambda row, shown: Commit(row, "cancelled", error=ERROR),
    "retry": lambda row, shown: Commit(row, "runnable", error=ERROR, attempt=row.attempt + 1, delay=0.0),
    "retry later": lambda row, shown: Commit(row, "scheduled", error=ERROR, attempt=row.attempt + 1, delay=60.0),
    "next": lambda row, shown: going_on(row, state=GO, consumed=shown),
    "next later": lambda row, shown: Commit(
        row, "scheduled", kind="next", step="more", state=GO, delay=60.0, consumed=shown
    ),
    "inline hop": lambda row, shown: Commit(row, "executing", kind="next", step="more", state=GO, consumed=shown),
    "await": lambda row, shown: awaiting(row, "other", state=GO, shown=shown, timeout=60.0),
    "await what is there": lambda row, shown: awaiting(row, "go", state=GO),
    "children": lambda row, shown: spawning(row),
    "no children": lambda row, shown: spawning(row, 0),
}
"""Every kind of outcome, from a claimed row and the ids of the awaited signals that its step was shown."""

AFTER = {
    "done": "done",
    "done, key kept": "done",
    "failed": "failed",
    "stop": "failed",
    "cancel": "cancelled",
    "retry": "runnable",
    "retry later": "scheduled",
    "next": "runnable",
    "next later": "scheduled",
    "inline hop": "executing",
    "await": "awaiting_signal",
    "await what is there": "runnable",
    "children": "awaiting_children",
    "no children": "runnable",
}
"""What a row with a signal "go" in its inbox becomes by each."""


def everything(session: Session) -> dict[str, list[dict[str, Any]]]:
    """Every row of every instance and signal, as this session sees it."""
    return {
        table: session.fetch(f"SELECT * FROM {{schema}}.{table} ORDER BY id")
        for table in ("instances", "history", "signals")
    }


def parked(rows: Rows, worker: int, **options: Any) -> int:
    """An instance that awaits "go"."""
    (claimed,) = rows.claimed(worker)
    assert claimed.id in flush(rows, worker, awaiting(claimed, **options)).committed
    return claimed.id


def flush(session: Session, worker: int, *commits: Commit) -> Flushed:
    return claims.flush(session.connection, session.sql, worker, commits)


def family(rows: Rows, worker: int, count: int = 2) -> tuple[int, list[Claimed]]:
    """A parent that waits for claimed children."""
    (claimed,) = rows.claimed(worker)
    flush(rows, worker, spawning(claimed, count))
    children = rows.claim(worker, count, "kids")
    assert len(children) == count
    return claimed.id, children


def handed(rows: Session, *claims: Claimed) -> list[Claimed]:
    """Claims as a step gets them, their signals loaded."""
    found = rows.run(signals.inbox([row.id for row in claims]))
    boxes = [found.get(row.id, []) for row in claims]
    return [
        row._replace(inbox=box[-1].id if box else None, signals=box) for row, box in zip(claims, boxes, strict=True)
    ]


def inbox(rows: Rows, instance: int) -> int:
    return len(rows.fetch("SELECT id FROM {schema}.signals WHERE target_id = %s AND NOT consumed", [instance]))


def bury(worker: int) -> Operation[None]:
    return workers.bury([worker])


def reclaiming(worker: int) -> Operation[workers.Reclaimed]:
    return workers.reclaim(worker, [], 3, "it died")


def noted(operation: Operation[Any], names: list[str]) -> Operation[Any]:
    """The operation, its statements' names written down."""
    rows: Any = None
    while True:
        try:
            name, parameters = operation.send(rows)
        except StopIteration as stop:
            return stop.value
        names.append(name)
        rows = yield name, parameters


def wait_blocked(watcher: Session, session: Session, future: Any) -> None:
    """Wait until a session waits for a lock; fail if it went through."""
    wait_until_blocked(watcher, session.pid, future)


def wait_until_blocked(watcher: Session, pid: int, future: Any) -> None:
    query = "SELECT pid FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    wait_until(lambda: future.done() or watcher.fetch(query, [pid]), what="a wait for a lock")
    assert not future.done(), f"it did not wait: {future.result()!r}"
