"""Leases of worker processes, giving rows back, and taking them back from the dead."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from durable.instance import LIVE
from durable.storage import claims, maintenance, workers
from durable.storage.workers import Identity
from tests.fix_rows import Rows, done

# Giving back


def test_released_rows_keep_their_place_and_lose_nothing(rows: Rows) -> None:
    worker = rows.worker()
    first, second, third = rows.insert(3)
    claimed = rows.claim(worker, 2)
    before = rows.live(first)
    assert rows.release(worker, *claimed, reason="its worker was shut down") == {"default": 2}
    after = rows.live(first)
    assert before is not None
    assert after is not None
    assert {name for name in before if before[name] != after[name]} == {"status", "worker_id", "reason"}
    assert (after["status"], after["worker_id"], after["reason"]) == ("runnable", None, "its worker was shut down")
    assert (after["token"], after["version"], after["attempt"], after["crashes"]) == (1, 0, 0, 0)
    assert [row.id for row in rows.claim(worker)] == [first, second, third]
    assert rows.live(first)["reason"] is None  # type: ignore[index]


def test_a_release_counts_per_queue(rows: Rows) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 2, queue="a") + rows.claimed(worker, 1, queue="b")
    assert rows.release(worker, *reversed(claimed)) == {"a": 2, "b": 1}
    assert rows.release(worker, *claimed) == {}
    assert rows.release(worker) == {}


def test_only_the_owner_releases_and_only_its_present_claim(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    assert rows.release(worker + 1, claimed) == {}
    assert rows.release(worker, claimed._replace(token=0)) == {}
    assert rows.status(claimed.id) == "executing"


def test_a_row_whose_cancel_was_asked_meanwhile_is_released_into_the_history(rows: Rows) -> None:
    worker = rows.worker()
    one, two = rows.claimed(worker, 2)
    rows.cancel(one.id)
    assert rows.release(worker, one, two) == {"default": 1}
    row = rows.history(one.id)
    assert row is not None
    assert (row["status"], row["error"]["message"], row["version"]) == ("cancelled", "enough", 0)


# Taking back


def test_rows_of_a_dead_worker_count_a_crash_only_if_it_had_entered_them(rows: Rows) -> None:
    worker = rows.worker()
    entered, buffered = rows.claimed(worker, 2)
    rows.bury(worker)
    reclaimed = rows.reclaim(worker, [(entered.id, entered.token)])
    assert (reclaimed.by_queue, reclaimed.crashed, reclaimed.lost) == ({"default": 2}, [entered.id], [])
    assert sorted(reclaimed.ids) == [entered.id, buffered.id]
    for claimed, crashes in ((entered, 1), (buffered, 0)):
        row = rows.live(claimed.id)
        assert row is not None
        assert (row["status"], row["crashes"], row["worker_id"]) == ("runnable", crashes, None)
        assert (row["attempt"], row["version"], row["eligible_at"]) == (0, 0, claimed.eligible_at)


def test_what_was_entered_under_an_older_claim_counts_no_crash(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    assert rows.reclaim(worker, [(claimed.id, claimed.token - 1)]).crashed == []


def test_when_nothing_is_known_all_rows_count_a_crash(rows: Rows) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 3)
    assert sorted(rows.reclaim(worker, None).crashed) == [row.id for row in claimed]
    assert rows.claim(rows.worker()) == [], "they are claimed alone from now on"


def test_the_last_allowed_crash_fails_the_instance_with_its_cause(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    for crash in (1, 2):
        assert rows.reclaim(worker, None, most=3).lost == []
        row = rows.live(claimed.id)
        assert row is not None
        assert row["crashes"] == crash
        assert len(rows.run(claims.claim_suspect(worker, "default", []))) == 1
    reclaimed = rows.reclaim(worker, None, most=3)
    assert (reclaimed.lost, reclaimed.by_queue) == ([claimed.id], {})
    row = rows.history(claimed.id)
    assert row is not None
    assert (row["status"], row["crashes"], row["attempt"]) == ("failed", 3, 0)
    assert row["error"] == {"type": "WorkerLost", "message": "it died; that was crash 3 in this step"}


def test_a_committed_retry_forgets_the_crashes_of_its_step(rows: Rows) -> None:
    worker = rows.worker()
    rows.claimed(worker)
    rows.reclaim(worker, None)
    (claimed,) = rows.run(claims.claim_suspect(worker, "default", []))
    rows.flush(worker, claims.Commit(claimed, "runnable", attempt=1, delay=0.0))
    assert len(rows.claim(worker)) == 1


def test_a_reclaimed_row_whose_cancel_was_asked_ends_cancelled(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.cancel(claimed.id)
    reclaimed = rows.reclaim(worker, None, most=1)
    assert (reclaimed.by_queue, reclaimed.lost) == ({}, [])
    row = rows.history(claimed.id)
    assert row is not None
    assert (row["status"], row["error"]["type"]) == ("cancelled", "Cancelled")


def test_a_lost_instance_with_a_reserved_key_stays_where_its_key_is(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker, correlation_key="k", correlation_scope=(*sorted(LIVE), "failed"))
    rows.reclaim(worker, None, most=1)
    row = rows.live(claimed.id)
    assert row is not None
    assert row["status"] == "failed"


def test_a_reclaim_leaves_other_workers_and_finished_rows_alone(rows: Rows) -> None:
    one, two = rows.worker(), rows.worker()
    (theirs,) = rows.claimed(two)
    (finished,) = rows.claimed(one)
    rows.flush(one, done(finished))
    assert rows.reclaim(one, None).ids == []
    assert rows.status(theirs.id) == "executing"
    assert rows.status(finished.id) == "done"


def test_rows_whose_outcome_is_committing_are_skipped_and_met_later(rows: Rows) -> None:
    worker = rows.worker()
    committing, waiting = rows.claimed(worker, 2)
    rows.bury(worker)
    other = rows.other()
    with other.connection.transaction(force_rollback=True):
        other.fetch("SELECT FROM {schema}.instances WHERE id = %s FOR UPDATE", [committing.id])
        assert rows.reclaim(worker, None).ids == [waiting.id]
        assert rows.status(committing.id) == "executing"
    assert rows.reclaim(worker, None).ids == [committing.id]


# Leases


def expiry(rows: Rows, worker: int) -> timedelta:
    (row,) = rows.fetch("SELECT expires_at - clock_timestamp() AS rest FROM {schema}.workers WHERE id = %s", [worker])
    rest: timedelta = row["rest"]
    return rest


def test_a_heartbeat_extends_every_living_lease(rows: Rows) -> None:
    one, two = rows.worker(5.0), rows.worker(5.0)
    assert rows.run(workers.heartbeat([two, one], 60)) == {one, two}
    assert timedelta(seconds=55) < expiry(rows, one) <= timedelta(seconds=60)
    assert rows.run(workers.heartbeat([], 60)) == set()


def test_a_heartbeat_never_revives_the_dead(rows: Rows) -> None:
    living, dead = rows.worker(), rows.worker()
    rows.bury(dead)
    assert rows.run(workers.heartbeat([living, dead, 12345], 60)) == {living}
    assert rows.run(workers.heartbeat([dead], 60)) == set()
    rows.insert()
    assert rows.claim(dead) == []


def test_a_lease_that_ran_out_unnoticed_may_go_on(rows: Rows) -> None:
    """Nobody took its rows yet: what counts is being buried, not being late."""
    late = rows.worker(-5.0)
    rows.insert()
    assert rows.claim(late) == []
    assert rows.run(workers.heartbeat([late], 60)) == {late}
    assert len(rows.claim(late)) == 1


def test_burying_twice_keeps_the_first_moment(rows: Rows) -> None:
    worker = rows.worker()
    rows.bury(worker)
    (first,) = rows.fetch("SELECT dead_at FROM {schema}.workers")
    rows.bury(worker)
    assert rows.fetch("SELECT dead_at FROM {schema}.workers") == [first]
    assert first["dead_at"] is not None


def database_now(rows: Rows) -> datetime:
    return rows.run(maintenance.now())


def test_leases_that_ran_out_are_buried_and_described(rows: Rows) -> None:
    dead, living = rows.worker(-1.0), rows.worker()
    beat = rows.worker(-1.0, kind="beat")
    long_ago = database_now(rows) - timedelta(hours=1)
    buried = rows.run(workers.bury_expired(long_ago, 20, 0))
    assert sorted(buried) == [
        (dead, "worker process 1 of test on host"),
        (beat, "beat process 1 of test on host"),
    ]
    assert rows.run(workers.bury_expired(long_ago, 20, 0)) == []
    assert rows.run(workers.heartbeat([dead, living], 60)) == {living}


def test_only_time_in_which_the_reaper_was_connected_counts(rows: Rows) -> None:
    """An outage longer than the lease makes every lease look dead; the fleet must not be re-run for it."""
    dead = rows.worker(-3600.0)
    now = database_now(rows)
    assert rows.run(workers.bury_expired(now, 20, 0)) == []
    assert rows.run(workers.bury_expired(now - timedelta(seconds=10), 20, 0)) == []
    assert [worker for worker, _ in rows.run(workers.bury_expired(now - timedelta(seconds=21), 20, 0))] == [dead]


def test_nothing_is_buried_within_the_grace_after_postgres_started(rows: Rows) -> None:
    rows.worker(-1.0)
    long_ago = database_now(rows) - timedelta(days=365)
    assert rows.run(workers.bury_expired(long_ago, 20, 10**7)) == []
    assert len(rows.run(workers.bury_expired(long_ago, 20, 0))) == 1


def test_orphans_are_rows_of_dead_and_of_unknown_workers(rows: Rows) -> None:
    living, dead, gone, idle = (rows.worker() for _ in range(4))
    for worker in (living, dead, gone):
        rows.claimed(worker, 2)
    rows.bury(dead)
    rows.bury(idle)
    rows.fetch("DELETE FROM {schema}.workers WHERE id = %s", [gone])
    assert dict(rows.run(workers.orphaned())) == {
        dead: "worker process 1 of test on host",
        gone: "unknown worker process",
    }


def test_predecessors_are_the_living_leases_of_this_host_and_boot(rows: Rows) -> None:
    def lease(host: str, boot: str, command: int) -> int:
        return rows.run(workers.register(Identity("worker", "w", host, boot, 9, command, "s", "q", 2), 60))

    here, buried = lease("here", "b1", 11), lease("here", "b1", 12)
    lease("here", "b2", 13)
    lease("there", "b1", 14)
    rows.bury(buried)
    assert rows.run(workers.predecessors("here", "b1")) == [(here, 11, "s", "w")]


def test_a_registration_stores_who_it_is(rows: Rows) -> None:
    worker = rows.run(workers.register(Identity("worker", "w", "h", "b", 9, 8, "s", "q", 4), 60))
    (row,) = rows.fetch("SELECT * FROM {schema}.workers WHERE id = %s", [worker])
    assert (row["kind"], row["name"], row["host"], row["boot_id"], row["queue"], row["slots"]) == (
        "worker",
        "w",
        "h",
        "b",
        "q",
        4,
    )
    assert (row["pid"], row["command_pid"], row["command_start"], row["dead_at"]) == (9, 8, "s", None)
    assert rows.worker() > worker, "ids are never used again"


def test_leases_dead_for_an_hour_are_forgotten_unless_they_hold_rows(rows: Rows) -> None:
    old, holding, fresh, living = (rows.worker() for _ in range(4))
    rows.claimed(holding)
    for worker in (old, holding, fresh):
        rows.bury(worker)
    rows.fetch(
        "UPDATE {schema}.workers SET dead_at = dead_at - interval '2 hours' WHERE id = ANY(%s)", [[old, holding]]
    )
    assert rows.run(maintenance.sweep_workers()) == 1
    assert [row["id"] for row in rows.fetch("SELECT id FROM {schema}.workers ORDER BY id")] == [holding, fresh, living]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_reclaim_adds_up(count: int) -> None:
    total = workers.Reclaimed()
    for n in range(count):
        total.add(workers.Reclaimed({"a": 1}, [n], [n], [n]))
    assert (total.by_queue, total.crashed, total.lost, total.ids) == (
        {"a": count} if count else {},
        *[list(range(count))] * 3,
    )
