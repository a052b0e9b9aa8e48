"""When an exception gets another attempt, and after how long."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from durable.validation import MAX_DELAY

Backoff = Callable[[int], float]
"""Seconds to wait after the failed attempt of that number, counted from 0."""


def default_backoff(attempt: int) -> float:
    """Return `min(1 s * 2**attempt, 300 s)`, less up to a quarter of jitter, so that a herd spreads out."""
    return float(min(2.0 ** min(attempt, 20), 300.0) * random.uniform(0.75, 1.0))  # noqa: S311 - jitter, not a secret


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """A task's answer to an exception.

    retry_for       only these are retried
    dont_retry_for  these are not, even if `retry_for` names a base of theirs
    backoff         seconds to wait; a backoff that raises or returns nonsense falls back to the default
    """

    retry_for: tuple[type[BaseException], ...] = (Exception,)
    dont_retry_for: tuple[type[BaseException], ...] = ()
    backoff: Backoff = default_backoff

    def retries(self, error: BaseException) -> bool:
        """Return whether `error` deserves another attempt, the limit left aside."""
        return isinstance(error, self.retry_for) and not isinstance(error, self.dont_retry_for)

    def delay(self, attempt: int) -> float:
        """Return seconds until the next attempt, after attempt number `attempt` (from 0) failed.

        Raises whatever the user's `backoff` raises, and ValueError when it returns nonsense.
        """
        value = self.backoff(attempt)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_DELAY:
            raise ValueError(f"backoff({attempt}) must return seconds from 0 to {MAX_DELAY:.0f}, got {value!r}")
        return float(value)
