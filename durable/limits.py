"""What a limit is: the values an app is configured with, and how keys, buckets and lanes are named after them.

A concurrency key `vendor:7` belongs to the gate `vendor`, if there is one; a bucket `stripe:eu` is the partition `eu`
of the rate limit `stripe`. A lane is where limited rows wait: "key vendor:7", "rate stripe:eu".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from durable.errors import ConfigError, ValidationError
from durable.validation import shown, text

MAX_SHARDS = 64
MAX_NUMBER = 1_000_000
MAX_PER_SECOND = 100_000
MAX_PERIOD = 366 * 86400.0
MAX_REFILL = 1000 * MAX_PERIOD
"""Seconds in which an empty bucket must be full again: dates end in the year 9999."""
_NAME_BYTES = 100


def _count(value: Any, what: str, most: int = MAX_NUMBER) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{what} must be an integer from 1 to {most:,}, got {shown(value)}")
    return value


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `allowed` tokens per `period` in the long run, and at most `burst` at once.

    period  seconds
    burst   tokens a bucket holds; None: `allowed`
    shards  parts of each bucket, for limits so busy that their claims meet; 1 keeps the strictest order
    Raises ConfigError for a value out of range.
    """

    allowed: int
    period: float = 1.0
    burst: int | None = None
    shards: int = 1

    def __post_init__(self) -> None:
        _count(self.allowed, "RateLimit(allowed=...)")
        period = self.period
        if isinstance(period, bool) or not isinstance(period, int | float) or not 0.001 <= period <= MAX_PERIOD:
            raise ConfigError(f"RateLimit(period=...) must be from 0.001 seconds to a year, got {shown(period)}")
        if self.allowed / period > MAX_PER_SECOND:
            raise ConfigError(f"RateLimit: {self.allowed:,} per {period:g} s is more than {MAX_PER_SECOND:,} a second")
        object.__setattr__(self, "burst", _count(self.allowed if self.burst is None else self.burst, "burst"))
        if self.size * period / self.allowed > MAX_REFILL:
            raise ConfigError(
                f"RateLimit: {self.size:,} tokens at {self.allowed:,} per {period:g} s take more than a thousand years "
                "to come back; lower the burst"
            )
        if _count(self.shards, "RateLimit(shards=...)", MAX_SHARDS) > self.size:
            raise ConfigError(f"RateLimit: {self.shards} shards cannot share a burst of {self.size}")

    @property
    def size(self) -> int:
        """Tokens a bucket holds."""
        return self.allowed if self.burst is None else self.burst


@dataclass(frozen=True, slots=True)
class ConcurrencyLimit:
    """At most `limit` executing instances of each key of this name.

    shards  parts of each gate, so that outcomes that commit do not keep claims off the whole of it
    Raises ConfigError for a value out of range.
    """

    limit: int
    shards: int = 1

    def __post_init__(self) -> None:
        _count(self.limit, "ConcurrencyLimit(limit=...)")
        if _count(self.shards, "ConcurrencyLimit(shards=...)", MAX_SHARDS) > self.limit:
            raise ConfigError(f"ConcurrencyLimit: {self.shards} shards cannot share {self.limit} slots")


def limit_name(value: Any) -> str:
    """Accept a limit's name: 1 to 100 bytes without a colon, which begins the key or the partition."""
    name = text(value, "a limit's name", _NAME_BYTES)
    if ":" in name:
        raise ValidationError(f"a limit's name has no colon, got {shown(name)}")
    return name


def checked_limits(given: Any, kind: type[Any], what: str) -> dict[str, Any]:
    """Accept a mapping of names to limits of one kind. Raises ConfigError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} must map names to {kind.__name__}, got {shown(given)}")
    for name, limit in given.items():
        try:
            limit_name(name)
        except ValidationError as error:
            raise ConfigError(f"{what}: {error}") from None
        if not isinstance(limit, kind):
            raise ConfigError(f"{what}[{name!r}] must be a {kind.__name__}, got {shown(limit)}")
    return dict(given)


def name_of(key: str) -> str:
    """Return the limit's name in a key or a bucket: what comes before the first colon."""
    return key.split(":", 1)[0]


def key_lane(key: str) -> str:
    """Return the lane in which rows of a concurrency key wait."""
    return f"key {key}"


def rate_lane(bucket: str) -> str:
    """Return the lane in which rows of a bucket wait."""
    return f"rate {bucket}"


def lanes_of(concurrency_key: str | None, rate_limit: str | None) -> list[str]:
    """Return every lane that a row may wait in."""
    lanes = [key_lane(concurrency_key)] if concurrency_key is not None else []
    return lanes if rate_limit is None else [*lanes, rate_lane(rate_limit)]


def concurrency_key(value: Any) -> str:
    """Accept a concurrency key: 1 to 255 bytes."""
    return text(value, "concurrency_key")


def bucket(value: Any) -> str:
    """Accept a rate limit's name, `name:partition` or (name, partition); return the bucket's name."""
    if isinstance(value, tuple):
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise ValidationError(f"rate_limit must be a name or (name, partition), got {shown(value)}")
        value = f"{limit_name(value[0])}:{value[1]}"
    name = text(value, "rate_limit")
    if not name_of(name):
        raise ValidationError(f"rate_limit begins with the limit's name, got {shown(name)}")
    return name


def weight(value: Any) -> int:
    """Accept a number of tokens."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_NUMBER:
        got = "NaN" if isinstance(value, float) and math.isnan(value) else shown(value)
        raise ValidationError(f"weight must be an integer from 1 to {MAX_NUMBER:,}, got {got}")
    return value
