"""Signals to deliver, checked: name, target, dedup key and payload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from durable import validation
from durable.errors import NoTargetError, ValidationError
from durable.instance import NewSignal, Payload

FIELDS = frozenset({"target", "name", "payload", "dedup_key"})


def new_signal(
    encode: Callable[[Any, str], Payload], target: Any, name: Any, payload: Any = None, dedup_key: Any = None
) -> NewSignal:
    """Return a checked signal to an id (int) or a correlation key (text). Raises ValidationError, PayloadError."""
    target = validation.text(target, "correlation_key") if isinstance(target, str) else validation.instance_id(target)
    validation.text(name, "a signal's name")
    if dedup_key is not None:
        validation.text(dedup_key, "dedup_key")
    return NewSignal(target, name, encode(payload, "payload"), dedup_key)


def new_signals(encode: Callable[[Any, str], Payload], messages: Iterable[Mapping[str, Any]]) -> list[NewSignal]:
    """Return many; raises ValidationError naming the index of a bad one."""
    prepared = []
    for index, message in enumerate(messages):
        try:
            unknown = set(message) - FIELDS
            if unknown:
                raise ValidationError(f"unknown field {sorted(map(str, unknown))[0]!r}")
            missing = {"target", "name"} - set(message)
            if missing:
                raise ValidationError(f"it has no {sorted(missing)[0]!r}")
            prepared.append(new_signal(encode, **message))
        except (ValidationError, TypeError) as error:
            raise ValidationError(f"signal_many, entry {index}: {error}") from error
    return prepared


def accepted(stored: list[bool | None], batch: list[NewSignal]) -> bool:
    """Return whether the one signal of a batch was new. Raises NoTargetError when nothing live was there."""
    if stored[0] is None:
        raise NoTargetError(
            f"signal {batch[0].name!r}: nothing live is at {batch[0].target!r}; it is finished, or never existed"
        )
    return stored[0]
