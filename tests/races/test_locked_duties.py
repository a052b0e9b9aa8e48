"""Another session holds one row, one parent, one lease: a duty does the rest, and comes back for this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from durable import Durable, RateLimit
from durable.instance import Claimed
from durable.limit_rows import LimitRows
from durable.runtime.agent import Agent, Death
from durable.runtime.beat import Beat
from durable.runtime.limits import Declared
from durable.runtime.link import Link
from durable.runtime.shared import Bell, SharedSeats
from durable.storage import claims, maintenance, workers
from durable.storage.session import Operation
from tests.fix_rows import Rows
from tests.interleaving import Held, family

Make = Callable[[int, list[Claimed], bool], Operation[Any]]


@pytest.fixture
def link(rows: Rows) -> Iterator[Link]:
    """A process's connection."""
    link = Link(lambda: rows.dsn, rows.sql, "test", pooler=False, most_wait=1.0, pause=lambda seconds: True)
    yield link
    link.drop()


def pairs(claimed: list[Claimed]) -> list[tuple[int, int]]:
    return [(row.id, row.token) for row in claimed]


DUTIES: dict[str, Make] = {
    "release": lambda worker, claimed, wait: claims.release(worker, pairs(claimed), wait=wait),
    "expire": lambda worker, claimed, wait: claims.expire(worker, pairs(claimed), wait=wait),
    "reclaim": lambda worker, claimed, wait: workers.reclaim(worker, None, 1, "it died", wait=wait),
    "give up": lambda worker, claimed, wait: workers.give_up(
        worker, [(*pair, "too long") for pair in pairs(claimed)], 1, wait=wait
    ),
}
AFTER = {"release": "runnable", "expire": "cancelled", "reclaim": "failed", "give up": "failed"}


@pytest.mark.parametrize("held", ["row", "parent"])
@pytest.mark.parametrize("duty", DUTIES)
def test_duty_leaves_only_rows_that_are_held(rows: Rows, link: Link, duty: str, held: str) -> None:
    worker = rows.worker()
    parent, children = family(rows, worker)
    other_parent, others = family(rows, worker, 1)
    alone = rows.claimed(worker)
    claimed = [*children, *others, *alone]
    holder = hold(rows, children[0].id if held == "row" else parent)
    link.run_around_locks(lambda wait: DUTIES[duty](worker, claimed, wait))
    left = children if held == "parent" else children[:1]
    for row in claimed:
        assert rows.status(row.id) == ("executing" if row in left else AFTER[duty])
    holder.rollback()
    link.run_around_locks(lambda wait: DUTIES[duty](worker, claimed, wait))
    assert {rows.status(row.id) for row in claimed} == {AFTER[duty]}
    parents = [rows.status(instance) for instance in (parent, other_parent)]
    assert parents == ["awaiting_children" if duty == "release" else "runnable"] * 2


def hold(rows: Rows, instance: int) -> Held:
    """Another session's lock on one row."""

    def locking() -> Operation[Any]:
        yield "lock_family", {"ids": [instance]}

    return Held(rows.other(), locking()).until(None)


def hold_lease(rows: Rows, worker: int) -> Held:
    """Another session's lock on a lease, in a transaction that changes nothing."""
    return Held(rows.other(), workers.bury([worker])).until(None)


@pytest.mark.parametrize("sweep", [maintenance.sweep_workers, maintenance.sweep_signals], ids=["workers", "signals"])
def test_sweep_leaves_what_is_held(rows: Rows, link: Link, sweep: Callable[[], Operation[int]]) -> None:
    for _ in range(2):
        rows.bury(rows.worker())
        rows.fetch(
            "INSERT INTO {schema}.signals (target_id, name, payload_type, payload, created_at)"
            " VALUES (7, 'go', 'json', '1', now() - interval '1 hour')"
        )
    rows.fetch("UPDATE {schema}.workers SET dead_at = now() - interval '2 hours'")
    other = rows.other()
    with other.connection.transaction(force_rollback=True):
        for table in ("workers", "signals"):
            other.fetch(f"SELECT FROM {{schema}}.{table} ORDER BY id LIMIT 1 FOR UPDATE")
        assert link.run(sweep()) == 1
    assert link.run(sweep()) == 1


@pytest.fixture
def agent(app: Durable) -> Iterator[Agent]:
    """An agent of two worker processes that does only what it is told."""
    reader, writer = os.pipe()
    bells = [Bell(), Bell()]
    agent = Agent(app, "test", ["default"] * 2, SharedSeats(2), bells, reader)
    yield agent
    agent._link.drop()
    for descriptor in (reader, writer, *(end for bell in bells for end in (bell.reader, bell._writer))):
        os.close(descriptor)


def test_held_lease_delays_only_its_own_extension(rows: Rows, agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    leases = [rows.worker(5.0), rows.worker(5.0)]
    seats = [agent._seats.seat(number) for number in range(2)]
    for seat, worker in zip(seats, leases, strict=True):
        seat.worker_id = worker
        seat.deadline = 1.0
    held = hold_lease(rows, leases[0])
    agent._heartbeat()
    assert seats[0].deadline == 1.0
    assert seats[1].deadline > 1.0
    assert [seat.lost for seat in seats] == [0, 0], "held is not dead"
    assert f"the leases of workers [{leases[0]}] could not be extended" in caplog.text
    held.commit()
    agent._heartbeat()
    assert [seat.lost for seat in seats] == [leases[0], 0]


def test_held_lease_delays_only_its_own_death(rows: Rows, agent: Agent) -> None:
    leases = [rows.worker(), rows.worker()]
    claimed = [rows.claimed(worker)[0] for worker in leases]
    agent._deaths = [Death(worker, [], "it was killed") for worker in leases]
    held = hold_lease(rows, leases[0])
    agent._hand_back()
    assert [rows.status(row.id) for row in claimed] == ["executing", "runnable"]
    assert [death.worker for death in agent._deaths] == leases[:1]
    held.rollback()
    agent._hand_back()
    assert [rows.status(row.id) for row in claimed] == ["runnable"] * 2
    assert agent._deaths == []


def test_beat_goes_on_while_its_lease_is_held(app: Durable, rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    beat = Beat(app, "test")
    beat._heartbeat()
    held = hold_lease(rows, beat._worker)
    worker = beat._worker
    beat._heartbeat()
    assert f"the beat's lease (worker {worker}) could not be extended: another session holds it" in caplog.text
    assert beat._worker == worker
    held.rollback()
    beat._heartbeat()
    assert beat._worker == worker
    beat._link.drop()


def test_held_limit_delays_only_its_declaration(
    app: Durable, rows: Rows, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    app.limit_rows = LimitRows({"mail": RateLimit(5, 1.0)}, {})
    declared = Declared(link, app)
    declared.store()
    app.limit_rows = LimitRows({"mail": RateLimit(9, 1.0)}, {})
    other = rows.other()
    with other.connection.transaction(force_rollback=True):
        other.fetch("SELECT FROM {schema}.limits FOR UPDATE")
        declared.store()
    assert "the app's limits are stored later: another session holds their rows" in caplog.text
    assert rows.fetch("SELECT allowed FROM {schema}.limits") == [{"allowed": 5}]
    declared.store_again()
    assert rows.fetch("SELECT allowed FROM {schema}.limits") == [{"allowed": 5}], "not before its time"
    declared._again_at = 0.0
    declared.store_again()
    assert rows.fetch("SELECT allowed FROM {schema}.limits") == [{"allowed": 9}]
