"""Schedules as rows: declaring them, firing what is due, switching them. SQL in sql/schedules.sql.

Exactly once with any number of beats: whoever fires a schedule holds its row's lock, and the instances and the move to
the next occurrence are one transaction. A beat that dies in between leaves neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from psycopg.types.json import Jsonb

from durable.errors import DefinitionError
from durable.instance import NewInstance, Payload
from durable.schedules import Periodic, Schedule, from_template, parse, template
from durable.storage import maintenance
from durable.storage.arrays import TextArray
from durable.storage.instances import insert_many
from durable.storage.session import Operation

MISSED_AFTER = timedelta(seconds=60)
"""How late an occurrence may be fired and not count as missed."""
AT_ONCE = 100
"""Most missed occurrences that one transaction makes up for; the next one goes on."""


@dataclass(slots=True)
class Fired:
    """What was fired: rows inserted, and the names of their schedules.

    unreadable  names of schedules that this code cannot read, which newer code has written
    broken      name -> what is wrong with it, for schedules whose row makes no sense
    """

    inserted: list[NewInstance] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    at: str | None = None
    """Name of the schedule that was being fired when an error ended it."""


class Listed(NamedTuple):
    """One schedule as it stands."""

    name: str
    app: str
    schedule: str
    tz: str
    misfire: str
    overlap: str
    enabled: bool
    next_at: datetime | None
    last_at: datetime | None
    last_id: int | None
    fired: int
    skipped: int
    machine: str
    queue: str | None


def declare(app: str, declared: Sequence[Periodic], *, forget: bool = True) -> Operation[list[str]]:
    """Store an app's schedules and (with `forget`) drop those it declares no longer. Needs a transaction.

    Returns the names that belong to another app, whose schedules are left alone.
    """
    now = yield from maintenance.now()
    taken: list[str] = []
    for entry in sorted(declared, key=lambda entry: entry.name):
        rows = yield (
            "put_schedule",
            {
                "name": entry.name,
                "app": app,
                "schedule": entry.schedule.text,
                "tz": entry.schedule.tz,
                "misfire": entry.misfire,
                "overlap": entry.overlap,
                "next_at": entry.schedule.next_after(now),
                "template": Jsonb(template(entry.new)),
                "state_type": entry.new.state.type,
                "state": entry.new.state.body,
            },
        )
        if not rows:
            taken.append(entry.name)
    if forget:
        yield "drop_schedules", {"app": app, "names": TextArray([entry.name for entry in declared])}
    return taken


def fire(unreadable: Sequence[str], limit: int = 50, into: Fired | None = None) -> Operation[Fired]:
    """Insert what is due and move each schedule on; return `into`, or a fresh Fired. Needs a transaction."""
    fired = Fired() if into is None else into
    rows = yield "due_schedules", {"unreadable": TextArray(unreadable), "limit": limit}
    for name, text, tz, misfire, overlap, next_at, values, state_type, state, now, busy, _ in rows:
        fired.at = name
        try:
            schedule = parse(text, tz)
            new = from_template(values, Payload(state_type, state))
            # In UTC: in a zone with daylight saving Python subtracts wall clocks, and an occurrence in time seems late.
            occurrences, following = occurrences_due(schedule, misfire, next_at.astimezone(UTC), now.astimezone(UTC))
        except (DefinitionError, TypeError):
            fired.unreadable.append(name)
            continue
        except Exception as error:  # a row changed by hand: it must not stop the others
            fired.broken[name] = f"{type(error).__name__}: {error}"
            continue
        due = max(len(occurrences), 1)
        if overlap == "skip":
            occurrences = [] if busy else occurrences[-1:]
        ids = (yield from insert_many([new] * len(occurrences))) if occurrences else []
        there = [instance_id for instance_id in ids if instance_id is not None]
        yield (
            "move_schedule",
            {
                "name": name,
                "next_at": following,
                "last_at": occurrences[-1] if there else None,
                "last_id": there[-1] if there else None,
                "fired": len(there),
                "skipped": due - len(there),
            },
        )
        fired.inserted += [new] * len(there)
        fired.names.append(name)
    return fired


def occurrences_due(
    schedule: Schedule, misfire: str, next_at: datetime, now: datetime
) -> tuple[list[datetime], datetime | None]:
    """Return the occurrences to fire now, of those from `next_at` on, and the one to wait for."""
    due = [next_at]
    while (following := schedule.next_after(due[-1])) is not None and following <= now and len(due) < AT_ONCE:
        due.append(following)
    if misfire == "all" or now - next_at <= MISSED_AFTER:
        return due, following  # late, if at all, and not missed
    if following is not None and following <= now:  # more than were looked at: only the latest matters
        following = schedule.next_after(now)
        due.append(_latest(schedule, due[-1], now))
    if misfire == "skip" and now - due[-1] > MISSED_AFTER:
        return [], following
    return due[-1:], following


def _latest(schedule: Schedule, after: datetime, now: datetime) -> datetime:
    """Return the last occurrence until now, by halving: there is at least one."""
    early, late = after, now
    while (late - early) > timedelta(milliseconds=1):
        middle = early + (late - early) / 2
        following = schedule.next_after(middle)
        if following is not None and following <= now:
            early = following
        else:
            late = middle
    return early


def run_by_hand(name: str) -> Operation[tuple[int | None, NewInstance] | None]:
    """Insert a schedule's instance now, whatever its time; None when there is no such schedule. Needs a transaction.

    Returns its id (None: its correlation key is occupied) and the row.
    """
    rows = yield "lock_schedule", {"name": name}
    if not rows:
        return None
    new = from_template(rows[0][0], Payload(rows[0][1], rows[0][2]))
    (instance_id,) = yield from insert_many([new])
    if instance_id is not None:
        yield "ran_schedule", {"name": name, "id": instance_id}
    return instance_id, new


def switch(name: str, enabled: bool) -> Operation[bool | None]:
    """Enable or disable a schedule; return whether that changed anything, None when there is none. Needs a transaction.

    One that is enabled begins with its next occurrence; what it missed meanwhile is not made up for.
    """
    next_at: datetime | None = None
    for listed in (yield from listing()):
        if listed.name == name and enabled:
            now = yield from maintenance.now()
            next_at = parse(listed.schedule, listed.tz).next_after(now)
    rows = yield "enable_schedule", {"name": name, "enabled": enabled, "next_at": next_at}
    return bool(rows[0][0]) if rows else None


def listing() -> Operation[list[Listed]]:
    """Return every schedule, by name."""
    rows = yield "schedules", {}
    return [Listed(*row) for row in rows]


def beat_lives() -> Operation[bool]:
    """Tell whether a beat's lease has not run out."""
    rows: list[Any] = yield "beat_lives", {}
    return bool(rows[0][0])


def overdue(seconds: float) -> Operation[bool]:
    """Tell whether a schedule has been due for that long."""
    rows: list[Any] = yield "overdue_schedules", {"seconds": seconds}
    return bool(rows[0][0])
