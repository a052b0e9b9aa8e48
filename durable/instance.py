"""What passes between storage and the rest: statuses, a row to insert, a claimed row, a row as read back.

Plain values; nothing here knows SQL, payload formats or user code.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

STATUSES = (
    "scheduled",
    "runnable",
    "executing",
    "awaiting_signal",
    "awaiting_children",
    "done",
    "failed",
    "cancelled",
)
TERMINAL = frozenset({"done", "failed", "cancelled"})
LIVE = frozenset(STATUSES) - TERMINAL


class Payload(NamedTuple):
    """Bytes with the name of what reads them: a serializer, or serializer+compression."""

    type: str
    body: bytes


@dataclass(slots=True)
class NewInstance:
    """A row to insert. Times are either relative (seconds, added to the database's clock) or absolute and aware."""

    machine: str
    state: Payload
    queue: str = "default"
    machine_version: int = 1
    step: str = "run"
    priority: int = 0
    delay: float | None = None
    at: datetime | None = None
    expires_in: float | None = None
    expires_at: datetime | None = None
    max_attempts: int | None = None
    correlation_key: str | None = None
    correlation_scope: tuple[str, ...] | None = None


class Claimed(NamedTuple):
    """A row as `claim` returns it. (worker, token, version) is the fence that its outcome must pass."""

    id: int
    token: int
    version: int
    priority: int
    eligible_at: datetime
    machine: str
    machine_version: int
    step: str
    attempt: int
    crashes: int
    state_type: str
    state: bytes
    max_attempts: int | None
    correlation_key: str | None
    keeps_key: bool
    expired: bool | None
    queue: str


class Snapshot(NamedTuple):
    """Where an instance stands; `version` counts its committed outcomes."""

    id: int
    status: str
    result_type: str | None
    result: bytes | None
    error: dict[str, Any] | None
    version: int
    machine: str
    step: str
    queue: str
    cancel_requested: bool
