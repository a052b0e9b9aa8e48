"""What agents and beats do on a clock: probing, promoting what is due, sweeping. SQL in sql/maintenance.sql."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from durable.storage.arrays import Int8Array, TextArray
from durable.storage.session import Operation, Row

TARGETS = 10_000
"""Instances with signals that one sweep looks at, some 50 ms."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What an agent's idle query found.

    waiting   runnable rows per queue, no more than asked for
    suspects  queues in which a row with a crash behind it waits
    due       whether a scheduled row is due
    expired   whether a lease has run out
    opens     whether a token lane may open
    """

    waiting: dict[str, int]
    suspects: list[str]
    due: bool
    expired: bool
    opens: bool


def probe(idle: Mapping[str, int], known: Sequence[str]) -> Operation[Probe]:
    """Look for work in the queues of `idle` (queue -> idle children), of machines in `known` ("name:version")."""
    rows = yield (
        "probe",
        {
            "queues": TextArray(list(idle)),
            "idle": Int8Array(list(idle.values())),
            "known": TextArray(known),
        },
    )
    return Probe(
        {row[0]: row[1] for row in rows},
        [row[0] for row in rows if row[2]],
        any(row[3] for row in rows),
        any(row[4] for row in rows),
        any(row[5] for row in rows),
    )


def promote(limit: int = 1000) -> Operation[dict[str, int]]:
    """Make at most `limit` due rows runnable; return how many per queue."""
    rows = yield "promote", {"limit": limit}
    return {row[0]: row[1] for row in rows}


def time_out(limit: int = 1000) -> Operation[dict[str, int]]:
    """Wake at most `limit` parks whose deadline has passed; return how many per queue."""
    rows = yield "time_out", {"limit": limit}
    return {row[0]: row[1] for row in rows}


def next_due(left: Sequence[str] = ()) -> Operation[float | None]:
    """Return seconds until the next row, deadline or schedule is due (negative: overdue), None when there is none.

    left  names of schedules that do not count
    """
    rows = yield "next_due", {"left": TextArray(left)}
    return None if rows[0][0] is None else float(rows[0][0])


def take_duty(name: str, interval: float) -> Operation[bool]:
    """Claim a duty that has not run for `interval` seconds; False when another process has it, or it is not due."""
    rows = yield "take_duty", {"name": name, "interval": interval}
    return bool(rows)


def sweep_kept(retention: float, limit: int = 1000) -> Operation[int]:
    """Delete finished rows that reserved their key for `retention` seconds, but a live parent's; return how many."""
    rows = yield "sweep_kept", {"retention": retention, "limit": limit}
    return len(rows)


def wanted_children(since: datetime, until: datetime, limit: int) -> Operation[list[int]]:
    """Return at most `limit` ids of finished children in a range of the history whose parent is live."""
    rows = yield "wanted_children", {"since": since, "until": until, "limit": limit}
    return [row[0] for row in rows]


def more_than(since: datetime, until: datetime, count: int) -> Operation[bool]:
    """Tell whether a range of the history holds more than `count` rows; reads no more than that."""
    rows = yield "more_than", {"since": since, "until": until, "count": count}
    return bool(rows[0][0])


def sweep_signals(limit: int = TARGETS) -> Operation[int]:
    """Delete the signals of instances that are gone; return how many.

    Looks at `limit` instances that have signals, from a random one on: one look costs the same however many there are,
    and every one is reached in the end, whichever process looks.
    """
    ((lowest, highest),) = yield "signal_targets", {}
    if lowest is None:
        return 0
    start = random.randint(lowest, highest)  # noqa: S311 - no secret
    deleted = 0
    for since, until in ((start, highest), (lowest, start - 1)):
        if limit > 0 and since <= until:
            ((looked_at, count),) = yield "sweep_signals", {"since": since, "until": until, "limit": limit}
            limit -= looked_at
            deleted += count
    return deleted


def sweep_workers() -> Operation[int]:
    """Forget leases dead for an hour; return how many."""
    rows = yield "sweep_workers", {}
    return len(rows)


def now() -> Operation[datetime]:
    """Return the database's clock."""
    rows = yield "now", {}
    return rows[0][0]  # type: ignore[no-any-return]


class RowHolder(NamedTuple):
    """A session that holds an instance's row locked; `age` is seconds since its transaction began, None if unknown."""

    id: int
    pid: int
    application: str | None
    user: str | None
    state: str | None
    age: float | None


def row_holders(ids: Sequence[int] | None) -> Operation[list[RowHolder]]:
    """Return which other sessions hold the rows of these live instances (None: of all) locked, one row each.

    Only where a single transaction holds a row. Not for hot paths.
    """
    rows = yield "row_holders", {"ids": None if ids is None else list(ids)}
    return [RowHolder(*row) for row in rows]


def table_holders(schema: str) -> Operation[list[Row]]:
    """Return (pid, application_name, seconds) of other sessions in a transaction that uses the schema's tables."""
    return (yield "table_holders", {"schema": schema})
