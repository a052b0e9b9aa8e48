"""What a claim of limited rows tells: who was kept from going, and by what."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from durable import ConcurrencyLimit, Durable, RateLimit
from durable.runtime.gc import collect
from durable.storage import limits
from tests.machines.driver import Driver
from tests.telemetry.conftest import Heard

HERE = {"queue": "default"}


@pytest.fixture
def work(app: Durable, driver: Driver) -> Any:
    """A task, two limits, and a worker that begins at once."""

    @app.task(name="work")
    def work() -> None: ...

    rate, gate = RateLimit(1, 60.0, burst=2), ConcurrencyLimit(2)
    driver.run(limits.put({("rate", "mail"): rate, ("concurrency", "gate"): gate}))
    return work


def look(driver: Driver, limit: int = 10) -> list[int]:
    """One look of the production picker, with as many slots waiting."""
    return [row.id for row in driver.engine._limited.claim(driver.worker, limit, limit, True, [], None)]


def test_a_row_whose_key_is_taken_is_told_of_once(work: Any, driver: Driver, heard: Heard) -> None:
    ids = [work.apply_async(concurrency_key="k").id for _ in range(3)]
    assert look(driver) == ids[:1]
    look(driver)
    about = [{"id": i, "fsm": "work", "concurrency_key": "k"} for i in ids[1:]]
    assert heard.of("concurrency.contended") == [({"count": 1}, a) for a in about]
    assert heard.of("concurrency.throttled") == []


def test_a_gate_tells_how_many_it_let_in_of_how_many(work: Any, driver: Driver, heard: Heard) -> None:
    for _ in range(5):
        work.apply_async(concurrency_key="gate:1")
    work.apply_async(concurrency_key="gate:2")
    assert len(look(driver)) == 3
    assert heard.of("concurrency.throttled") == [({"wanted": 5, "admitted": 2}, {"key": "gate:1", **HERE})]
    assert heard.of("concurrency.contended") == []


def test_a_bucket_tells_how_many_it_let_in_of_how_many(work: Any, driver: Driver, heard: Heard) -> None:
    for _ in range(3):
        work.apply_async(rate_limit="mail")
    assert len(look(driver)) == 2
    assert heard.of("rate_limit.throttled") == [({"wanted": 3, "granted": 2}, {"key": "mail", **HERE})]


def test_rows_whose_bucket_another_claim_has_are_contended(
    work: Any, app: Durable, driver: Driver, heard: Heard, database: str
) -> None:
    for _ in range(2):
        work.apply_async(rate_limit="mail")
    with psycopg.connect(database) as other, other.transaction():
        other.execute(app.sql["try_names"], {"names": ["rate mail"]})
        assert look(driver) == []
        assert heard.of("rate_limit.contended") == [({"count": 2}, HERE)]
    assert len(look(driver)) == 2
    assert len(heard.of("rate_limit.contended")) == 1


def test_rows_whose_shards_another_claim_has_are_contended(
    work: Any, app: Durable, driver: Driver, heard: Heard, database: str
) -> None:
    for _ in range(2):
        work.apply_async(rate_limit="mail")
    assert len(look(driver, 1)) == 1
    with psycopg.connect(database) as other, other.transaction():
        other.execute(f"SELECT FROM {app.schema}.buckets FOR UPDATE")
        assert look(driver) == []
    assert heard.of("rate_limit.contended") == [({"count": 1}, HERE)]
    assert heard.of("rate_limit.throttled") == []


def test_rows_whose_limit_is_gone_are_told_of_by_step(work: Any, driver: Driver, heard: Heard) -> None:
    for _ in range(2):
        work.apply_async(rate_limit="mail:eu")
    driver.run(limits.drop("rate", "mail"))
    assert look(driver) == []
    look(driver)
    about = {"key": "mail:eu", "name": "mail", "fsm": "work", "step": "run"}
    assert heard.of("rate_limit.unknown") == [({"count": 2}, about)]


def test_rows_of_another_queue_are_told_of_where_they_wait(work: Any, driver: Driver, heard: Heard) -> None:
    first = work.apply_async(concurrency_key="gate:1")
    for _ in range(3):
        work.apply_async(concurrency_key="gate:1", queue="other")
    assert look(driver) == [first.id]
    assert heard.of("concurrency.throttled") == []


def test_a_collection_counts_buckets_and_gates_apart(
    work: Any, app: Durable, driver: Driver, heard: Heard, connection: Any
) -> None:
    work.apply_async(rate_limit="mail", concurrency_key="gate:1")
    driver.drain()
    connection.execute(f"UPDATE {app.schema}.buckets SET full_at = now() - interval '1 hour', opens_at = NULL")
    assert collect(driver.engine._link, app.conf) == 2
    assert heard.of("gc.swept") == [({"count": 0, "buckets": 1, "gates": 1}, {})]
