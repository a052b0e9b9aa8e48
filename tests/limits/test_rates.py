"""Rate limits (behaviours 38, 39): cold buckets, strict order, weights, both limits on a row, lanes opened by time."""

from __future__ import annotations

from datetime import timedelta

import pytest

from durable import ConcurrencyLimit, RateLimit
from durable.storage import admission, instances, lanes, limits
from durable.storage.admission import Demand, claim_limited
from durable.storage.claims import Commit
from tests.fix_rows import Rows, done, new


def rate(rows: Rows, allowed: int = 1, period: float = 3600.0, burst: int = 1, shards: int = 1) -> None:
    rows.atomically(limits.put({("rate", "mail"): RateLimit(allowed, period, burst, shards)}))


def insert(rows: Rows, count: int = 1, **options: object) -> list[int]:
    """Rows that draw from the bucket, each inserted by itself."""
    given = {"rate_limit": "mail", **options}
    return [rows.run(instances.insert(new(**given))) for _ in range(count)]


def claimed(rows: Rows, worker: int, slots: int = 100, **options: object) -> list[int]:
    return [row.id for row in rows.claim_limited(worker, slots=slots, **options).rows]


def lane(rows: Rows, instance_id: int) -> str | None:
    row = rows.live(instance_id)
    assert row is not None
    return row["lane"]


