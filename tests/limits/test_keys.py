"""Concurrency keys without a gate (behaviour 35): at most one executes, whoever claims, and no wake-up is lost."""

from __future__ import annotations

import psycopg
import pytest

from durable.storage import admission, control, instances, lanes
from durable.storage.claims import Commit
from tests.fix_rows import Rows, done, new

KEY = "vendor:7"


def keyed(rows: Rows, count: int = 1, key: str = KEY, **options: object) -> list[int]:
    """Insert rows of one key, each by itself: candidates all of them."""
    return [rows.run(instances.insert(new(concurrency_key=key, **options))) for _ in range(count)]


def lane(rows: Rows, instance_id: int) -> str | None:
    row = rows.live(instance_id)
    assert row is not None
    return row["lane"]


def test_a_batch_takes_one_row_per_key_and_parks_the_others(rows: Rows) -> None:
    worker = rows.worker()
    sevens, eights = keyed(rows, 3), keyed(rows, 2, "vendor:8")
    claimed = rows.claim_limited(worker).rows
    assert [row.id for row in claimed] == [sevens[0], eights[0]]
    assert {lane(rows, i) for i in sevens[1:]} == {"key vendor:7"}
    assert lane(rows, eights[1]) == "key vendor:8"
    assert rows.claim_limited(worker).rows == []


def test_rows_without_a_key_are_claimed_as_ever_and_limited_ones_are_not(rows: Rows) -> None:
    worker = rows.worker()
    plain = rows.insert(3)
    keyed(rows, 2)
    assert [row.id for row in rows.claim(worker)] == plain


def test_a_second_executing_row_of_a_key_cannot_be_committed(rows: Rows) -> None:
    worker = rows.worker()
    keyed(rows, 2)
    rows.claim_limited(worker)
    with pytest.raises(psycopg.errors.UniqueViolation):
        rows.fetch(
            "UPDATE {schema}.instances SET status = 'executing', worker_id = %s, lane = NULL WHERE status = 'runnable'",
            [worker],
        )


def test_executing_rows_without_a_key_are_no_duplicates_of_each_other(rows: Rows) -> None:
    worker = rows.worker()
    rows.claimed(worker, 5)
    rows.insert(2, rate_limit="unknown")
    keyed(rows, 1)
    assert len(rows.claim_limited(worker).rows) == 1
    assert len(rows.fetch("SELECT FROM {schema}.instances WHERE status = 'executing'")) == 6


@pytest.mark.parametrize("kind", ["done", "failed", "retry", "later", "children"])
def test_every_outcome_opens_the_lane_in_its_own_transaction(rows: Rows, kind: str) -> None:
    worker = rows.worker()
    first, second, third = keyed(rows, 3)
    (claimed,) = rows.claim_limited(worker).rows
    commit = {
        "done": done(claimed),
        "failed": Commit(claimed, "failed", error='{"type": "E", "message": "m"}'),
        "retry": Commit(claimed, "runnable", attempt=1, delay=0.0),
        "later": Commit(claimed, "scheduled", kind="next", step="two", delay=60.0),
        "children": Commit(claimed, "awaiting_children", kind="children", children=[new()]),
    }[kind]
    session = rows.other()
    with session.connection.transaction():
        assert session.flush(worker, commit) == {first}
        assert lane(rows, second) == "key vendor:7"  # not yet
    assert (lane(rows, second), lane(rows, third)) == (None, "key vendor:7")
    if kind != "retry":
        assert [row.id for row in rows.claim_limited(worker).rows] == [second]


def test_a_row_given_back_a_row_of_a_dead_worker_and_an_expired_one_open_their_lane(rows: Rows) -> None:
    worker = rows.worker()
    first, second = keyed(rows, 2)
    (claimed,) = rows.claim_limited(worker).rows
    rows.claim_limited(worker)
    rows.release(worker, claimed)
    assert (lane(rows, first), lane(rows, second)) == (None, None)
    (claimed,) = rows.claim_limited(worker).rows
    assert (claimed.id, lane(rows, second)) == (first, "key vendor:7")
    rows.bury(worker)
    assert rows.reclaim(worker).by_queue == {"default": 2}
    assert lane(rows, second) is None


def test_an_inline_hop_keeps_the_key_and_opens_nothing(rows: Rows) -> None:
    worker = rows.worker()
    first, second = keyed(rows, 2)
    (claimed,) = rows.claim_limited(worker).rows
    hop = Commit(claimed, "executing", kind="next", step="two")
    assert rows.flush(worker, hop) == {first}
    assert lane(rows, second) == "key vendor:7"
    assert rows.claim_limited(worker).rows == []
    assert rows.flush(worker, done(hop.next_claim(inbox=False))) == {first}
    assert lane(rows, second) is None


