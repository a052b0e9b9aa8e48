"""What a step may return, and the exceptions by which user code steers instead of failing.

`Done`, `Stop` and `Retry` are outcomes; a plain return value of a task means `Done(value)`. `Cancel` and
`RetryRequested` are control flow and do not derive from `DurableError`, so that `except DurableError` cannot eat them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from durable.errors import OutcomeError

MAX_DELAY = 10 * 366 * 86400.0
"""Longest delay of any kind, in seconds: ten years."""


def check_delay(value: Any, what: str) -> float:
    """Return `value` as seconds; raise OutcomeError unless it is a finite number from 0 to ten years."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OutcomeError(f"{what} must be a number of seconds, got {value!r}")
    if not 0 <= value <= MAX_DELAY:
        raise OutcomeError(f"{what} must be from 0 to {MAX_DELAY:.0f} seconds (ten years), got {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class Done:
    """The instance ends `done`; `result` is any serialisable value."""

    result: Any = None


@dataclass(frozen=True, slots=True)
class Stop:
    """The instance ends `failed`; `reason` is any serialisable value, or an exception."""

    reason: Any = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The same step again after `delay` seconds, as another attempt; 0 is runnable at once."""

    delay: float = 0.0

    def __post_init__(self) -> None:
        check_delay(self.delay, "Retry(delay=...)")


class Cancel(Exception):
    """Raised by a step: the instance fails at once with this reason, whatever attempts are left."""

    def __init__(self, reason: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason


class RetryRequested(Exception):
    """What `ctx.retry(...)` returns to be raised: another attempt after `delay` seconds (None: the task's backoff)."""

    def __init__(self, delay: float | None = None, cause: BaseException | None = None) -> None:
        super().__init__(f"retry after {delay} s" if delay is not None else "retry")
        self.delay = delay
        self.cause = cause