def pass_time(rows: Rows, seconds: float) -> None:
    """Let buckets believe that time has passed."""
    rows.fetch(
        "UPDATE {schema}.buckets SET full_at = full_at - make_interval(secs => %s),"
        " opens_at = opens_at - make_interval(secs => %s)",
        [seconds, seconds],
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_a_cold_bucket_gives_its_burst_at_once_and_no_more(rows: Rows, shards: int) -> None:
    rate(rows, burst=5, shards=shards)
    worker = rows.worker()
    ids = insert(rows, 8)
    admitted = rows.claim_limited(worker, slots=100)
    assert [row.id for row in admitted.rows] == ids[:5]
    assert admitted.parked == 3
    assert claimed(rows, worker) == []
    assert {lane(rows, i) for i in ids[5:]} == {"rate mail"}


def test_partitions_have_buckets_of_their_own(rows: Rows) -> None:
    rate(rows, burst=2)
    ids = insert(rows, 3, rate_limit="mail:a") + insert(rows, 3, rate_limit="mail:b")
    assert claimed(rows, rows.worker()) == [ids[0], ids[1], ids[3], ids[4]]


def test_two_claims_that_find_a_cold_bucket_grant_no_more_than_it_holds(rows: Rows) -> None:
    rate(rows, burst=4)
    insert(rows, 8)
    worker, rival = rows.worker(), rows.worker()
    first, second = rows.other(), rows.other()
    with first.connection.transaction():
        got = first.run(claim_limited(Demand(worker, "default", 10, 10, True, window=3)))
        assert len(got.rows) == 3
        with second.connection.transaction():
            other = second.run(claim_limited(Demand(rival, "default", 10, 10, True)))
        assert (other.rows, other.parked, other.again) == ([], 0, True)
    assert len(claimed(rows, rival)) == 1  # on the winner's row


def test_a_claim_that_is_rolled_back_takes_no_token(rows: Rows) -> None:
    rate(rows, burst=1)
    insert(rows, 2)
    session, worker = rows.other(), rows.worker()
    with session.connection.transaction(force_rollback=True):
        assert len(session.run(claim_limited(Demand(worker, "default", 10, 10, True))).rows) == 1
    assert len(claimed(rows, worker)) == 1


def test_tokens_come_back_with_time_and_never_more_than_the_burst(rows: Rows) -> None:
    rate(rows, allowed=1, period=60.0, burst=3)
    worker = rows.worker()
    insert(rows, 10)
    assert len(claimed(rows, worker)) == 3
    pass_time(rows, 59.0)
    assert claimed(rows, worker) == []
    pass_time(rows, 1.0)
    assert len(claimed(rows, worker)) == 1
    pass_time(rows, 3600.0)
    assert len(claimed(rows, worker)) == 3


def test_a_heavy_row_waits_for_its_weight_and_nobody_overtakes_it(rows: Rows) -> None:
    rate(rows, allowed=1, period=60.0, burst=5)
    worker = rows.worker()
    light, heavy, later = insert(rows, 1, weight=3) + insert(rows, 1, weight=4) + insert(rows, 1)
    assert claimed(rows, worker) == [light]
    assert (lane(rows, heavy), lane(rows, later)) == ("rate mail", "rate mail")
    (urgent,) = insert(rows, 1, priority=-1, weight=2)
    assert claimed(rows, worker) == [urgent], "by priority it comes before the heavy one"
    pass_time(rows, 3 * 60.0)
    assert claimed(rows, worker) == []
    pass_time(rows, 60.0)
    assert claimed(rows, worker) == [heavy]
    pass_time(rows, 60.0)
    assert claimed(rows, worker) == [later]


def test_weights_are_taken_in_order_of_priority(rows: Rows) -> None:
    rate(rows, burst=6)
    low, high = insert(rows, 2, weight=3, priority=5), insert(rows, 1, weight=3, priority=1)
    assert claimed(rows, rows.worker()) == [high[0], low[0]]


def test_a_denied_row_is_parked_and_otherwise_unchanged(rows: Rows) -> None:
    rate(rows, burst=1)
    worker = rows.worker()
    _, denied = insert(rows, 2)
    before = rows.live(denied)
    claimed(rows, worker)
    assert before is not None
    assert rows.live(denied) == {**before, "lane": "rate mail"}
    for _ in range(3):
        claimed(rows, worker)
    again = rows.fetch("SELECT xmin FROM {schema}.instances WHERE id = %s", [denied])
    claimed(rows, worker)
    assert rows.fetch("SELECT xmin FROM {schema}.instances WHERE id = %s", [denied]) == again, "not written again"


def test_rows_with_a_rate_limit_are_claimed_only_for_slots_that_wait(rows: Rows) -> None:
    rate(rows, burst=10)
    worker = rows.worker()
    first, second, _ = insert(rows, 3)
    busy = rows.claim_limited(worker, slots=0)
    assert (busy.rows, busy.wants_slot, busy.parked) == ([], True, 0)
    assert claimed(rows, worker, slots=1) == [first]
    assert claimed(rows, worker, slots=1) == [second]


def test_what_a_claim_leaves_is_passed_on_to_others(rows: Rows) -> None:
    rate(rows, burst=3)
    rows.insert(10, rate_limit="mail")  # one candidate, nine parked
    admitted = rows.claim_limited(rows.worker(), slots=1)
    assert len(admitted.rows) == 1
    assert admitted.ready == {"default": 2}
    assert [claimed(rows, rows.worker(), slots=1) != [] for _ in range(3)] == [True, True, False]


def test_slot_and_token_are_taken_only_by_rows_that_get_both(rows: Rows) -> None:
    rate(rows, burst=1)
    rows.atomically(limits.put({("concurrency", "vendor"): ConcurrencyLimit(2)}))
    worker = rows.worker()
    both = insert(rows, 3, concurrency_key="vendor:7")
    (only_key,) = [rows.run(instances.insert(new(concurrency_key="vendor:7")))]
    assert claimed(rows, worker) == [both[0], only_key]
    (gate,) = rows.fetch("SELECT used FROM {schema}.gates")
    assert gate["used"] == 2
    assert lane(rows, both[1]) == "rate mail" or lane(rows, both[1]) == "key vendor:7"


def test_a_row_denied_by_its_rate_draws_no_slot(rows: Rows) -> None:
    rate(rows, burst=1)
    rows.atomically(limits.put({("concurrency", "vendor"): ConcurrencyLimit(5)}))
    worker = rows.worker()
    insert(rows, 4, concurrency_key="vendor:7")
    assert len(claimed(rows, worker)) == 1
    assert [row["used"] for row in rows.fetch("SELECT used FROM {schema}.gates")] == [1]


def test_a_row_denied_by_its_key_takes_no_token(rows: Rows) -> None:
    rate(rows, burst=2)
    worker = rows.worker()
    first, second = insert(rows, 2, concurrency_key="vendor:7")
    assert claimed(rows, worker) == [first]
    assert lane(rows, second) == "key vendor:7"
    (free,) = insert(rows)
    assert claimed(rows, worker) == [free]


def test_a_rate_limits_name_before_a_keys_colon_still_means_exclusion(rows: Rows) -> None:
    rate(rows, burst=100)
    rows.insert(5, concurrency_key="mail:7")
    assert len(claimed(rows, rows.worker())) == 1


def test_a_lane_opens_when_its_first_row_may_go(rows: Rows) -> None:
    rate(rows, allowed=1, period=10.0, burst=4)
    worker = rows.worker()
    insert(rows, 1, weight=4)
    claimed(rows, worker)
    heavy = insert(rows, 1, weight=3)
    insert(rows, 2)
    admitted = rows.claim_limited(worker, slots=5)
    assert admitted.opens_in == pytest.approx(30.0, abs=1.0)
    pass_time(rows, 30.0)
    admitted = rows.claim_limited(worker, slots=5)
    assert [row.id for row in admitted.rows] == heavy
    assert admitted.opens_in == pytest.approx(10.0, abs=1.0)
    pass_time(rows, 3600.0)
    assert len(claimed(rows, worker)) == 2
    pass_time(rows, 3600.0)
    rows.claim_limited(worker)
    assert rows.fetch("SELECT FROM {schema}.buckets WHERE opens_at IS NOT NULL") == []


def test_a_beat_lets_one_row_out_of_a_lane_that_no_worker_opened(rows: Rows) -> None:
    rate(rows, allowed=1, period=10.0, burst=1)
    worker = rows.worker()
    insert(rows, 4)
    claimed(rows, worker)
    assert rows.run(lanes.open_due_lanes()) == {}
    pass_time(rows, 10.1)
    assert rows.run(lanes.open_due_lanes()) == {"default": 1}
    assert rows.run(lanes.open_due_lanes()) == {}, "again a second later"
    assert len(claimed(rows, worker)) == 1


def test_a_retry_draws_again_and_the_next_step_does_not(rows: Rows) -> None:
    rate(rows, burst=2)
    worker = rows.worker()
    insert(rows)
    (row,) = rows.claim_limited(worker).rows
    rows.flush(worker, Commit(row, "runnable", attempt=1, delay=0.0))
    (row,) = rows.claim_limited(worker).rows
    rows.flush(worker, Commit(row, "runnable", attempt=2, delay=0.0))
    assert rows.claim_limited(worker).rows == []
    pass_time(rows, 3600.0)
    (row,) = rows.claim_limited(worker).rows
    rows.flush(worker, Commit(row, "runnable", kind="next", step="two"))
    (row,) = rows.claim(worker)
    assert (row.step, row.rate_limit) == ("two", None)


def test_a_candidate_that_is_cancelled_leaves_its_lane_open(rows: Rows) -> None:
    rate(rows, burst=1)
    first, second = rows.insert(2, rate_limit="mail")
    assert lane(rows, second) == "rate mail"
    assert rows.cancel(first)
    assert lane(rows, second) is None
    assert claimed(rows, rows.worker()) == [second]


def test_a_row_whose_limit_is_gone_waits_and_goes_on_when_it_is_back(rows: Rows) -> None:
    rate(rows, burst=5)
    worker = rows.worker()
    ids = insert(rows, 2)
    rows.atomically(limits.drop("rate", "mail"))
    admitted = rows.claim_limited(worker, slots=5)
    assert (admitted.rows, admitted.parked) == ([], 2)
    assert rows.atomically(lanes.repair())[0] == {}
    rate(rows, burst=5)
    assert claimed(rows, worker) == ids


def test_a_row_heavier_than_a_burst_that_was_lowered_goes_when_the_bucket_is_full_and_owes_the_rest(rows: Rows) -> None:
    rate(rows, allowed=1, period=60.0, burst=5)
    worker = rows.worker()
    heavy, after = insert(rows, 1, weight=5) + insert(rows)
    rate(rows, allowed=1, period=60.0, burst=2)
    assert claimed(rows, worker) == [heavy]
    pass_time(rows, 3 * 60.0)
    assert claimed(rows, worker) == []
    pass_time(rows, 60.0)
    assert claimed(rows, worker) == [after]


def test_the_repair_opens_a_lane_that_nobody_would(rows: Rows) -> None:
    rate(rows, burst=1)
    worker = rows.worker()
    _, second, _ = insert(rows, 3)
    claimed(rows, worker)
    rows.fetch("UPDATE {schema}.buckets SET opens_at = NULL")
    assert rows.atomically(lanes.repair())[0] == {"default": 1}
    assert lane(rows, second) is None


def test_full_buckets_are_swept_and_are_cold_again(rows: Rows) -> None:
    rate(rows, burst=2)
    worker = rows.worker()
    insert(rows, 2)
    claimed(rows, worker)
    rows.run(lanes.sweep())
    assert len(rows.fetch("SELECT FROM {schema}.buckets")) == 1
    pass_time(rows, 3 * 3600.0)
    rows.run(lanes.sweep())
    assert rows.fetch("SELECT FROM {schema}.buckets") == []
    insert(rows, 3)
    assert len(claimed(rows, worker)) == 2


def test_a_shard_that_nobody_has_drawn_from_is_full(rows: Rows) -> None:
    rate(rows, burst=4, shards=2)
    worker = rows.worker()
    insert(rows)
    assert len(claimed(rows, worker)) == 1
    insert(rows, 4)
    assert len(claimed(rows, worker)) == 3


def test_a_shard_is_not_swept_before_the_others(rows: Rows) -> None:
    """A token of a shard takes two hours here. What is missing beside a shard counts as drawn like that one."""
    rate(rows, burst=4, shards=2)
    worker = rows.worker()
    insert(rows, 3)
    assert len(claimed(rows, worker)) == 3
    pass_time(rows, 2 * 3600.0 + 120.0)
    rows.run(lanes.sweep())
    insert(rows, 5)
    assert len(claimed(rows, worker)) == 3


def test_rates_keep_to_the_clock_of_the_database(rows: Rows) -> None:
    """Real time: 50 a second, one at once; every claim's moment is noted by the database."""
    rate(rows, allowed=50, period=1.0, burst=1)
    worker = rows.worker()
    rows.insert(20, rate_limit="mail")
    moments = []
    while len(moments) < 20:
        for row in rows.claim_limited(worker).rows:
            (now,) = rows.fetch("SELECT clock_timestamp() AS now")
            moments.append(now["now"])
            rows.flush(worker, done(row))
    for n in range(1, 20):
        # Granted at one moment and looked at a little later: a window of n tokens may look shorter by that, no more.
        assert moments[n] - moments[0] >= timedelta(milliseconds=20 * n) - timedelta(milliseconds=15)


def test_a_lane_that_was_to_open_closes_when_its_limit_is_gone(rows: Rows) -> None:
    rate(rows, allowed=1, period=10.0, burst=1)
    worker = rows.worker()
    insert(rows, 3)
    claimed(rows, worker)
    rows.atomically(limits.drop("rate", "mail"))
    pass_time(rows, 60.0)
    rows.claim_limited(worker)
    rows.claim_limited(worker)
    assert rows.run(admission.limited_waits("default", [])) == (False, None)
