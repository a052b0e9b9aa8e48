"""An outcome against a reaper and against a cancel, in both orders and for every kind of outcome."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from durable import DuplicateError
from durable.instance import Claimed
from durable.storage import claims, instances, maintenance, partitions, workers
from durable.storage.claims import Commit
from tests.fix_rows import Rows, Session, done, new
from tests.interleaving import AFTER, OUTCOMES

# What a park finds in its inbox and what an inline hop keeps are in test_stale.py.
KINDS = [kind for kind in OUTCOMES if kind not in ("await what is there", "inline hop")]
OVER = {"done", "done, key kept", "failed", "stop", "cancel"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def outcome(kind: str, claimed: Claimed) -> Commit:
    return OUTCOMES[kind](claimed, ())


def flushing(rows: Rows, session: Session, worker: int, commit: Commit) -> Future[set[int]]:
    return rows.background(lambda: session.flush(worker, commit))


# Outcome and reaper


@every_kind
def test_a_reaper_skips_a_row_whose_outcome_is_committing(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.bury(worker)
    owner = rows.other()
    with owner.connection.transaction():
        assert owner.flush(worker, outcome(kind, claimed)) == {claimed.id}
        assert rows.reclaim(worker).ids == []
        assert rows.status(claimed.id) == "executing"
    assert rows.reclaim(worker).ids == []
    assert rows.status(claimed.id) == AFTER[kind]


@every_kind
def test_a_reaper_takes_the_row_when_the_outcome_was_rolled_back(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.bury(worker)
    owner = rows.other()
    with owner.connection.transaction(force_rollback=True):
        owner.flush(worker, outcome(kind, claimed))
    assert rows.reclaim(worker).ids == [claimed.id]
    assert rows.status(claimed.id) == "runnable"


@every_kind
def test_an_outcome_waits_for_the_reaper_and_is_then_stale(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.bury(worker)
    owner, reaper = rows.other(), rows.other()
    with reaper.connection.transaction():
        assert reaper.run(workers.reclaim(worker, None, 3, "it died")).ids == [claimed.id]
        going = flushing(rows, owner, worker, outcome(kind, claimed))
        rows.wait_blocked(owner, going)
    assert going.result(20) == set()
    row = rows.live(claimed.id)
    assert row is not None
    assert (row["status"], row["version"], row["crashes"], row["result"]) == ("runnable", 0, 1, None)
    assert owner.run(claims.resolve([outcome(kind, claimed)])).committed == set()


@every_kind
def test_an_outcome_commits_when_the_reaper_rolls_back(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    owner, reaper = rows.other(), rows.other()
    with reaper.connection.transaction(force_rollback=True):
        reaper.run(workers.reclaim(worker, None, 3, "it died"))
        going = flushing(rows, owner, worker, outcome(kind, claimed))
        rows.wait_blocked(owner, going)
    assert going.result(20) == {claimed.id}
    assert rows.status(claimed.id) == AFTER[kind]


def test_a_batch_waits_for_one_taken_row_and_commits_its_neighbours(rows: Rows) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 4)
    owner, reaper = rows.other(), rows.other()
    with reaper.connection.transaction():
        reaper.fetch(
            "UPDATE {schema}.instances SET status = 'runnable', worker_id = NULL, crashes = 1 WHERE id = %s",
            [claimed[1].id],
        )
        going = rows.background(lambda: owner.flush(worker, *(done(row) for row in claimed)))
        rows.wait_blocked(owner, going)
    assert going.result(20) == {row.id for row in claimed} - {claimed[1].id}
    assert [rows.status(row.id) for row in claimed] == ["done", "runnable", "done", "done"]


# Outcome and cancel


@every_kind
def test_an_outcome_that_commits_first_wins_over_a_cancel(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    owner, canceller = rows.other(), rows.other()
    with owner.connection.transaction():
        owner.flush(worker, outcome(kind, claimed))
        cancelling = rows.background(lambda: canceller.cancel(claimed.id))
        rows.wait_blocked(canceller, cancelling)
    over = kind in OVER
    assert cancelling.result(20) is not over
    assert rows.status(claimed.id) == (AFTER[kind] if over else "cancelled")


@every_kind
def test_a_cancel_that_commits_first_makes_the_outcome_cancelled(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    owner, canceller = rows.other(), rows.other()
    with canceller.connection.transaction():
        assert canceller.run(instances.cancel(claimed.id, "enough")).found
        going = flushing(rows, owner, worker, outcome(kind, claimed))
        rows.wait_blocked(owner, going)
    assert going.result(20) == {claimed.id}
    row = rows.history(claimed.id)
    assert row is not None
    assert (row["status"], row["result"], row["error"]["message"]) == ("cancelled", None, "enough")


def test_a_cancel_and_a_reaper_end_in_one_cancelled_row_in_both_orders(rows: Rows) -> None:
    for first in ("cancel", "reclaim"):
        worker = rows.worker()
        (claimed,) = rows.claimed(worker)
        one, two = rows.other(), rows.other()
        with one.connection.transaction():
            if first == "cancel":
                assert one.run(instances.cancel(claimed.id, "enough")).found
                assert two.atomically(workers.reclaim(worker, None, 3, "it died")).ids == [], "it skips what is locked"
            else:
                assert one.run(workers.reclaim(worker, None, 3, "it died")).ids == [claimed.id]
                cancelling = rows.background(lambda two=two, claimed=claimed: two.cancel(claimed.id))  # type: ignore[misc]
                rows.wait_blocked(two, cancelling)
        if first == "cancel":
            assert rows.reclaim(worker).by_queue == {}
        else:
            assert cancelling.result(20)
        assert rows.status(claimed.id) == "cancelled"


# Claim and cancel, promotion and cancel


def test_a_claim_skips_a_row_that_is_being_cancelled(rows: Rows) -> None:
    worker = rows.worker()
    (instance,) = rows.insert()
    canceller = rows.other()
    with canceller.connection.transaction():
        assert canceller.run(instances.cancel(instance, "enough")).found
        assert rows.claim(worker) == []
    assert rows.claim(worker) == []
    assert rows.status(instance) == "cancelled"


def test_a_cancel_waits_for_a_claim_and_then_asks_the_step(rows: Rows) -> None:
    worker = rows.worker()
    (instance,) = rows.insert()
    claimer, canceller = rows.other(), rows.other()
    with claimer.connection.transaction():
        (claimed,) = claimer.claim(worker)
        cancelling = rows.background(lambda: canceller.cancel(instance))
        rows.wait_blocked(canceller, cancelling)
    assert cancelling.result(20)
    assert rows.status(instance) == "executing"
    rows.flush(worker, done(claimed))
    assert rows.status(instance) == "cancelled"


def due_row(rows: Rows) -> int:
    (instance,) = rows.insert(delay=60.0)
    rows.fetch("UPDATE {schema}.instances SET eligible_at = clock_timestamp() WHERE id = %s", [instance])
    return instance


def test_a_cancel_waits_for_a_promotion_and_then_cancels(rows: Rows) -> None:
    instance = due_row(rows)
    beat, canceller = rows.other(), rows.other()
    with beat.connection.transaction():
        assert beat.run(maintenance.promote()) == {"default": 1}
        cancelling = rows.background(lambda: canceller.cancel(instance))
        rows.wait_blocked(canceller, cancelling)
    assert cancelling.result(20)
    assert rows.status(instance) == "cancelled"
    assert rows.claim(rows.worker()) == []


def test_a_promotion_skips_a_row_that_is_being_cancelled(rows: Rows) -> None:
    instance, other = due_row(rows), due_row(rows)
    canceller = rows.other()
    with canceller.connection.transaction():
        assert canceller.run(instances.cancel(instance, "enough")).found
        assert rows.run(maintenance.promote()) == {"default": 1}
    assert rows.run(maintenance.promote()) == {}
    assert (rows.status(instance), rows.status(other)) == ("cancelled", "runnable")


# Claim and claim


def test_a_claim_that_is_rolled_back_leaves_its_rows_to_the_next(rows: Rows) -> None:
    worker = rows.worker()
    ids = rows.insert(3)
    other = rows.other()
    with other.connection.transaction(force_rollback=True):
        assert len(other.claim(worker)) == 3
        assert rows.claim(worker) == []
    claimed = rows.claim(worker)
    assert [row.id for row in claimed] == ids
    assert {row.token for row in claimed} == {1}


def test_many_claimers_share_a_queue_without_a_row_twice(rows: Rows) -> None:
    ids = rows.insert(600)
    sessions = [(rows.other(), rows.worker()) for _ in range(4)]

    def drain(session: Session, worker: int) -> list[int]:
        got = []
        while batch := session.claim(worker, 7):
            got += [row.id for row in batch]
        return got

    going = [rows.background(lambda s=session, w=worker: drain(s, w)) for session, worker in sessions]  # type: ignore[misc]
    got = [instance for future in going for instance in future.result(30)]
    got += drain(rows, rows.worker())
    assert sorted(got) == ids


# Outcome and garbage collection


def test_a_flush_in_progress_makes_a_partitions_drop_give_up_not_wait(rows: Rows) -> None:
    day = _old_partition(rows)
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    owner = rows.other()
    with owner.connection.transaction():
        assert owner.flush(worker, done(claimed)) == {claimed.id}
        assert partitions.drop_before(rows.connection, rows.sql, 86400.0) == []
    assert partitions.drop_before(rows.connection, rows.sql, 86400.0) == [day]
    assert rows.status(claimed.id) == "done"


@every_kind
def test_a_flush_behind_a_partitions_drop_commits_after_it(rows: Rows, kind: str) -> None:
    day = _old_partition(rows)
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    owner, collector = rows.other(), rows.other()
    with collector.connection.transaction():
        collector.fetch(f"DROP TABLE {{schema}}.{day}")
        going = flushing(rows, owner, worker, outcome(kind, claimed))
        if kind in OVER:
            rows.wait_blocked(owner, going)
    assert going.result(20) == {claimed.id}
    assert rows.status(claimed.id) == AFTER[kind]


def _old_partition(rows: Rows) -> str:
    (row,) = rows.fetch("SELECT (now() AT TIME ZONE 'UTC')::date - 9 AS day")
    with rows.connection.transaction():
        partitions._create(rows.connection, rows.sql, row["day"])
    return f"history_{row['day']:%Y%m%d}"


# Outcome and key


def test_a_key_is_inserted_again_the_moment_its_occupant_ends(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker, correlation_key="k")
    owner, producer = rows.other(), rows.other()
    with owner.connection.transaction():
        owner.flush(worker, done(claimed))
        inserting = rows.background(lambda: producer.run(instances.insert(new(correlation_key="k"))))
        rows.wait_blocked(producer, inserting)
    assert inserting.result(20) > claimed.id


def test_a_key_stays_occupied_when_the_outcome_was_rolled_back(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker, correlation_key="k")
    owner, producer = rows.other(), rows.other()
    with owner.connection.transaction(force_rollback=True):
        owner.flush(worker, done(claimed))
        inserting = rows.background(lambda: producer.run(instances.insert(new(correlation_key="k"))))
        rows.wait_blocked(producer, inserting)
    with pytest.raises(DuplicateError) as caught:
        inserting.result(20)
    assert caught.value.existing_id == claimed.id
