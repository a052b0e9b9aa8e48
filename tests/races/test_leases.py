"""Claims against burials, heartbeats against burials, hand-backs against reapers: both orders of each.

One session holds its transaction open at the point in question; the other is seen to wait, to skip, or to go through.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from durable.instance import Claimed
from durable.storage import claims, maintenance, workers
from durable.storage.workers import Reclaimed
from tests.fix_rows import Rows, Session, done


def run_out(rows: Session, worker: int) -> None:
    """The lease is over, as the database's clock has it; takes no lock that a claim holds."""
    rows.fetch("UPDATE {schema}.workers SET expires_at = clock_timestamp() - interval '1 s' WHERE id = %s", [worker])


def bury_expired(session: Session) -> list[int]:
    long_ago = session.run(maintenance.now()) - timedelta(hours=1)
    return [worker for worker, _ in session.run(workers.bury_expired(long_ago, 1, 0))]


def reclaim(session: Session, worker: int) -> Reclaimed:
    """Inside the transaction that is open, if one is."""
    return session.run(workers.reclaim(worker, None, 3, "it died"))


# Claim and burial


def test_a_reaper_skips_a_worker_that_is_claiming_and_buries_it_afterwards(rows: Rows) -> None:
    worker = rows.worker()
    (instance,) = rows.insert()
    claimer, reaper = rows.other(), rows.other()
    with claimer.connection.transaction():
        (claimed,) = claimer.claim(worker)
        run_out(rows, worker)
        assert bury_expired(reaper) == [], "it neither waits nor buries"
    assert bury_expired(reaper) == [worker]
    assert reaper.atomically(workers.reclaim(worker, None, 3, "it died")).ids == [instance], "the claim is seen"
    assert claimer.flush(worker, done(claimed)) == set()
    assert claimer.claim(worker) == []


def test_an_agent_that_buries_waits_for_the_claim_and_then_sees_it(rows: Rows) -> None:
    worker = rows.worker()
    (instance,) = rows.insert()
    claimer, agent = rows.other(), rows.other()
    with claimer.connection.transaction():
        claimer.claim(worker)
        burial = rows.background(lambda: agent.run(workers.bury([worker])))
        rows.wait_blocked(agent, burial)
    burial.result(20)
    assert rows.reclaim(worker).ids == [instance]


@pytest.mark.parametrize("suspect", [False, True], ids=["claim", "claim_suspect"])
def test_a_claim_waits_for_a_burial_and_then_claims_nothing(rows: Rows, suspect: bool) -> None:
    worker = rows.worker()
    (instance,) = rows.insert()
    rows.fetch("UPDATE {schema}.instances SET crashes = %s", [int(suspect)])
    claimer, agent = rows.other(), rows.other()

    def claim() -> list[Claimed]:
        return claimer.run(claims.claim_suspect(worker, "default", [])) if suspect else claimer.claim(worker)

    with agent.connection.transaction():
        agent.run(workers.bury([worker]))
        claiming = rows.background(claim)
        rows.wait_blocked(claimer, claiming)
    assert claiming.result(20) == []
    assert rows.status(instance) == "runnable"


def test_after_a_reapers_burial_nothing_is_claimed(rows: Rows) -> None:
    worker = rows.worker()
    rows.insert()
    reaper = rows.other()
    with reaper.connection.transaction():
        run_out(reaper, worker)
        assert bury_expired(reaper) == [worker]
        claiming = rows.background(lambda: rows.claim(worker))
    assert claiming.result(20) == []
    assert rows.claim(worker) == []


def test_a_claim_goes_on_when_the_burial_is_rolled_back(rows: Rows) -> None:
    worker = rows.worker()
    (instance,) = rows.insert()
    claimer, reaper = rows.other(), rows.other()
    with reaper.connection.transaction(force_rollback=True):
        reaper.run(workers.bury([worker]))
        claiming = rows.background(lambda: claimer.claim(worker))
        rows.wait_blocked(claimer, claiming)
    assert [row.id for row in claiming.result(20)] == [instance]


def test_claims_and_heartbeats_of_one_worker_do_not_wait_for_each_other(rows: Rows) -> None:
    worker = rows.worker()
    rows.insert(2)
    claimer, agent = rows.other(), rows.other()
    with claimer.connection.transaction():
        assert len(claimer.claim(worker, 1)) == 1
        assert agent.run(workers.heartbeat([worker], 60)) == {worker}
    with agent.connection.transaction():
        assert agent.run(workers.heartbeat([worker], 60)) == {worker}
        assert len(claimer.claim(worker, 1)) == 1


# Heartbeat and burial


def test_a_heartbeat_waits_for_a_burial_and_then_learns_of_it(rows: Rows) -> None:
    worker, living = rows.worker(), rows.worker()
    agent, reaper = rows.other(), rows.other()
    with reaper.connection.transaction():
        reaper.run(workers.bury([worker]))
        beating = rows.background(lambda: agent.run(workers.heartbeat([worker, living], 60)))
        rows.wait_blocked(agent, beating)
    assert beating.result(20) == {living}


def test_a_reaper_skips_a_lease_that_is_being_extended(rows: Rows) -> None:
    worker = rows.worker(-1.0)
    agent, reaper = rows.other(), rows.other()
    with agent.connection.transaction():
        assert agent.run(workers.heartbeat([worker], 60)) == {worker}
        assert bury_expired(reaper) == []
    assert bury_expired(reaper) == []
    rows.insert()
    assert len(rows.claim(worker)) == 1


def test_two_reapers_bury_each_lease_once_and_count_each_crash_once(rows: Rows) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 3)
    run_out(rows, worker)
    one, two = rows.other(), rows.other()
    with one.connection.transaction():
        assert bury_expired(one) == [worker]
        assert bury_expired(two) == []
    with one.connection.transaction():
        assert len(reclaim(one, worker).ids) == 3
        assert two.atomically(workers.reclaim(worker, None, 3, "it died")).ids == []
    for row in claimed:
        found = rows.live(row.id)
        assert found is not None
        assert (found["crashes"], found["status"]) == (1, "runnable")


# Hand-back and reaper


def test_a_reaper_skips_rows_that_are_being_released(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    owner = rows.other()
    with owner.connection.transaction():
        assert owner.run(claims.release(worker, [(claimed.id, claimed.token)])) == {"default": 1}
        assert rows.reclaim(worker).ids == []
    assert rows.reclaim(worker).ids == []
    found = rows.live(claimed.id)
    assert found is not None
    assert (found["status"], found["crashes"]) == ("runnable", 0)


def test_a_release_waits_for_the_reaper_and_then_gives_nothing_back(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    owner, reaper = rows.other(), rows.other()
    with reaper.connection.transaction():
        assert reclaim(reaper, worker).ids == [claimed.id]
        releasing = rows.background(lambda: owner.release(worker, claimed))
        rows.wait_blocked(owner, releasing)
    assert releasing.result(20) == {}
    found = rows.live(claimed.id)
    assert found is not None
    assert (found["status"], found["crashes"]) == ("runnable", 1)


def test_a_release_that_comes_after_another_worker_claimed_the_row_changes_nothing(rows: Rows) -> None:
    worker, next_worker = rows.worker(), rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.bury(worker)
    rows.reclaim(worker, [])
    (again,) = rows.claim(next_worker)
    assert rows.release(worker, claimed) == {}
    assert rows.run(claims.held(next_worker)) == {again.id: again.token}
