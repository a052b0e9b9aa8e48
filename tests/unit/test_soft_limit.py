"""A step that runs too long is interrupted where it is, and only there."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import pytest

from durable.outcomes import SoftTimeLimitExceeded
from durable.runtime import soft_limit
from durable.runtime.coroutines import CoroutineRunner


@pytest.fixture
def coroutines() -> Iterator[CoroutineRunner]:
    runner = CoroutineRunner()
    yield runner
    runner.close()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The alarm, for the test alone."""
    monkeypatch.setattr(soft_limit, "_alarm", None)
    soft_limit.install()
    yield
    signal.signal(soft_limit.RING, signal.SIG_IGN)


@pytest.mark.usefixtures("installed")
def test_a_sync_step_is_interrupted_where_it_is(coroutines: CoroutineRunner) -> None:
    seen: list[float | None] = []

    def step() -> str:
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded as limit:
            seen.append(limit.seconds)
        time.sleep(0.05)  # the limit is told once
        return "cleaned up"

    assert soft_limit.within(0.02, coroutines, False, step) == "cleaned up"
    assert seen == [0.02]


@pytest.mark.usefixtures("installed")
def test_nothing_is_interrupted_after_the_step(coroutines: CoroutineRunner) -> None:
    assert soft_limit.within(0.02, coroutines, False, lambda: "quick") == "quick"
    signal.raise_signal(soft_limit.RING)  # one that was under way
    assert soft_limit.within(5, coroutines, False, lambda: signal.raise_signal(soft_limit.RING)) is None


@pytest.mark.usefixtures("installed")
def test_the_interruption_goes_out_when_the_step_does_not_catch_it(coroutines: CoroutineRunner) -> None:
    with pytest.raises(SoftTimeLimitExceeded, match=r"soft_time_limit of 0\.02 s"):
        soft_limit.within(0.02, coroutines, False, lambda: time.sleep(60))


def test_a_coroutine_is_interrupted_where_it_awaits(coroutines: CoroutineRunner) -> None:
    seen: list[str] = []

    async def deeper() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("finally")

    async def step() -> str:
        try:
            await deeper()
        except SoftTimeLimitExceeded:
            seen.append("caught")
        await asyncio.sleep(0.05)
        return "cleaned up"

    assert soft_limit.within(0.02, coroutines, True, step) == "cleaned up"
    assert seen == ["finally", "caught"]


def test_a_coroutine_within_its_limit_is_left_alone(coroutines: CoroutineRunner) -> None:
    async def step() -> list[str]:
        return list(await asyncio.gather(*[asyncio.sleep(0.001, "a"), asyncio.sleep(0, "b")]))

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("mine")

    assert soft_limit.within(5, coroutines, True, step) == ["a", "b"]
    with pytest.raises(ValueError, match="mine"):
        soft_limit.within(5, coroutines, True, failing)


def test_a_cancellation_of_the_steps_own_is_not_taken_for_the_limit(coroutines: CoroutineRunner) -> None:
    async def step() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        soft_limit.within(5, coroutines, True, step)