def test_the_better_row_goes_first_whether_it_was_parked_or_has_just_come(rows: Rows) -> None:
    worker = rows.worker()
    (holder,) = keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    parked = keyed(rows, 2)
    rows.claim_limited(worker)
    (urgent,) = keyed(rows, priority=-1)
    late = keyed(rows)
    order = []
    for _ in range(4):
        rows.flush(worker, done(claimed))
        (claimed,) = rows.claim_limited(worker).rows
        order.append(claimed.id)
    assert order == [urgent, *parked, *late]
    assert holder not in order


def test_a_batch_is_inserted_parked_behind_its_best_row_and_never_written_again(rows: Rows) -> None:
    worker = rows.worker()
    batch = [new(concurrency_key=KEY, priority=2) for _ in range(5)]
    batch[3].priority = 1
    ids = rows.atomically(instances.insert_many([*batch, new(), new(concurrency_key=KEY, delay=60.0)]))
    assert [lane(rows, i) for i in ids if i] == ["key vendor:7"] * 3 + [None, "key vendor:7", None, None]
    (claimed,) = rows.claim_limited(worker).rows
    assert claimed.id == ids[3]


def test_a_batch_whose_best_row_is_a_duplicate_still_has_a_candidate(rows: Rows) -> None:
    rows.insert(1, correlation_key="order:1")
    batch = [new(concurrency_key=KEY, correlation_key="order:1", priority=-1), *[new(concurrency_key=KEY)] * 2]
    ids = rows.atomically(instances.insert_many(batch))
    assert ids[0] is None
    assert [row.id for row in rows.claim_limited(rows.worker()).rows] == [ids[1]]


def test_cancelling_a_candidate_or_purging_it_opens_its_lane(rows: Rows) -> None:
    first, second, third = rows.insert(3, concurrency_key=KEY)
    assert rows.cancel(first)
    assert (rows.status(first), lane(rows, second)) == ("cancelled", None)
    assert rows.cancel(second)
    (claimed,) = rows.claim_limited(rows.worker()).rows
    assert claimed.id == third


def test_a_parked_row_is_cancelled_at_once(rows: Rows) -> None:
    worker = rows.worker()
    _, second, third = rows.insert(3, concurrency_key=KEY)
    (claimed,) = rows.claim_limited(worker).rows
    assert rows.cancel(second)
    assert rows.status(second) == "cancelled"
    rows.flush(worker, done(claimed))
    assert [row.id for row in rows.claim_limited(worker).rows] == [third]


def test_a_row_with_a_crash_behind_it_is_claimed_alone(rows: Rows) -> None:
    worker = rows.worker()
    (suspect,) = keyed(rows)
    rows.claim_limited(worker)
    rows.bury(worker)
    rows.reclaim(worker)
    keyed(rows, 1, "other")
    worker = rows.worker()
    busy = rows.claim_limited(worker, alone=False)
    assert [row.concurrency_key for row in busy.rows] == ["other"]
    assert busy.suspect
    alone = rows.claim_limited(worker, alone=True)
    assert [(row.id, row.crashes) for row in alone.rows] == [(suspect, 1)]


def test_a_worker_whose_lease_is_over_claims_nothing(rows: Rows) -> None:
    keyed(rows)
    assert rows.claim_limited(rows.worker(ttl=-1)).rows == []


def test_a_machine_that_this_worker_does_not_know_holds_up_neither_the_queue_nor_its_key(rows: Rows) -> None:
    worker = rows.worker()
    (strange,) = keyed(rows, machine="old")
    known = keyed(rows, 2)
    unknown = ["old:1"]
    (claimed,) = rows.claim_limited(worker, unknown=unknown).rows
    assert claimed.id == known[0]
    # Parked behind it, it comes out as a candidate for others, and the next known one is claimed.
    other = rows.worker()
    assert rows.claim_limited(other).rows == []
    assert lane(rows, strange) == "key vendor:7"
    rows.flush(worker, done(claimed))
    rows.claim_limited(worker, unknown=unknown)
    rows.atomically(lanes.repair())
    assert [row.id for row in rows.claim_limited(worker, unknown=unknown).rows] == [known[1]]


def test_limited_rows_do_not_overtake_unlimited_ones(rows: Rows) -> None:
    worker = rows.worker()
    (early,) = keyed(rows)
    rows.insert(1)
    (late,) = keyed(rows, 1, "other")
    head = (-32768, rows.fetch("SELECT clock_timestamp() - interval '1 day' AS t")[0]["t"])
    assert [row.id for row in rows.claim_limited(worker, position=head).rows] == [early]
    rows.claim(worker)
    assert [row.id for row in rows.claim_limited(worker, position=head).rows] == [late]


def test_limited_rows_of_a_paused_queue_are_not_looked_for(rows: Rows) -> None:
    worker = rows.worker()
    (one,) = keyed(rows)
    rows.run(control.pause("default"))
    assert rows.run(admission.limited_waits("default", ())) == (False, None)
    assert rows.claim_limited(worker).rows == []
    rows.run(control.resume("default"))
    assert rows.run(admission.limited_waits("default", ()))[0]
    assert [row.id for row in rows.claim_limited(worker).rows] == [one]
