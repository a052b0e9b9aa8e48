"""What passes between storage and the rest: statuses, a row to insert, a claimed row, a row as read back.

Plain values; nothing here knows SQL, payload formats or user code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from durable import tracing

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


class NewInstance(msgspec.Struct, gc=False):
    """A row to insert. Times are either relative (seconds, added to the database's clock) or absolute and aware.

    A Struct and unknown to the garbage collector, which it gives no work: it is in no cycle, and batches have many.
    """

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
    parent_id: int | None = None
    parent_round: int | None = None
    concurrency_key: str | None = None
    rate_limit: str | None = None
    weight: int = 1
    on_conflict: str = "raise"
    """What an occupied correlation key means: "raise" DuplicateError, or "return" whoever occupies it."""
    trace: str | None = None
    """The trace context it is inserted in, when something traces."""

    def __post_init__(self) -> None:
        if self.trace is None:
            self.trace = tracing.context("insert", self.machine)


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
    parent_id: int | None = None
    children_round: int = 0
    inbox: int | None = None
    """Id of the newest signal delivered when the row was claimed; None: it never had one."""
    awaits: Sequence[str] | None = None
    parent_round: int | None = None
    trace: str | None = None
    concurrency_key: str | None = None
    gate_shard: int | None = None
    rate_limit: str | None = None
    signals: Sequence[StoredSignal] = ()
    """The inbox, loaded after the claim when `inbox` says there may be one."""

    @property
    def seen(self) -> int:
        """Id of the newest signal that the step was shown, or could have been; 0 without signals."""
        return max(self.inbox or 0, self.signals[-1].id if self.signals else 0)

    @property
    def reports_to(self) -> int | None:
        """The parent whose barrier counts its end; a retried child was counted before, and is not again."""
        return None if self.parent_round is None else self.parent_id


class StoredSignal(NamedTuple):
    """A signal as it lies in an inbox."""

    id: int
    name: str
    payload_type: str
    payload: bytes
    created_at: datetime
    trace: str | None = None


@dataclass(slots=True)
class NewSignal:
    """A signal to deliver: to an id, or to whoever occupies a correlation key."""

    target: int | str
    name: str
    payload: Payload
    dedup_key: str | None = None
    trace: str | None = None
    """The trace context it is sent in, when something traces."""

    def __post_init__(self) -> None:
        if self.trace is None:
            self.trace = tracing.context("signal", self.name)


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
