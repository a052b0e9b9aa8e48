"""Gates (behaviour 36): at most the limit, slots credited once to their shard, resizing, repair."""

from __future__ import annotations

import psycopg
import pytest

from durable import ConcurrencyLimit
from durable.storage import instances, lanes, limits
from durable.storage.admission import Demand, claim_limited
from durable.storage.claims import Commit
from tests.fix_rows import Rows, done, new

KEY = "vendor:7"


def gate(rows: Rows, limit: int, shards: int = 1) -> dict[str, int]:
    return rows.atomically(limits.put({("concurrency", "vendor"): ConcurrencyLimit(limit, shards)}))


def keyed(rows: Rows, count: int = 1, key: str = KEY) -> list[int]:
    return [rows.run(instances.insert(new(concurrency_key=key))) for _ in range(count)]


def shards(rows: Rows) -> list[tuple[int, int, int]]:
    """(wanted, capacity, used) of each shard."""
    found = rows.fetch("SELECT * FROM {schema}.gates WHERE key = %s ORDER BY shard", [KEY])
    return [(row["wanted"], row["capacity"], row["used"]) for row in found]


def executing(rows: Rows) -> int:
    return len(rows.fetch("SELECT FROM {schema}.instances WHERE status = 'executing' AND concurrency_key = %s", [KEY]))


def test_a_gate_admits_its_limit_over_all_shards_and_parks_the_rest(rows: Rows) -> None:
    gate(rows, 5, shards=2)
    worker = rows.worker()
    ids = keyed(rows, 8)
    admitted = rows.claim_limited(worker)
    assert [row.id for row in admitted.rows] == ids[:5]
    assert shards(rows) == [(3, 3, 3), (2, 2, 2)]
    assert sorted(row.gate_shard for row in admitted.rows if row.gate_shard is not None) == [0, 0, 0, 1, 1]
    assert admitted.parked == 3
    assert rows.claim_limited(worker).rows == []


def test_each_key_of_a_name_has_slots_of_its_own(rows: Rows) -> None:
    gate(rows, 2)
    keyed(rows, 3)
    keyed(rows, 3, "vendor:8")
    keyed(rows, 3, "other:7")
    admitted = rows.claim_limited(rows.worker())
    keys = sorted(str(row.concurrency_key) for row in admitted.rows)
    assert keys == ["other:7", *["vendor:7"] * 2, *["vendor:8"] * 2]


def test_an_end_credits_exactly_the_shard_that_was_drawn_once(rows: Rows) -> None:
    gate(rows, 4, shards=2)
    worker = rows.worker()
    keyed(rows, 6)
    claimed = rows.claim_limited(worker).rows
    last = claimed[-1]
    assert rows.flush(worker, done(last)) == {last.id}
    expected = [(2, 2, 2 - (last.gate_shard == n)) for n in (0, 1)]
    assert shards(rows) == expected
    assert rows.flush(worker, done(last)) == set()  # stale
    assert shards(rows) == expected
    assert len(rows.claim_limited(worker).rows) == 1
    assert shards(rows) == [(2, 2, 2), (2, 2, 2)]


def test_one_end_lets_one_more_in_until_nobody_waits(rows: Rows) -> None:
    gate(rows, 3)
    worker = rows.worker()
    keyed(rows, 10)
    running = rows.claim_limited(worker).rows
    done_ids = []
    while running:
        assert executing(rows) == len(running) <= 3
        row = running.pop(0)
        rows.flush(worker, done(row))
        done_ids.append(row.id)
        running += rows.claim_limited(worker).rows
    assert len(done_ids) == 10
    assert shards(rows) == [(3, 3, 0)]


def test_a_shard_that_an_end_holds_is_skipped_and_its_rows_are_left_as_they_are(rows: Rows) -> None:
    gate(rows, 2, shards=2)
    worker = rows.worker()
    keyed(rows, 2)
    first, second = rows.claim_limited(worker).rows
    rows.flush(worker, done(second))
    waiters = keyed(rows, 2)
    ending = rows.other()
    with ending.connection.transaction():
        ending.flush(worker, done(first))
        met = rows.claim_limited(worker)  # the free shard is drawn from; the held one is in flux
        assert ([row.id for row in met.rows], met.parked, met.again) == ([waiters[0]], 0, True)
    assert [row.id for row in rows.claim_limited(worker).rows] == [waiters[1]]
    assert shards(rows) == [(1, 1, 1), (1, 1, 1)]


