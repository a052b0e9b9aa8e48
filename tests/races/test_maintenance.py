"""Everybody who moves claims, against everybody: who waits, who passes by, and that no order of locks can deadlock.

Heartbeats and burials lock leases, never instances; reclaims, hand-backs and outcomes lock instances, in id order or
skipping what is locked.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from durable.instance import Claimed
from durable.storage import claims, maintenance, workers
from durable.storage.session import Operation
from tests.fix_rows import Rows, done
from tests.interleaving import Held, awaiting, flush, flushing, reclaiming, spawning, wait_blocked

Make = Callable[[int, list[Claimed]], Operation[Any]]


def bury_expired(worker: int, claimed: list[Claimed]) -> Operation[Any]:
    now = yield from maintenance.now()
    return (yield from workers.bury_expired(now - timedelta(hours=1), 1, 0))


DUTIES: dict[str, Make] = {
    "heartbeat": lambda worker, claimed: workers.heartbeat([worker], 60),
    "burial": bury_expired,
    "reclaim": lambda worker, claimed: reclaiming(worker),
    "hand-back": lambda worker, claimed: claims.release(worker, [(row.id, row.token) for row in reversed(claimed)]),
    "outcome": lambda worker, claimed: flushing(worker, *map(done, reversed(claimed))),
}
WAITS = {
    ("heartbeat", "heartbeat"),
    ("burial", "heartbeat"),
    ("reclaim", "hand-back"),
    ("reclaim", "outcome"),
    ("hand-back", "hand-back"),
    ("hand-back", "outcome"),
    ("outcome", "hand-back"),
    ("outcome", "outcome"),
}
"""(holder, who comes second) where the second waits; elsewhere it goes through, or skips what is locked."""
SKIPS = {
    ("heartbeat", "burial"),
    ("burial", "burial"),
    ("reclaim", "reclaim"),
    ("hand-back", "reclaim"),
    ("outcome", "reclaim"),
}


def did(duty: str, told: Any) -> bool:
    """Whether a duty's answer says that it moved anything."""
    if duty == "reclaim":
        return bool(told.ids)
    return bool(told.committed if duty == "outcome" else told)


@pytest.mark.parametrize("first", DUTIES)
@pytest.mark.parametrize("second", DUTIES)
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_of_two_duties_on_the_same_claims_one_moves_them_and_nobody_deadlocks(
    rows: Rows, first: str, second: str, end: str
) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 3)
    rows.fetch("UPDATE {schema}.workers SET expires_at = clock_timestamp() - interval '1 s'")
    one, two = rows.other(), rows.other()
    held = Held(one, DUTIES[first](worker, claimed)).until(None)
    going = rows.background(lambda: two.atomically(DUTIES[second](worker, claimed)))
    told: Any = None
    if (first, second) in WAITS:
        wait_blocked(rows, two, going)
    else:
        told = going.result(20)
        assert did(second, told) is ((first, second) not in SKIPS)
    if end == "commit":
        assert did(first, held.commit())
    else:
        held.rollback()
    if told is None:
        same_kind = first == second == "heartbeat"
        assert did(second, going.result(20)) is (end == "rollback" or same_kind)
    moved = {"reclaim": "runnable", "hand-back": "runnable", "outcome": "done"}
    effective = [duty for duty in (first if end == "commit" else "", second) if duty in moved and duty != ""]
    if (first, second) in SKIPS and end == "rollback":
        effective = []
    expected = moved[effective[0]] if effective else "executing"
    assert [rows.status(row.id) for row in claimed] == [expected] * 3


def hold(rows: Rows, instance: int) -> Held:
    """Another session's lock on one row."""

    def locking() -> Operation[Any]:
        yield "lock_family", {"ids": [instance]}

    return Held(rows.other(), locking()).until(None)


def test_heartbeat_reap_and_release_over_the_same_claims_at_once(rows: Rows) -> None:
    """The middle row is held by somebody: the hand-back stands with one row locked, the reaper takes what is free."""
    worker = rows.worker()
    claimed = rows.claimed(worker, 3)
    pairs = [(row.id, row.token) for row in reversed(claimed)]
    owner, reaper, agent = rows.other(), rows.other(), rows.other()
    middle = hold(rows, claimed[1].id)
    releasing = rows.background(lambda: owner.atomically(claims.release(worker, pairs)))
    wait_blocked(rows, owner, releasing)
    beat = Held(agent, workers.heartbeat([worker], 60)).until(None)
    reap = Held(reaper, reclaiming(worker)).until(None)
    middle.rollback()
    wait_blocked(rows, owner, releasing)
    assert reap.commit().ids == [claimed[2].id], "it waited for neither of the locked rows"
    assert releasing.result(20) == {"default": 2}
    assert beat.commit() == {worker}
    assert [rows.status(row.id) for row in claimed] == ["runnable"] * 3
    assert rows.reclaim(worker).ids == []


