"""In which order an engine asks and commits when there is little to do: what latency is made of."""

from __future__ import annotations

import math

import pytest

from durable import Durable
from durable.runtime.shared import IDLE
from tests.machines.driver import Driver, driver, drivers  # noqa: F401


@pytest.fixture
def asked(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """What the engine does with the database, in order."""
    engine = driver.engine
    done: list[str] = []
    for owner, name, said in (
        (engine._picker, "claim", "claim"),
        (engine._limited, "claim", "limited"),
        (engine._flusher, "flush", "flush"),
    ):
        real = getattr(owner, name)

        def call(*arguments: object, _real: object = real, _said: str = said) -> object:
            done.append(_said)
            return _real(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, call)
    return done


def test_after_a_claim_of_all_there_was_nothing_is_asked_before_its_outcome_is_committed(
    app: Durable,
    driver: Driver,  # noqa: F811
    asked: list[str],
) -> None:
    @app.task(name="work")
    def work() -> None: ...

    engine = driver.engine
    engine._seat.state = IDLE
    engine.slot.mean_step = 0.001  # so that it wants more than there is
    work.delay()
    engine.buffer.slot_waits = True
    engine._claim_if_wanted()
    engine.buffer.slot_waits = False
    (claimed,) = engine.buffer.take_back()
    engine._claim_if_wanted()
    engine.outbox.hand_over(driver.execute(claimed))
    engine._flush_if_due()
    assert asked == ["claim", "flush"]

    engine.buffer.slot_waits = True
    engine._claim_if_wanted()
    engine._claim_if_wanted()
    assert sorted(asked[2:]) == ["claim", "limited"], "one look each before it rests"


def test_after_a_claim_of_as_many_as_were_wanted_more_are_claimed_ahead(
    app: Durable,
    driver: Driver,  # noqa: F811
    asked: list[str],
) -> None:
    @app.task(name="work")
    def work() -> None: ...

    app.insert_many([(work, {})] * 30)
    driver.engine.slot.mean_step = 0.003
    driver.engine._limited.next_at = math.inf
    for _ in range(2):
        driver.engine._claim_if_wanted()
        assert len(driver.engine.buffer) == 10
        driver.engine.buffer.take_back()
    assert asked == ["claim", "claim"]
