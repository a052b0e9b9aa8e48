"""Checks of single values given to producer calls. Each returns the value or raises ValidationError naming it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from durable.containment import is_contained
from durable.errors import ValidationError
from durable.instance import LIVE, STATUSES

_QUEUE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,39}")
MAX_ID = 2**63 - 1
MAX_DELAY = 10 * 366 * 86400.0
"""Longest delay of any kind, in seconds: ten years."""


def near(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, else the known ones, else nothing."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; known: {', '.join(names[:20])}" if names else ""


def shown(value: Any) -> str:
    """Return `repr(value)` cut to 80 characters, for an error message."""
    try:
        text = repr(value)
    except BaseException as error:
        if not is_contained(error):
            raise
        return f"<unprintable {type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def queue(value: Any) -> str:
    """Accept a queue's name."""
    if not isinstance(value, str) or not _QUEUE.fullmatch(value):
        raise ValidationError(
            f"queue must be 1 to 63 of a-z, 0-9, '_', '.', '-', starting with a letter or digit; got {shown(value)}"
        )
    return value


def schema(value: Any) -> str:
    """Accept a schema's name; at most 40 bytes, so that names derived from it are never cut."""
    if not isinstance(value, str) or not _SCHEMA.fullmatch(value) or value.startswith("pg_"):
        raise ValidationError(
            "schema must be 1 to 40 of a-z, 0-9, '_', starting with a letter or '_' and not with 'pg_'; "
            f"got {shown(value)}"
        )
    return value


def priority(value: Any) -> int:
    """Accept a priority: lower runs earlier."""
    if isinstance(value, bool) or not isinstance(value, int) or not -32768 <= value <= 32767:
        raise ValidationError(f"priority must be an integer from -32768 to 32767, got {shown(value)}")
    return value


def seconds(value: Any, what: str) -> float:
    """Accept a number of seconds from 0 to ten years."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValidationError(f"{what} must be a number of seconds, got {shown(value)}")
    if not 0 <= value <= MAX_DELAY:
        raise ValidationError(f"{what} must be from 0 to {MAX_DELAY:.0f} seconds (ten years), got {shown(value)}")
    return float(value)


def moment(value: Any, what: str) -> datetime:
    """Accept an aware datetime between 1970 and ten years from now."""
    if not isinstance(value, datetime):
        raise ValidationError(f"{what} must be a datetime, got {shown(value)}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise ValidationError(f"{what} has no time zone: {value!r}; add one, e.g. tzinfo=datetime.UTC")
    try:
        stamp = value.timestamp()
    except (OverflowError, ValueError) as error:
        raise ValidationError(f"{what} is out of range: {value!r}") from error
    if not 0 <= stamp <= datetime.now(UTC).timestamp() + MAX_DELAY:
        raise ValidationError(f"{what} must lie between 1970 and ten years from now, got {value!r}")
    return value


def max_attempts(value: Any) -> int:
    """Accept a number of attempts."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000:
        raise ValidationError(f"max_attempts must be an integer from 1 to 1,000,000, got {shown(value)}")
    return value


def time_limits(soft: Any, hard: Any, what: str) -> None:
    """Accept a soft and a hard time limit in seconds, or None for none; the soft one is the shorter."""
    for name, limit in (("soft_time_limit", soft), ("time_limit", hard)):
        if limit is not None and seconds(limit, f"{name} of {what}") == 0:
            raise ValidationError(f"{name} of {what} must be more than 0 seconds; leave it out for no limit")
    if soft is not None and hard is not None and soft >= hard:
        raise ValidationError(
            f"soft_time_limit ({soft:g} s) of {what} must be shorter than its time_limit ({hard:g} s), "
            "or the step is killed before it hears of it"
        )


def text(value: Any, what: str, most: int = 255) -> str:
    """Accept text of 1 to `most` bytes in UTF-8, without NUL and lone surrogates."""
    if not isinstance(value, str):
        raise ValidationError(f"{what} must be text, got {shown(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValidationError(f"{what} is not valid Unicode (lone surrogate): {shown(value)}") from error
    if "\0" in value:
        raise ValidationError(f"{what} holds a NUL character: {shown(value)}")
    if not 1 <= size <= most:
        raise ValidationError(f"{what} must be 1 to {most} bytes of UTF-8, got {size} bytes: {shown(value)}")
    return value


def scope(value: Any) -> tuple[str, ...]:
    """Accept the statuses in which a correlation key is occupied, the live ones always among them; () means never.

    Without a live one, an instance could be about to enter a status in which another holds its key: a claim, a
    promotion or an outcome that the unique index refuses.
    """
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise ValidationError(f"correlation_scope must be a collection of statuses, got {shown(value)}")
    for status in value:
        if status not in STATUSES:
            raise ValidationError(f"correlation_scope: unknown status {shown(status)}{near(str(status), STATUSES)}")
    return tuple(status for status in STATUSES if status in LIVE or status in value) if value else ()


def instance_id(value: Any) -> int:
    """Accept an instance's id."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ID:
        raise ValidationError(f"an instance id is an integer from 1 to 2**63 - 1, got {shown(value)}")
    return value


def call_timeout(value: Any) -> float | None:
    """Accept the time that a call to the database may take: None (the setting `call_timeout`) or seconds above 0."""
    if value is None:
        return None
    allowed = seconds(value, "timeout")
    if allowed == 0:
        raise ValidationError("timeout must be more than 0 seconds, got 0; leave it out for the app's call_timeout")
    return allowed


def timeout(value: Any) -> float | None:
    """Accept a time to wait: None (for ever) or seconds from 0."""
    return None if value is None else seconds(value, "timeout")
