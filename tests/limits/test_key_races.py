"""Claims, ends and cancels of one key stepped against each other: no second holder, no lost wake-up (behaviour 35)."""

from __future__ import annotations

import pytest

from durable.storage import instances, workers
from durable.storage.admission import Demand, claim_limited
from durable.storage.claims import Commit
from tests.fix_rows import Rows, done, new

KEY = "vendor:7"


def keyed(rows: Rows, count: int = 1, **options: object) -> list[int]:
    return [rows.run(instances.insert(new(concurrency_key=KEY, **options))) for _ in range(count)]


def lanes_of(rows: Rows, ids: list[int]) -> list[str | None]:
    found = rows.fetch("SELECT lane FROM {schema}.instances WHERE id = ANY (%s) ORDER BY id", [ids])
    return [row["lane"] for row in found]


def demand(worker: int, **options: object) -> Demand:
    return Demand(**{"worker": worker, "queue": "default", "limit": 10, "slots": 1, "alone": True, **options})  # type: ignore[arg-type]


def test_two_claims_at_once_take_one_row_of_a_key_and_neither_waits(rows: Rows) -> None:
    keyed(rows, 2)
    first, second = rows.other(), rows.other()
    worker, rival = rows.worker(), rows.worker()
    with first.connection.transaction():
        got = first.run(claim_limited(demand(worker, window=1)))
        assert len(got.rows) == 1
        with second.connection.transaction():
            other = second.run(claim_limited(demand(rival)))
        assert (other.rows, other.parked, other.again) == ([], 0, True)
    assert rows.claim_limited(rival).rows == []


def test_a_claim_that_is_rolled_back_leaves_the_key_to_the_other(rows: Rows) -> None:
    (only,) = keyed(rows)
    first = rows.other()
    worker, rival = rows.worker(), rows.worker()
    with first.connection.transaction(force_rollback=True):
        assert len(first.run(claim_limited(demand(worker))).rows) == 1
        assert rows.claim_limited(rival).rows == []
    assert [row.id for row in rows.claim_limited(rival).rows] == [only]


def test_an_end_waits_for_a_claim_that_parks_and_sees_what_it_parked(rows: Rows) -> None:
    worker = rows.worker()
    keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    (waiter,) = keyed(rows)
    parking, ending = rows.other(), rows.other()
    with parking.connection.transaction():
        assert parking.run(claim_limited(demand(worker))).parked == 1
        going = rows.background(lambda: ending.flush(worker, done(claimed)))
        rows.wait_blocked(ending, going)
    assert going.result(20) == {claimed.id}
    assert lanes_of(rows, [waiter]) == [None]


def test_a_claim_that_meets_an_end_in_progress_parks_nothing(rows: Rows) -> None:
    worker = rows.worker()
    keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    (waiter,) = keyed(rows)
    ending = rows.other()
    with ending.connection.transaction():
        assert ending.flush(worker, done(claimed)) == {claimed.id}
        met = rows.claim_limited(worker)
        assert (met.rows, met.parked, met.again) == ([], 0, True)
        assert lanes_of(rows, [waiter]) == [None]
    assert [row.id for row in rows.claim_limited(worker).rows] == [waiter]


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
def test_an_end_that_is_rolled_back_leaves_nothing_open(rows: Rows, committed: bool) -> None:
    worker = rows.worker()
    keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    waiters = keyed(rows, 2)
    rows.claim_limited(worker)
    ending = rows.other()
    with ending.connection.transaction(force_rollback=not committed):
        ending.flush(worker, done(claimed))
    assert lanes_of(rows, waiters) == [None if committed else "key vendor:7", "key vendor:7"]


def test_an_end_passes_over_a_parked_row_that_is_being_cancelled(rows: Rows) -> None:
    worker = rows.worker()
    keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    waiters = keyed(rows, 3)
    rows.claim_limited(worker)
    canceller = rows.other()
    with canceller.connection.transaction():
        canceller.run(instances.cancel(waiters[0], "enough"))  # it opens the lane too, for the next one
        rows.flush(worker, done(claimed))
        assert lanes_of(rows, waiters) == ["key vendor:7", "key vendor:7", None]
    assert rows.status(waiters[0]) == "cancelled"
    assert lanes_of(rows, waiters[1:]) == [None, None]


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "rolled back"])
def test_an_end_waits_for_the_only_parked_row_while_somebody_holds_it(rows: Rows, cancelled: bool) -> None:
    worker = rows.worker()
    keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    (waiter,) = keyed(rows)
    rows.claim_limited(worker)
    canceller, ending = rows.other(), rows.other()
    with canceller.connection.transaction(force_rollback=not cancelled):
        canceller.run(instances.cancel(waiter, "enough"))
        going = rows.background(lambda: ending.flush(worker, done(claimed)))
        rows.wait_blocked(ending, going)
    assert going.result(20) == {claimed.id}
    assert rows.status(waiter) == ("cancelled" if cancelled else "runnable")
    assert lanes_of(rows, [waiter]) == ([] if cancelled else [None])


def test_a_reaper_skips_a_holder_whose_end_commits_and_the_lane_is_opened_once(rows: Rows) -> None:
    worker = rows.worker()
    keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    waiters = keyed(rows, 2)
    rows.claim_limited(worker)
    rows.bury(worker)
    ending, reaper = rows.other(), rows.other()
    with ending.connection.transaction():
        ending.flush(worker, done(claimed))
        assert reaper.atomically(workers.reclaim(worker, None, 3, "it died")).ids == []
    assert lanes_of(rows, waiters) == [None, "key vendor:7"]


def test_a_retry_and_the_row_it_let_out_are_never_both_admitted(rows: Rows) -> None:
    worker = rows.worker()
    (first,) = keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    (second,) = keyed(rows)
    rows.claim_limited(worker)
    rows.flush(worker, Commit(claimed, "runnable", attempt=1, delay=0.0))
    assert lanes_of(rows, [first, second]) == [None, None]
    admitted = rows.claim_limited(worker)
    assert (len(admitted.rows), admitted.parked) == (1, 1)
    assert admitted.rows[0].id == second, "the retried row is eligible later"
