"""Celery's task options in our terms: on the decorator, or as attributes of a base class."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from durable import validation
from durable.errors import DefinitionError
from durable.retry import Backoff
from durable.validation import MAX_DELAY, shown

RENAMED = {"autoretry_for": "retry_for", "dont_autoretry_for": "dont_retry_for"}
RETRYING = ("retry_backoff", "retry_backoff_max", "retry_jitter", "default_retry_delay")
ALWAYS = {
    "acks_late": "a row is settled with its outcome, never before; max_attempts=1 spares it a second attempt",
    "reject_on_worker_lost": "what a dead worker held is always run again, max_crashes times",
    "track_started": "the status is always kept",
}
"""Options that can only be true, and why."""
NAMES = (*RENAMED, *RETRYING, "max_retries", *ALWAYS)
UNLIMITED = 1_000_000
"""Attempts that `max_retries=None` stands for."""
REMEDIES = {
    "retry_kwargs": "give max_retries and default_retry_delay themselves",
    "throws": "name those exceptions in dont_retry_for",
    "typing": "arguments are always checked where a task is enqueued",
    "store_errors_even_if_ignored": "errors are always stored",
    "send_events": "events need not be switched on",
    "compression": "set it for the app",
    "shared": "register the task with its app",
}


def in_our_terms(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return task options with Celery's names for retries replaced by ours. Raises DefinitionError."""
    options = {name: value for name, value in given.items() if name not in NAMES}
    for old, new in (*RENAMED.items(), ("max_retries", "max_attempts")):
        if old in given:
            if new in given:
                raise DefinitionError(f"{old} is another name for {new}: give one of them")
            options[new] = _attempts(given[old]) if old == "max_retries" else given[old]
    if any(name in given for name in RETRYING):
        if "backoff" in given:
            name = next(name for name in RETRYING if name in given)
            raise DefinitionError(f"{name} makes a backoff: give it or backoff, not both")
        backoff = _backoff(given)
        if backoff is not None:
            options["backoff"] = backoff
    for name, why in ALWAYS.items():
        if name in given and given[name] is not True:
            raise DefinitionError(f"{name}={given[name]!r} can't be had: {why}")
    return options


def of_base(base: type[Any], root: type[Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the options that a base class of tasks sets as attributes, `root` and what is above it left out."""
    classes = [cls for cls in base.__mro__ if cls not in root.__mro__]
    return {
        name: next(cls.__dict__[name] for cls in classes if name in cls.__dict__)
        for name in names
        if any(name in cls.__dict__ for cls in classes)
    }


def remedy(name: str) -> str:
    """Return what to do instead of an option that there is not; "" where nothing is known."""
    return f"; {REMEDIES[name]}" if name in REMEDIES else ""


def _attempts(retries: Any) -> int:
    if retries is None:
        return UNLIMITED
    if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries < UNLIMITED:
        raise DefinitionError(f"max_retries must be an integer from 0, or None, got {shown(retries)}")
    return retries + 1


def _backoff(given: Mapping[str, Any]) -> Backoff | None:
    """Return Celery's backoff: a constant, or `retry_backoff` seconds doubled each time, with full jitter."""
    factor, jitter = given.get("retry_backoff", False), given.get("retry_jitter", True)
    if not isinstance(jitter, bool):
        raise DefinitionError(f"retry_jitter must be True or False, got {shown(jitter)}")
    most = validation.seconds(given.get("retry_backoff_max", 600), "retry_backoff_max")
    if factor is False or factor is None:
        if "default_retry_delay" not in given:
            return None
        constant = validation.seconds(given["default_retry_delay"], "default_retry_delay")
        return lambda attempt: constant
    start = 1.0 if factor is True else validation.seconds(factor, "retry_backoff")

    def backoff(attempt: int) -> float:
        delay = min(most, start * 2.0 ** min(attempt, 60), MAX_DELAY)
        return random.uniform(0.0, delay) if jitter else delay  # noqa: S311 - jitter, not a secret

    return backoff