def test_an_end_waits_for_a_claim_that_parks_at_a_full_gate_and_opens_its_lane(rows: Rows) -> None:
    gate(rows, 1)
    worker = rows.worker()
    keyed(rows)
    (claimed,) = rows.claim_limited(worker).rows
    (waiter,) = keyed(rows)
    parking, ending = rows.other(), rows.other()
    with parking.connection.transaction():
        assert parking.run(claim_limited(Demand(worker, "default", 10, 1, True))).parked == 1
        going = rows.background(lambda: ending.flush(worker, done(claimed)))
        rows.wait_blocked(ending, going)
    going.result(20)
    assert [row.id for row in rows.claim_limited(worker).rows] == [waiter]


def test_an_end_that_waited_for_a_claim_credits_what_that_has_written(rows: Rows) -> None:
    gate(rows, 2)
    worker = rows.worker()
    keyed(rows)
    (first,) = rows.claim_limited(worker).rows
    keyed(rows)
    claiming, ending = rows.other(), rows.other()
    with claiming.connection.transaction():
        assert len(claiming.run(claim_limited(Demand(worker, "default", 10, 1, True))).rows) == 1
        going = rows.background(lambda: ending.flush(worker, done(first)))
        rows.wait_blocked(ending, going)
    going.result(20)
    assert executing(rows) == 1
    assert shards(rows) == [(2, 2, 1)]


def test_two_claims_at_once_find_a_new_gate_and_never_exceed_it(rows: Rows) -> None:
    gate(rows, 3)
    keyed(rows, 6)
    worker, rival = rows.worker(), rows.worker()
    first, second = rows.other(), rows.other()
    with first.connection.transaction():
        assert len(first.run(claim_limited(Demand(worker, "default", 10, 1, True, window=2))).rows) == 2
        with second.connection.transaction():
            other = second.run(claim_limited(Demand(rival, "default", 10, 1, True)))
        assert (other.rows, other.again) == ([], True)
    assert len(rows.claim_limited(rival).rows) == 1
    assert shards(rows) == [(3, 3, 3)]


def test_the_counter_cannot_leave_its_bounds(rows: Rows) -> None:
    gate(rows, 1)
    keyed(rows)
    rows.claim_limited(rows.worker())
    for used in (-1, 2):
        with pytest.raises(psycopg.errors.CheckViolation):
            rows.fetch("UPDATE {schema}.gates SET used = %s", [used])


@pytest.mark.parametrize(("before", "after"), [((4, 2), (2, 1)), ((4, 1), (2, 2)), ((3, 1), (3, 3)), ((4, 4), (2, 1))])
def test_a_lowered_or_resharded_limit_never_lets_more_run_than_the_larger_of_both(
    rows: Rows, before: tuple[int, int], after: tuple[int, int]
) -> None:
    gate(rows, *before)
    worker = rows.worker()
    keyed(rows, 12)
    running = rows.claim_limited(worker).rows
    assert len(running) == before[0]
    gate(rows, *after)
    ended = 0
    while running:
        running += rows.claim_limited(worker).rows
        assert executing(rows) == len(running) <= max(after[0], before[0] - ended)
        rows.flush(worker, done(running.pop(0)))
        ended += 1
    assert ended == 12
    assert sum(wanted for wanted, _, _ in shards(rows)) == after[0]
    assert all(wanted == capacity and used == 0 for wanted, capacity, used in shards(rows))


def test_a_raised_limit_lets_those_that_wait_in_at_once(rows: Rows) -> None:
    gate(rows, 1)
    worker = rows.worker()
    keyed(rows, 5)
    assert len(rows.claim_limited(worker).rows) == 1
    assert gate(rows, 3, shards=2) == {"default": 1}
    assert len(rows.claim_limited(worker).rows) == 2
    assert executing(rows) == 3


def test_a_gate_that_comes_counts_the_one_that_runs_without_a_slot(rows: Rows) -> None:
    worker = rows.worker()
    keyed(rows, 4)
    (exclusive,) = rows.claim_limited(worker).rows
    gate(rows, 2)
    (drawn,) = rows.claim_limited(worker).rows
    assert (exclusive.gate_shard, drawn.gate_shard) == (None, 0)
    assert rows.claim_limited(worker).rows == []
    rows.flush(worker, done(exclusive))
    assert len(rows.claim_limited(worker).rows) == 1
    assert shards(rows) == [(2, 2, 2)]


def test_a_gate_that_goes_leaves_one_at_a_time(rows: Rows) -> None:
    gate(rows, 2)
    worker = rows.worker()
    ids = keyed(rows, 4)
    first, second = rows.claim_limited(worker).rows
    assert rows.atomically(limits.drop("concurrency", "vendor"))[0]
    assert rows.claim_limited(worker).rows == []
    rows.flush(worker, done(first))
    assert rows.claim_limited(worker).rows == []
    rows.flush(worker, done(second))
    (third,) = rows.claim_limited(worker).rows
    assert (third.id, third.gate_shard) == (ids[2], None)
    rows.flush(worker, done(third))
    assert [row.id for row in rows.claim_limited(worker).rows] == [ids[3]]


