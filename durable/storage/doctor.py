"""What `durable doctor` reads: who holds back vacuum, what is stuck, what room is left. SQL in sql/doctor.sql.

And what it mends: rows that contradict each other. SQL in sql/repair.sql.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

from durable.sql import Statements
from durable.storage import maintenance, partitions
from durable.storage.arrays import Int8Array
from durable.storage.session import Connection, Operation, connect, run

LOOKS = 8
"""Times that two clients of a pooler compare their server sessions."""


class Holder(NamedTuple):
    """What keeps vacuum from removing dead rows.

    kind     session, standby, slot, prepared
    name     its pid, or the name of the slot or of the prepared transaction
    age      seconds since its transaction began; None where Postgres keeps no time
    xids     transactions that began since
    """

    kind: str
    name: str
    application: str | None
    user: str | None
    state: str | None
    address: str | None
    age: float | None
    xids: int | None


class LockHolder(NamedTuple):
    """A session whose transaction holds locks in our tables; `age` is seconds since it began, None if unknown."""

    pid: int
    application: str | None
    user: str | None
    state: str | None
    age: float | None
    tables: Sequence[str]


class DeadRows(NamedTuple):
    """A table's rows as Postgres counts them; `vacuumed` is seconds since a vacuum, None for never."""

    table: str
    live: int
    dead: int
    vacuumed: float | None


class Stuck(NamedTuple):
    """Executing rows of a worker process that is gone; all but its id and the rows are None when no lease is left."""

    worker_id: int
    name: str | None
    host: str | None
    pid: int | None
    gone: float | None
    number: int
    example: int


class Unknown(NamedTuple):
    """Runnable rows that no live worker of their queue can run."""

    queue: str
    machine: str
    version: int
    number: int
    example: int


class MissingLimit(NamedTuple):
    """A rate limit that rows wait for and nobody has defined."""

    name: str
    number: int
    example: int


class BeatWork(NamedTuple):
    """What a beat would see to; `rows` is counted up to two hundred."""

    schedules: int
    rows: int


class Sessions(NamedTuple):
    """Client sessions of one application, and how many sessions ordinary roles may have in all."""

    application: str
    number: int
    room: int


class LiveRow(NamedTuple):
    """A live instance, and what its step begins from; the state is undecoded."""

    id: int
    queue: str
    machine: str
    version: int
    step: str
    state_type: str
    state: bytes


class WaitingSignal(NamedTuple):
    """A signal that nobody has consumed; the payload is undecoded."""

    id: int
    target_id: int
    name: str
    payload_type: str
    payload: bytes


class LostParent(NamedTuple):
    """A live child whose parent is nowhere."""

    id: int
    parent_id: int


class WrongBarrier(NamedTuple):
    """A parent, how many children it waits for, and how many of them there are."""

    id: int
    pending: int
    unfinished: int


class Unheard(NamedTuple):
    """A live instance, and how many signals it would never be shown or sleeps on."""

    id: int
    signals: int


class Damage(NamedTuple):
    """Rows that contradict each other; `letters` counts signals of what is not live, of `addressee` for one."""

    parents: Sequence[LostParent] = ()
    barriers: Sequence[WrongBarrier] = ()
    unheard: Sequence[Unheard] = ()
    letters: int = 0
    addressee: int | None = None


@dataclass
class Repaired:
    """What a repair did: ids by what was done to them, how many signals were deleted, queue -> rows that now run."""

    detached: list[int] = field(default_factory=list)
    recounted: list[int] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    deleted: int = 0
    ready: Counter[str] = field(default_factory=Counter)


def holders() -> Operation[list[Holder]]:
    """Return everything that holds the vacuum horizon of this database, the oldest first."""
    rows = yield "horizon_holders", {}
    return [Holder(*row) for row in rows]


def lock_holders(schema: str) -> Operation[list[LockHolder]]:
    """Return the other sessions whose transactions hold row or table locks in our tables, the oldest first."""
    rows = yield "lock_holders", {"schema": schema}
    return [LockHolder(*row) for row in rows]


def dead_rows(schema: str) -> Operation[list[DeadRows]]:
    """Return the dead rows of each table, most first."""
    rows = yield "dead_rows", {"schema": schema}
    return [DeadRows(*row) for row in rows]


def stuck(slack: float) -> Operation[list[Stuck]]:
    """Return who left executing rows behind more than `slack` seconds ago."""
    rows = yield "stuck_leases", {"slack": slack}
    return [Stuck(*row) for row in rows]


def unknown() -> Operation[list[Unknown]]:
    """Return the waiting tasks and versions that no live worker of their queue knows."""
    rows = yield "unknown_waiting", {}
    return [Unknown(*row) for row in rows]


def missing_limits() -> Operation[list[MissingLimit]]:
    """Return the rate limits that rows wait for and that are not there."""
    rows = yield "limits_missing", {}
    return [MissingLimit(*row) for row in rows]


def beat_work() -> Operation[BeatWork]:
    """Return what waits for a beat."""
    rows = yield "beat_wanted", {}
    return BeatWork(*rows[0])


