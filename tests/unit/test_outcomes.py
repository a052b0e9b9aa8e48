"""Outcomes, control flow, and when a failure gets another attempt."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from durable.errors import DurableError, OutcomeError
from durable.outcomes import MAX_DELAY, Cancel, Done, Retry, RetryRequested, Stop
from durable.retry import RetryPolicy, default_backoff


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), True, "5", None, MAX_DELAY + 1, 1e300, Decimal(1)])
def test_a_retry_with_a_wrong_delay_is_an_outcome_error(delay: Any) -> None:
    with pytest.raises(OutcomeError, match=r"Retry\(delay=\.\.\.\) must be"):
        Retry(delay=delay)


@pytest.mark.parametrize("delay", [0, 0.0, 1, 2.5, MAX_DELAY])
def test_a_retry_keeps_its_delay(delay: Any) -> None:
    assert Retry(delay=delay).delay == delay


def test_outcomes_are_values() -> None:
    assert Done(1) == Done(1) != Done(2)
    assert Stop("x") == Stop("x")
    assert Done().result is None
    assert Retry().delay == 0
    with pytest.raises(AttributeError):
        Done(1).result = 2  # type: ignore[misc]


def test_control_flow_is_not_a_durable_error() -> None:
    for kind in (Cancel, RetryRequested):
        assert issubclass(kind, Exception)
        assert not issubclass(kind, DurableError)


def test_the_default_backoff_doubles_from_one_second_to_five_minutes_less_some_jitter() -> None:
    for attempt in range(30):
        most = min(2.0**attempt, 300.0)
        waits = {default_backoff(attempt) for _ in range(50)}
        assert all(0.75 * most <= wait <= most for wait in waits)
        assert len(waits) > 1
    assert default_backoff(10**9) <= 300


def test_a_policy_retries_what_it_lists_and_not_what_it_excludes() -> None:
    policy = RetryPolicy((OSError, ValueError), (FileNotFoundError,))
    assert policy.retries(OSError())
    assert policy.retries(UnicodeError())
    assert not policy.retries(FileNotFoundError())
    assert not policy.retries(KeyError())


def test_the_default_policy_retries_exceptions_but_nothing_that_ends_a_process() -> None:
    policy = RetryPolicy()
    assert policy.retries(RuntimeError())
    for ending in (SystemExit(), KeyboardInterrupt(), GeneratorExit()):
        assert not policy.retries(ending)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "5", None, True, Decimal(1), MAX_DELAY + 1])
def test_nonsense_from_a_backoff_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"backoff\(3\) must return seconds"):
        RetryPolicy(backoff=lambda attempt: value).delay(3)


def test_a_backoff_is_given_the_attempt() -> None:
    assert RetryPolicy(backoff=lambda attempt: attempt * 10).delay(3) == 30
