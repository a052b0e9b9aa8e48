"""What a step may return, and the exceptions by which user code steers instead of failing.

The six outcomes; a plain return value of a task means `Done(value)`. `Cancel` and `RetryRequested` are control flow and
do not derive from `DurableError`, so that `except DurableError` cannot eat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from durable import limits
from durable.errors import OutcomeError, ValidationError
from durable.validation import MAX_DELAY, shown, text

MAX_NAMES = 100
MAX_CHILDREN = 10_000


def check_delay(value: Any, what: str) -> float:
    """Return `value` as seconds; raise OutcomeError unless it is a finite number from 0 to ten years."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OutcomeError(f"{what} must be a number of seconds, got {value!r}")
    if not 0 <= value <= MAX_DELAY:
        raise OutcomeError(f"{what} must be from 0 to {MAX_DELAY:.0f} seconds (ten years), got {value!r}")
    return float(value)


class _Keep:
    """Stands for "the state as it is"."""

    def __repr__(self) -> str:
        return "KEEP"


KEEP: Any = _Keep()
"""Left out of an outcome: the stored state, or key, stays."""

StepTarget = str | Callable[..., Any]
"""A step, by name or as the method itself: "ship", self.ship or Checkout.ship."""


def step_name(target: Any) -> str:
    """Return the name of a step target. Raises OutcomeError for what is neither a name nor a method marked @step."""
    if isinstance(target, str):
        return target
    name = getattr(target, "__durable_step__", None)
    if isinstance(name, str):
        return name
    raise OutcomeError(f"a step is named by text or by a method marked @step, got {shown(target)}")


@dataclass(frozen=True, slots=True)
class Done:
    """The instance ends `done`; `result` is any serialisable value."""

    result: Any = None


@dataclass(frozen=True, slots=True)
class Stop:
    """The instance ends `failed`; `reason` is any serialisable value, or an exception."""

    reason: Any = None


@dataclass(frozen=True, slots=True)
class Next:
    """Go on with `step`, as its first attempt, after `delay` seconds.

    inline  run it at once on the claim that is held; None: as the machine was defined. A step with a rate limit, or
            with another concurrency key, is always claimed anew.
    rate_limit, weight  what that step (and its retries) draws from: a limit's name or "name:partition"; how many tokens
    concurrency_key     from that step on; None for none, left out: as it is
    """

    step: StepTarget
    state: Any = KEEP
    _: KW_ONLY
    delay: float = 0.0
    inline: bool | None = None
    rate_limit: str | tuple[str, str] | None = None
    weight: int | None = None
    concurrency_key: str | None = KEEP

    def __post_init__(self) -> None:
        step_name(self.step)
        check_delay(self.delay, "Next(delay=...)")
        try:
            if self.rate_limit is not None:
                object.__setattr__(self, "rate_limit", limits.bucket(self.rate_limit))
            if self.weight is not None:
                limits.weight(self.weight)
                if self.rate_limit is None:
                    raise ValidationError("weight says how many tokens of rate_limit a step takes; give that too")
            if self.concurrency_key is not None and self.concurrency_key is not KEEP:
                limits.concurrency_key(self.concurrency_key)
        except ValidationError as error:
            raise OutcomeError(f"Next: {error}") from None


@dataclass(frozen=True, slots=True)
class Retry:
    """The same step again after `delay` seconds (0: runnable at once), as another attempt. Awaited signals are kept."""

    state: Any = KEEP
    _: KW_ONLY
    delay: float = 0.0

    def __post_init__(self) -> None:
        check_delay(self.delay, "Retry(delay=...)")


@dataclass(frozen=True, slots=True)
class Await:
    """Park until a signal whose name is in `names` arrives, then go on with `then`.

    Consumes the signals in `ctx.awaited` whose name is not in `names`. Those that are awaited again stay: `ctx.awaited`
    of the next step holds them and the new ones.

    Args:
        names: One name, or several.
        then: The step to go on with.
        state: The new state; left out, the state stays as it is.
        timeout: Seconds after which it goes on anyway, with what has arrived; None: never.
        keep: Consume nothing, whatever the names.
    """

    names: str | Iterable[str]
    then: StepTarget
    state: Any = KEEP
    timeout: float | None = None
    _: KW_ONLY
    keep: bool = False

    def __post_init__(self) -> None:
        step_name(self.then)
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        if not 1 <= len(names) <= MAX_NAMES:
            raise OutcomeError(f"Await needs 1 to {MAX_NAMES} signal names, got {len(names)}")
        for name in names:
            try:
                text(name, "a signal's name")
            except ValidationError as error:
                raise OutcomeError(str(error)) from None
        object.__setattr__(self, "names", names)
        if self.timeout is not None:
            check_delay(self.timeout, "Await(timeout=...)")
        if not isinstance(self.keep, bool):
            raise OutcomeError(f"Await(keep=...) is True or False, got {shown(self.keep)}")


@dataclass(frozen=True, slots=True)
class ScheduleChildren:
    """Insert `children`, park, and go on with `then` when all of them are finished, however they ended.

    children  tasks or machines, each bare or as (task or machine, options of `insert`)
    """

    children: Iterable[Any]
    then: StepTarget
    state: Any = KEEP

    def __post_init__(self) -> None:
        step_name(self.then)
        children = tuple(self.children)
        if len(children) > MAX_CHILDREN:
            raise OutcomeError(f"ScheduleChildren takes at most {MAX_CHILDREN:,} children, got {len(children):,}")
        object.__setattr__(self, "children", children)


Outcome = Done | Stop | Next | Retry | Await | ScheduleChildren
OUTCOMES = (Done, Stop, Next, Retry, Await, ScheduleChildren)


class Cancel(Exception):
    """Raised by a step: the instance fails at once with this reason, whatever attempts are left."""

    def __init__(self, reason: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason


class StepAgain(BaseException):
    """The step did not happen, through no fault of its own. A BaseException, so that `except Exception` lets it by."""


class SoftTimeLimitExceeded(Exception):
    """Raised inside a step that ran longer than its `soft_time_limit`; catch it to clean up. `seconds`: the limit."""

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__(f"the step ran longer than its soft_time_limit of {seconds:g} s" if seconds else "")
        self.seconds = seconds


class RetryRequested(Exception):
    """What `ctx.retry(...)` raises: another attempt after `delay` seconds (None: the task's backoff).

    limit  attempts, instead of the task's
    """

    def __init__(
        self, delay: float | None = None, cause: BaseException | None = None, limit: int | None = None
    ) -> None:
        super().__init__(f"retry after {delay} s" if delay is not None else "retry")
        self.delay = delay
        self.cause = cause
        self.limit = limit