def sessions() -> Operation[list[Sessions]]:
    """Return the sessions of the whole server by application, most first."""
    rows = yield "connections_used", {}
    return [Sessions(*row) for row in rows]


def notification_queue() -> Operation[float]:
    """Return how full the server's notification queue is, from 0 to 1."""
    rows = yield "notification_queue", {}
    return float(rows[0][0])


def settings() -> Operation[dict[str, str]]:
    """Return what the server and our role are set to, as far as it matters to us; times are in milliseconds."""
    rows = yield "settings_for_us", {}
    return dict(rows)


def pooler_mode(dsn: str, title: str, sql: Statements, timeout: float) -> str | None:
    """Return "transaction" or "session" for a DSN that leads through a pooler, None for one that does not.

    A pooler makes up the pid that it tells its client. A client that is served by several server sessions, or two that
    are served by one, both being connected, have it for a transaction only. Raises psycopg.OperationalError.
    """
    with closing(connect(dsn, title, pooler=True, timeout=timeout)) as one:
        pid = run(one, sql, backend_pid())
        if pid == one.info.backend_pid:
            return None
        with closing(connect(dsn, title, pooler=True, timeout=timeout)) as two:
            for _ in range(LOOKS):
                if run(two, sql, backend_pid()) == pid or run(one, sql, backend_pid()) != pid:
                    return "transaction"
    return "session"


def sees_others() -> Operation[bool]:
    """Return whether this role may see what other roles' sessions do."""
    rows = yield "sees_others", {}
    return bool(rows[0][0])


def backend_pid() -> Operation[int]:
    """Return the pid of the server process that answers."""
    rows = yield "backend_pid", {}
    return int(rows[0][0])


def live_page(queue: str | None, after: int, limit: int) -> Operation[list[LiveRow]]:
    """Return at most `limit` live instances with ids above `after`, of one queue or (None) of all."""
    rows = yield "live_page", {"queue": queue, "after": after, "limit": limit}
    return [LiveRow(*row) for row in rows]


def inbox_page(after: int, limit: int) -> Operation[list[WaitingSignal]]:
    """Return at most `limit` unconsumed signals with ids above `after`."""
    rows = yield "inbox_page", {"after": after, "limit": limit}
    return [WaitingSignal(*row) for row in rows]


def damage(retention: float, slack: float) -> Operation[Damage]:
    """Return what contradicts itself; signals of the finished count when garbage collection is `slack` seconds late."""
    parents = yield "lost_parents", {"retention": retention}
    barriers = yield "wrong_barriers", {}
    unheard = yield "unheard_signals", {}
    letters = yield "dead_letters", {"slack": slack}
    return Damage(
        [LostParent(*row) for row in parents],
        [WrongBarrier(*row) for row in barriers],
        [Unheard(*row) for row in unheard],
        *letters[0],
    )


def repair(found: Damage) -> Operation[Repaired]:
    """Mend what was found, as far as it is still so. Needs a transaction.

    A child of a lost parent reports to nobody, a barrier is counted again, an inbox is shown to its owner; signals of
    the finished are deleted.
    """
    done = Repaired()
    orphans = [row.id for row in found.parents]
    parents = [row.id for row in found.barriers]
    deaf = [row.id for row in found.unheard]
    if orphans or parents or deaf:
        yield "hold_rows", {"ids": Int8Array(sorted({*orphans, *parents, *deaf}))}
    if orphans:
        detached = yield "detach", {"ids": Int8Array(orphans)}
        done.detached = sorted(row[0] for row in detached)
    if parents:
        recounted = yield "mend_barriers", {"ids": Int8Array(parents)}
        done.recounted = sorted(row[0] for row in recounted)
        done.ready.update(queue for _, queue, status in recounted if status == "runnable")
    if deaf:
        heard = yield "mend_inboxes", {"ids": Int8Array(deaf)}
        done.heard = sorted(row[0] for row in heard)
        done.ready.update(queue for _, queue, woken in heard if woken)
    if found.letters:
        done.deleted = yield from maintenance.sweep_signals(limit=2**62)
    return done


def kept_partitions(connection: Connection, sql: Statements, retention: float, slack: float) -> list[date]:
    """Return the days whose partition should have been dropped more than `slack` seconds ago.

    Those with children of live parents are not among them: they stay.
    """
    now = run(connection, sql, maintenance.now()).astimezone(UTC)
    late = []
    for day in sorted(partitions.days(connection, sql)):
        begins = datetime(day.year, day.month, day.day, tzinfo=UTC)
        ends = begins + timedelta(days=1)
        if ends + timedelta(seconds=retention + slack) > now:
            break
        if not run(connection, sql, maintenance.wanted_children(begins, ends, 1)):
            late.append(day)
    return late


def missing_partitions(connection: Connection, sql: Statements) -> list[date]:
    """Return which of today and tomorrow (UTC) have no partition."""
    today = run(connection, sql, maintenance.now()).astimezone(UTC).date()
    return sorted({today, today + timedelta(days=1)} - partitions.days(connection, sql))
