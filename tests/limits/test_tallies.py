"""The arithmetic of slots and tokens, without a database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from durable.storage.admission import _assess_buckets
from durable.storage.tallies import MOST_OWED, Bucket, Key, Slots, Tokens, share, token_time
from durable.storage.verdicts import Demand, Tally

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def bucket(*shards: tuple[float, int]) -> Bucket:
    """Shards as (seconds until full, size); a token a second in each."""
    return Bucket(NOW, SECOND, {n: Tokens(NOW + full * SECOND, size) for n, (full, size) in enumerate(shards)})


def test_shares_add_up_to_the_whole() -> None:
    assert [share(10, 4, n) for n in range(6)] == [3, 3, 2, 2, 0, 0]


@pytest.mark.parametrize(("allowed", "shards", "microseconds"), [(1, 1, 1_000_000), (3, 1, 333_334), (3, 2, 666_667)])
def test_a_tokens_time_is_rounded_up_so_that_a_rate_is_never_exceeded(
    allowed: int, shards: int, microseconds: int
) -> None:
    assert token_time(SECOND, allowed, shards) == timedelta(microseconds=microseconds)


def test_tokens_of_a_bucket_are_those_of_its_shards_and_are_taken_from_the_fullest() -> None:
    held = bucket((0.5, 3), (0.0, 3), (9.0, 3))
    assert held.tokens == 2 + 3
    held.take(4)
    assert held.tokens == 1
    assert not held.fits(2)
    assert held.fits(1)


@pytest.mark.parametrize("weight", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("fulls", [(3.0,), (5.25,), (3.0, 1.5), (2.9, 0.0, 1.1), (7.5, 0.25)])
def test_a_bucket_opens_for_a_weight_exactly_when_it_has_it(fulls: tuple[float, ...], weight: int) -> None:
    held = bucket(*[(full, 6 // len(fulls)) for full in fulls])
    opens_at = held.opens_for(weight)
    held.now = opens_at
    assert held.tokens >= weight
    held.now = opens_at - timedelta(microseconds=1)
    assert held.now < NOW or held.tokens < weight


def test_a_bucket_that_is_left_to_others_still_says_when_to_look_again() -> None:
    held = bucket((1.5, 2), (0.0, 2))
    held.reserve(9)
    assert NOW < held.opens_for(1) <= NOW + 2 * SECOND


def test_a_gate_that_shrinks_keeps_what_is_drawn_and_gives_the_rest_up() -> None:
    key = Key(shards={0: Slots(5, 5, 4), 1: Slots(5, 5, 1)})
    key.resize(6, 2)
    assert [(s.wanted, s.capacity) for s in (key.shards or {}).values()] == [(3, 4), (3, 2)]
    assert key.free == 1
    key.resize(3, 1)
    assert key.free == 0
    assert sum(s.capacity for s in (key.shards or {}).values()) == 5


def test_an_instance_without_a_slot_takes_room_in_the_gate() -> None:
    key = Key(held=1, shards={0: Slots(2, 2, 1)})
    assert key.free == 0


def test_what_rows_owe_and_wait_for_ends_before_dates_do() -> None:
    """A limit that was lowered to one a month meets the rows of weight a million that waited under the old one."""
    held = Bucket(NOW, timedelta(days=30), {0: Tokens(NOW, 1)})
    assert held.fits(1_000_000)
    held.take(1_000_000)
    held.take(1_000_000)
    assert held.shards[0].full_at == NOW + MOST_OWED
    held.reserve(2**31)
    assert NOW < held.opens_for(1) <= NOW + MOST_OWED


def test_a_bucket_is_not_empty_for_an_hour_when_clocks_go_back() -> None:
    """psycopg returns times in the session's zone, and Python subtracts those by their wall clocks."""
    berlin = ZoneInfo("Europe/Berlin")
    full_at = datetime(2026, 10, 25, 0, 59, 59, tzinfo=UTC).astimezone(berlin)  # 02:59:59
    now = datetime(2026, 10, 25, 1, 0, 1, tzinfo=UTC).astimezone(berlin)  # 02:00:01, two seconds later
    tally = Tally(Demand(1, "default", 1, 1, True))
    assess = _assess_buckets(tally, ["mail"], {"mail": (5, SECOND, 5, 1)})
    assert next(assess)[0] == "lock_buckets"
    assert assess.send([("mail", 0, full_at, full_at, None)])[0] == "bucket_shards"
    with pytest.raises(StopIteration):
        assess.send([("mail", 0, now)])
    assert tally.buckets["mail"].tokens == 5
