"""Operations of ours that deadlock are repeated by us; in a caller's transaction the error is the caller's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.errors import DatabaseUnavailableError
from durable.storage import inspection, instances
from durable.storage.arrays import Int8Array
from durable.storage.session import ATTEMPTS, Operation, run_repeatedly
from durable.writer import Write, Writer
from tests.fix_rows import Rows, Session
from tests.interleaving import Held


class Crossing:
    """Two operations that lock two rows in opposite orders; each waits for the other between the two at first."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._both = threading.Barrier(2)
        self.attempts = 0

    def __call__(self, order: int) -> Operation[int]:
        self.attempts += 1
        first = self.attempts <= 2
        for number, instance in enumerate(self._ids[::order]):
            if number and first:
                self._both.wait(20)
            yield "lock_family", {"ids": Int8Array([instance])}
        return order


def silent(operation: Callable[[], Operation[Any]]) -> Write[Any]:
    return Write(operation, lambda _: (), lambda _: ())


def writer(app: Durable) -> Writer:
    return app._writer


def test_deadlock_of_two_writes_is_repeated(app: Durable, rows: Rows) -> None:
    crossing = Crossing(rows.insert(2))
    going = [
        rows.background(lambda order=order: writer(app).write(silent(lambda: crossing(order))))  # type: ignore[misc]
        for order in (1, -1)
    ]
    assert [future.result(30) for future in going] == [1, -1]
    assert crossing.attempts == 3


def test_deadlock_of_two_async_writes_is_repeated(app: Durable, rows: Rows) -> None:
    crossing = Crossing(rows.insert(2))

    async def write(order: int) -> Any:
        try:
            return await writer(app).awrite(silent(lambda: crossing(order)))
        finally:
            await app.aclose()

    going = [rows.background(lambda order=order: asyncio.run(write(order))) for order in (1, -1)]  # type: ignore[misc]
    assert [future.result(30) for future in going] == [1, -1]
    assert crossing.attempts == 3


def test_deadlock_of_two_commands_is_repeated(rows: Rows) -> None:
    crossing = Crossing(rows.insert(2))

    def run(session: Session, order: int) -> int:
        return run_repeatedly(session.connection, session.sql, lambda: crossing(order))

    sessions = {1: rows.other(), -1: rows.other()}
    going = [rows.background(partial(run, session, order)) for order, session in sessions.items()]
    assert [future.result(30) for future in going] == [1, -1]


def test_deadlock_in_a_callers_transaction_is_theirs(app: Durable, rows: Rows, database: str) -> None:
    crossing = Crossing(rows.insert(2))

    def write(order: int) -> Any:
        with psycopg.connect(database) as connection:
            return writer(app).write(silent(lambda: crossing(order)), connection)

    going = [rows.background(lambda order=order: write(order)) for order in (1, -1)]  # type: ignore[misc]
    errors = [future.exception(30) for future in going]
    assert sorted(type(error).__name__ for error in errors) == ["DeadlockDetected", "NoneType"]
    assert crossing.attempts == 2


def test_deadlock_that_recurs_ends_as_what_it_is(app: Durable) -> None:
    attempts = 0

    def deadlocked() -> Operation[None]:
        nonlocal attempts
        attempts += 1
        raise psycopg.errors.DeadlockDetected("again")
        yield  # pragma: no cover - makes it an operation

    with pytest.raises(DatabaseUnavailableError, match="in the way: again; nothing was written"):
        writer(app).write(silent(deadlocked))
    assert attempts == ATTEMPTS


def parked(rows: Rows, queue: str) -> int:
    """A row that waits in the lane of a key whose holder is gone."""
    (instance,) = rows.insert(concurrency_key="k", queue=queue)
    rows.fetch("UPDATE {schema}.instances SET lane = 'key k' WHERE id = %s", [instance])
    return instance


def test_last_two_rows_of_a_lane_are_cancelled_at_once(app: Durable, rows: Rows) -> None:
    """Each holds its own row and then wants the other's, to open the lane."""
    ids = [parked(rows, "default") for _ in range(2)]
    both, attempts = threading.Barrier(2), []

    def cancel(instance: int) -> Operation[Any]:
        attempts.append(instance)
        operation, answer = instances.cancel(instance, "enough"), None
        while True:
            try:
                name, parameters = operation.send(answer)  # type: ignore[arg-type]
            except StopIteration as stop:
                return stop.value
            if name == "open_lanes" and len(attempts) <= 2:
                both.wait(20)
            answer = yield name, parameters

    going = [rows.background(partial(writer(app).write, silent(partial(cancel, instance)))) for instance in ids]
    assert all(future.result(30).found for future in going)
    assert len(attempts) == 3
    assert [rows.status(instance) for instance in ids] == ["cancelled"] * 2


def test_last_two_rows_of_a_lane_are_purged_at_once(rows: Rows) -> None:
    for queue in ("one", "two"):
        parked(rows, queue)
    held = [Held(rows.other(), inspection.purge(queue)).until("open_lanes") for queue in ("one", "two")]
    for purge in held:
        purge.session.fetch("SET LOCAL lock_timeout = '1ms'")
        assert purge.until(None)
    assert [purge.commit() for purge in held] == [1, 1]


def test_purge_leaves_what_is_held(rows: Rows) -> None:
    parent = rows.insert()[0]
    ids = rows.insert(3)
    rows.fetch("UPDATE {schema}.instances SET parent_id = %s, parent_round = 1 WHERE id = %s", [parent, ids[2]])
    rows.fetch("UPDATE {schema}.instances SET version = 1 WHERE id = %s", [parent])
    others = [Held(rows.other(), _locking(instance)).until(None) for instance in (ids[0], parent)]
    assert rows.atomically(inspection.purge("default")) == 1
    assert [rows.status(instance) for instance in ids] == ["runnable", None, "runnable"]
    for other in others:
        other.rollback()
    assert rows.atomically(inspection.purge("default")) == 2


def _locking(instance: int) -> Operation[None]:
    yield "lock_family", {"ids": Int8Array([instance])}
