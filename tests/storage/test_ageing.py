"""Priority ageing: who is raised, to what, and who is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from durable import RateLimit
from durable.config import Config
from durable.runtime.ageing import age
from durable.runtime.reaper import reap
from durable.storage import ageing, limits
from tests.fix_rows import HEAD, Rows, done
from tests.machines.driver import Driver, driver, drivers  # noqa: F401


def waited(rows: Rows, seconds: float, **options: Any) -> int:
    """A row that has waited so long already."""
    (instance,) = rows.insert(1, **options)
    rows.fetch(
        "UPDATE {schema}.instances SET eligible_at = eligible_at - make_interval(secs => %s) WHERE id = %s",
        [seconds, instance],
    )
    return instance


def priority(rows: Rows, instance: int) -> int:
    row = rows.live(instance)
    assert row is not None
    return int(row["priority"])


def first(rows: Rows, worker: int) -> int:
    """The row that the next claim takes; it is done then."""
    (claimed,) = rows.claim(worker, 1)
    rows.flush(worker, done(claimed))
    return claimed.id


def test_a_low_row_waits_behind_every_better_one_that_comes_without_ageing_and_goes_first_with_it(rows: Rows) -> None:
    worker = rows.worker()
    low = waited(rows, 100, priority=9)
    for _ in range(20):
        rows.insert(1, priority=-3)
        rows.insert(1, priority=0)
        assert first(rows, worker) != low
    assert rows.run(ageing.age_queue("default", 60)) == 1
    assert priority(rows, low) == 0
    assert first(rows, worker) == low


def test_what_has_not_waited_long_enough_or_is_of_another_queue_is_left_alone(rows: Rows) -> None:
    rows.insert(1, priority=1)
    rows.insert(1, priority=1, queue="other")
    young, elsewhere = waited(rows, 50, priority=9), waited(rows, 500, priority=9, queue="other")
    waited(rows, 70, priority=9)
    assert rows.run(ageing.age_queue("default", 60)) == 1
    assert (priority(rows, young), priority(rows, elsewhere)) == (9, 9)


def test_rows_of_several_priorities_join_the_best_oldest_first_and_no_more_than_the_limit_of_each(rows: Rows) -> None:
    worker = rows.worker()
    best = waited(rows, 10, priority=1)
    old = [waited(rows, seconds, priority=p) for p, seconds in ((5, 300), (5, 200), (9, 400), (9, 250), (5, 100))]
    assert rows.run(ageing.age_queue("default", 60, limit=2)) == 4
    assert [first(rows, worker) for _ in range(6)] == [old[2], old[0], old[3], old[1], best, old[4]]


def test_a_row_that_is_claimed_meanwhile_is_neither_raised_nor_waited_for(rows: Rows) -> None:
    rows.insert(1, priority=0)
    low = waited(rows, 100, priority=9)
    other = rows.other()
    with other.connection.transaction():
        other.fetch("SELECT FROM {schema}.instances WHERE id = %s FOR NO KEY UPDATE", [low])
        assert rows.run(ageing.age_queue("default", 60)) == 0
    assert rows.run(ageing.age_queue("default", 60)) == 1


def test_a_claim_skips_what_is_being_raised(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (better,) = rows.insert(1, priority=0)
    low = waited(rows, 100, priority=9)
    with other.connection.transaction():
        assert other.run(ageing.age_queue("default", 60)) == 1
        assert [row.id for row in rows.claim(worker, 10)] == [better]
    assert [row.id for row in rows.claim(worker, 10)] == [low]


def test_a_limited_candidate_joins_the_best_of_its_queue_unlimited_ones_too(rows: Rows) -> None:
    rows.insert(1, priority=2)
    low = waited(rows, 100, priority=9, concurrency_key="k")
    assert rows.run(ageing.age_queue("default", 60)) == 1
    assert priority(rows, low) == 2
    assert [row.id for row in rows.claim_limited(rows.worker(), position=HEAD).rows] == [low]


def test_a_parked_row_joins_the_best_of_its_lane_if_it_ages_in_its_queue(rows: Rows) -> None:
    rows.atomically(limits.put({("rate", "mail"): RateLimit(1, 3600.0, burst=1)}))
    worker = rows.worker()
    rows.insert(3, priority=1, rate_limit="mail")
    low, elsewhere = (waited(rows, 100, priority=9, rate_limit="mail", queue=queue) for queue in ("default", "other"))
    while rows.claim_limited(worker).parked:
        pass
    rows.claim_limited(worker, queue="other")
    assert rows.run(ageing.age_lanes()) == (0, "")
    rows.run(ageing.set_ageing("default", 60))
    assert rows.run(ageing.age_lanes()) == (1, "")
    assert (priority(rows, low), priority(rows, elsewhere)) == (1, 9)
    rows.fetch("UPDATE {schema}.buckets SET full_at = full_at - interval '1 hour', opens_at = now()")
    assert [row.id for row in rows.claim_limited(worker).rows] == [low]


def test_ageing_is_set_once_and_taken_back(rows: Rows) -> None:
    assert rows.run(ageing.queues()) == {}
    assert rows.run(ageing.set_ageing("b", 60))
    assert not rows.run(ageing.set_ageing("b", 60))
    assert rows.run(ageing.queues()) == {"b": 60.0}
    assert rows.run(ageing.set_ageing("b", None))
    assert rows.run(ageing.queues()) == {}


def test_whoever_reaps_raises_what_waited_too_long_and_one_of_them_per_interval(
    rows: Rows,
    driver: Driver,  # noqa: F811
) -> None:
    link = driver.engine._link
    rows.insert(1, priority=0)
    low = waited(rows, 100, priority=9)
    assert link.connected_since is not None
    reap(link, Config(), driver.app.wakeups, link.connected_since)
    assert priority(rows, low) == 9, "it is off"
    rows.run(ageing.set_ageing("default", 60))
    reap(link, Config(), driver.app.wakeups, link.connected_since)
    assert priority(rows, low) == 0
    waited(rows, 100, priority=9)
    assert age(link, driver.app.wakeups, 60.0) == 0, "somebody just did"
    assert age(link, driver.app.wakeups, 0.0) == 1


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_an_ageing_of_no_time_is_refused_by_the_schema(rows: Rows, seconds: float) -> None:
    with pytest.raises(Exception, match="ageing"):
        rows.run(ageing.set_ageing("default", seconds))