@pytest.mark.parametrize("second", ["hand-back", "outcome"])
@pytest.mark.parametrize("first", ["hand-back", "outcome"])
def test_whoever_locks_several_rows_locks_them_in_one_order(rows: Rows, first: str, second: str) -> None:
    """Both are given their rows from the last to the first, and meet at a row that a third session holds."""
    worker = rows.worker()
    claimed = rows.claimed(worker, 3)
    one, two = rows.other(), rows.other()
    middle = hold(rows, claimed[1].id)
    leading = rows.background(lambda: one.atomically(DUTIES[first](worker, claimed)))
    wait_blocked(rows, one, leading)
    following = rows.background(lambda: two.atomically(DUTIES[second](worker, claimed[::-1])))
    wait_blocked(rows, two, following)
    middle.rollback()
    assert did(first, leading.result(20))
    assert not did(second, following.result(20))
    assert {rows.status(row.id) for row in claimed} == {"done" if first == "outcome" else "runnable"}


@pytest.mark.parametrize("order", [1, -1])
def test_heartbeats_and_burials_of_several_leases_lock_them_in_one_order(rows: Rows, order: int) -> None:
    leases = [rows.worker() for _ in range(3)]
    one, two, holder = rows.other(), rows.other(), rows.other()
    holder.connection.execute("BEGIN")
    holder.fetch("SELECT FROM {schema}.workers WHERE id = %s FOR UPDATE", [leases[1]])
    beating = rows.background(lambda: one.run(workers.heartbeat(leases[::order], 60)))
    wait_blocked(rows, one, beating)
    burying = rows.background(lambda: two.run(workers.bury(leases[::-order])))
    wait_blocked(rows, two, burying)
    holder.connection.execute("ROLLBACK")
    assert beating.result(20) == set(leases)
    burying.result(20)
    assert rows.run(workers.heartbeat(leases, 60)) == set()


def test_a_row_whose_outcome_is_committing_is_passed_by_by_every_duty(rows: Rows) -> None:
    """A park that is due already, a retry that is due already, a spawn: nobody touches them before they commit."""
    worker = rows.worker()
    parking, retrying, parent = rows.claimed(worker, 3)
    owner, other = rows.other(), rows.other()
    held = Held(
        owner,
        flushing(
            worker,
            awaiting(parking, timeout=0.0),
            claims.Commit(retrying, "scheduled", attempt=1, delay=0.0),
            spawning(parent),
        ),
    ).until(None)
    other.fetch("SET lock_timeout = '1ms'")  # to wait for anything is an error
    assert other.atomically(maintenance.time_out()) == {}
    assert other.atomically(maintenance.promote()) == {}
    assert other.atomically(reclaiming(worker)).ids == []
    assert other.claim(worker) == other.claim(worker, queue="kids") == []
    assert held.commit().committed == {parking.id, retrying.id, parent.id}
    assert other.atomically(maintenance.time_out()) == {"default": 1}
    assert other.atomically(maintenance.promote()) == {"default": 1}
    assert other.atomically(reclaiming(worker)).ids == []
    assert [rows.status(row.id) for row in (parking, retrying, parent)] == ["runnable", "runnable", "awaiting_children"]


@pytest.mark.parametrize("first", ["time_out", "promote"])
def test_two_beats_at_once_share_what_is_due_and_wait_for_nothing(rows: Rows, first: str) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 4)
    late = claims.Commit if first == "promote" else None
    flush(
        rows,
        worker,
        *(late(row, "scheduled", attempt=1, delay=0.0) if late else awaiting(row, timeout=0.0) for row in claimed),
    )
    duty = maintenance.promote if first == "promote" else maintenance.time_out
    held = Held(rows.other(), duty(3)).until(None)
    assert rows.atomically(duty()) == {"default": 1}
    assert held.commit() == {"default": 3}
    assert rows.atomically(duty()) == {}
    assert [row.id for row in sorted(rows.claim(worker))] == [row.id for row in claimed]