def test_a_counter_that_is_too_high_is_only_stricter_and_the_repair_restores_it(rows: Rows) -> None:
    gate(rows, 3)
    worker = rows.worker()
    keyed(rows, 5)
    claimed = rows.claim_limited(worker, limit=1).rows
    rows.fetch("UPDATE {schema}.gates SET used = 3")
    assert rows.claim_limited(worker).rows == []
    ready, _ = rows.atomically(lanes.repair())
    assert ready == {"default": 1}
    assert len(rows.claim_limited(worker).rows) == 2
    rows.flush(worker, *[done(row) for row in claimed])
    assert shards(rows) == [(3, 3, 2)]


def test_a_counter_that_is_too_low_is_restored_and_an_end_does_not_stumble_over_it(rows: Rows) -> None:
    gate(rows, 2)
    worker = rows.worker()
    keyed(rows, 2)
    first, second = rows.claim_limited(worker).rows
    rows.fetch("UPDATE {schema}.gates SET used = 0")
    assert rows.flush(worker, done(first)) == {first.id}
    assert shards(rows) == [(2, 2, 0)]
    rows.atomically(lanes.repair())
    assert shards(rows) == [(2, 2, 1)]
    rows.flush(worker, done(second))
    assert shards(rows) == [(2, 2, 0)]


def test_the_repair_skips_a_shard_that_an_end_is_crediting(rows: Rows) -> None:
    gate(rows, 2)
    worker = rows.worker()
    keyed(rows, 2)
    first, _ = rows.claim_limited(worker).rows
    rows.fetch("UPDATE {schema}.gates SET used = 1")
    ending = rows.other()
    with ending.connection.transaction():
        ending.flush(worker, done(first))
        rows.atomically(lanes.repair())
    assert shards(rows) == [(2, 2, 0)]
    rows.atomically(lanes.repair())
    assert shards(rows) == [(2, 2, 1)]


def test_idle_gates_are_swept_and_made_again(rows: Rows) -> None:
    gate(rows, 2, shards=2)
    worker = rows.worker()
    keyed(rows, 1)
    (claimed,) = rows.claim_limited(worker).rows
    rows.run(lanes.sweep())
    assert len(shards(rows)) == 1, "a drawn slot stays"
    assert len(keyed(rows, 3)) == 3
    rows.claim_limited(worker)
    assert executing(rows) == 2
    rows.flush(worker, done(claimed))
    assert sum(used for _, _, used in shards(rows)) == 1


# Inline chains (behaviour 37)


def test_an_inline_chain_credits_its_slot_once_at_its_end(rows: Rows) -> None:
    gate(rows, 1)
    worker = rows.worker()
    keyed(rows, 2)
    (claimed,) = rows.claim_limited(worker).rows
    for step in ("two", "three"):
        hop = Commit(claimed, "executing", kind="next", step=step)
        rows.flush(worker, hop)
        claimed = hop.next_claim(inbox=False)
        assert shards(rows) == [(1, 1, 1)]
        assert rows.claim_limited(worker).rows == []
    rows.flush(worker, done(claimed))
    assert shards(rows) == [(1, 1, 0)]
    assert len(rows.claim_limited(worker).rows) == 1


def test_an_inline_hop_overruled_by_a_cancel_gives_its_slot_back(rows: Rows) -> None:
    gate(rows, 1)
    worker = rows.worker()
    keyed(rows, 2)
    (claimed,) = rows.claim_limited(worker).rows
    rows.cancel(claimed.id)
    rows.flush(worker, Commit(claimed, "executing", kind="next", step="two"))
    assert rows.status(claimed.id) == "cancelled"
    assert len(rows.claim_limited(worker).rows) == 1


def test_a_lost_race_for_the_outcome_credits_nothing(rows: Rows) -> None:
    gate(rows, 2)
    worker = rows.worker()
    keyed(rows, 1)
    (claimed,) = rows.claim_limited(worker).rows
    rows.bury(worker)
    rows.reclaim(worker)
    assert shards(rows) == [(2, 2, 0)]
    again = rows.claim_limited(rows.worker()).rows
    assert [row.id for row in again] == [claimed.id]
    assert rows.flush(worker, done(claimed)) == set()
    assert shards(rows) == [(2, 2, 1)]
