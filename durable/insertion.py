"""The options of an insert, the same for tasks and machines: checked here, put on the row here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

from durable import limits, validation
from durable.errors import ValidationError
from durable.instance import NewInstance


@dataclass(frozen=True, slots=True)
class InsertOptions:
    """Times in seconds or as aware datetimes; None where not given. on_conflict: "raise", or "return" the occupant.

    concurrency_key  at most one instance of it executes at a time, or as many as the gate of its name lets
    rate_limit       a limit's name, "name:partition" or (name, partition); weight: tokens that each of its steps takes
    """

    schedule_in: float | None = None
    schedule_at: datetime | None = None
    expires: float | timedelta | datetime | None = None
    priority: int | None = None
    queue: str | None = None
    correlation_key: str | None = None
    correlation_scope: Sequence[str] | None = None
    max_attempts: int | None = None
    on_conflict: str = "raise"
    concurrency_key: str | None = None
    rate_limit: str | tuple[str, str] | None = None
    weight: int | None = None


OPTION_NAMES = frozenset(own.name for own in fields(InsertOptions))


def apply_options(new: NewInstance, options: InsertOptions) -> None:
    """Put checked options on a row. Raises ValidationError."""
    if options.queue is not None:
        new.queue = validation.queue(options.queue)
    if options.priority is not None:
        new.priority = validation.priority(options.priority)
    if options.schedule_in is not None or options.schedule_at is not None or options.expires is not None:
        _set_times(new, options.schedule_in, options.schedule_at, options.expires)
    if options.max_attempts is not None:
        new.max_attempts = validation.max_attempts(options.max_attempts)
    if options.correlation_key is not None:
        new.correlation_key = validation.text(options.correlation_key, "correlation_key")
    if options.on_conflict not in ("raise", "return"):
        raise ValidationError(f"on_conflict must be 'raise' or 'return', got {validation.shown(options.on_conflict)}")
    new.on_conflict = options.on_conflict
    if options.correlation_scope is not None:
        new.correlation_scope = validation.scope(options.correlation_scope)
        if options.correlation_key is None:
            raise ValidationError("correlation_scope says when correlation_key is occupied; give that too")
    if options.concurrency_key is not None:
        new.concurrency_key = limits.concurrency_key(options.concurrency_key)
    if options.rate_limit is not None:
        new.rate_limit = limits.bucket(options.rate_limit)
    if options.weight is not None:
        new.weight = limits.weight(options.weight)
        if options.rate_limit is None:
            raise ValidationError("weight says how many tokens of rate_limit a step takes; give that too")


def _set_times(
    new: NewInstance,
    schedule_in: float | None,
    schedule_at: datetime | None,
    expires: float | timedelta | datetime | None,
) -> None:
    if schedule_in is not None and schedule_at is not None:
        raise ValidationError("give a delay (countdown, schedule_in) or a moment (eta, schedule_at), not both")
    if schedule_in is not None:
        new.delay = validation.seconds(schedule_in, "countdown")
    if schedule_at is not None:
        new.at = validation.moment(schedule_at, "eta")
    if isinstance(expires, timedelta):
        expires = expires.total_seconds()
    if isinstance(expires, datetime):
        new.expires_at = validation.moment(expires, "expires")
        if expires <= datetime.now(expires.tzinfo):
            raise ValidationError(f"expires is in the past: {expires!r}")
        if new.at is not None and new.expires_at <= new.at:
            raise ValidationError(f"expires ({expires!r}) is not after eta ({new.at!r}): it could never start")
        if new.delay is not None and new.expires_at <= datetime.now(UTC) + timedelta(seconds=new.delay):
            raise ValidationError(f"expires ({expires!r}) is not after countdown ({new.delay:g} s)")
    elif expires is not None:
        new.expires_in = validation.seconds(expires, "expires")
        if new.expires_in <= (new.delay or 0):
            raise ValidationError(f"expires ({expires!r} s) is not after countdown ({new.delay or 0:g} s)")
        if new.at is not None and datetime.now(UTC) + timedelta(seconds=new.expires_in) <= new.at:
            raise ValidationError(f"expires ({expires!r} s) is not after eta ({new.at!r}): it could never start")
