"""Leases of worker processes and beats, and taking back the rows of those that died. SQL in sql/workers.sql."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from psycopg.types.json import Jsonb

from durable.storage.arrays import Int4Array, Int8Array, TextArray
from durable.storage.claims import held
from durable.storage.instances import end, lock_free, lock_parents
from durable.storage.lanes import free
from durable.storage.session import Operation

CRASH_WINDOW = 300.0
"""Seconds for which the death of a worker process counts towards a crash loop of its queue."""
CRASH_LOOP = 5
"""Deaths that are a crash loop. One instance that kills its process each time causes `max_crashes` of them, 3."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process a lease belongs to, and the command it is a part of: itself, or the supervisor that forked it.

    (host, boot_id, command_pid, command_start) names a command for ever. `tasks` ("name:version") is what it can run.
    """

    kind: str
    name: str
    host: str
    boot_id: str
    pid: int
    command_pid: int
    command_start: str
    queue: str | None = None
    slots: int = 1
    tasks: Sequence[str] = ()


class CrashLoop(NamedTuple):
    """A queue that has lost `deaths` worker processes within CRASH_WINDOW; `last` tells how the last one died."""

    queue: str
    deaths: int
    last: str


@dataclass(slots=True)
class Reclaimed:
    """What a reclaim did: runnable rows per queue, ids that counted a crash, ids that failed for it.

    taken  rows taken back per queue; `by_queue` counts woken parents too, and not what ended
    """

    by_queue: dict[str, int] = field(default_factory=dict)
    crashed: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    taken: Counter[str] = field(default_factory=Counter)

    def add(self, other: Reclaimed) -> None:
        """Count another reclaim in."""
        for queue, count in other.by_queue.items():
            self.by_queue[queue] = self.by_queue.get(queue, 0) + count
        self.taken += other.taken
        self.crashed += other.crashed
        self.lost += other.lost
        self.ids += other.ids


def register(identity: Identity, ttl: float) -> Operation[int]:
    """Open a lease of `ttl` seconds and return its worker id."""
    rows = yield (
        "register",
        {
            "kind": identity.kind,
            "name": identity.name,
            "host": identity.host,
            "boot_id": identity.boot_id,
            "pid": identity.pid,
            "command_pid": identity.command_pid,
            "command_start": identity.command_start,
            "queue": identity.queue,
            "slots": identity.slots,
            "ttl": ttl,
            "tasks": TextArray(identity.tasks),
        },
    )
    return int(rows[0][0])


def heartbeat(
    ids: Sequence[int], ttl: float, entered: Mapping[int, Sequence[tuple[int, int, float]]] | None = None
) -> Operation[set[int]]:
    """Extend leases to `ttl` seconds from now; return those still alive, the others are dead for ever.

    entered  by worker id, what it runs: (id, token, seconds that it has run) of each
    """
    ordered, running = sorted(ids), entered or {}
    told = [json.dumps(running.get(worker, ())) for worker in ordered]
    rows = yield "heartbeat", {"ids": Int8Array(ordered), "entered": TextArray(told), "ttl": ttl}
    return {row[0] for row in rows}


def bury(ids: Sequence[int]) -> Operation[None]:
    """Mark leases dead, waiting for a claim in progress to end."""
    yield "bury", {"ids": Int8Array(sorted(ids))}


def note_crash(worker: int, crash: str) -> Operation[None]:
    """Note on a dead lease how its process has died; `crash_loops` counts it for as long as the lease is kept."""
    yield "note_crash", {"worker": worker, "crash": crash}


def crash_loops() -> Operation[list[CrashLoop]]:
    """Return the queues that lose one worker process after the other."""
    rows = yield "crash_loops", {"seconds": CRASH_WINDOW, "least": CRASH_LOOP}
    return [CrashLoop(*row) for row in rows]


def reclaim(
    worker: int,
    entered: Sequence[tuple[int, int]] | None,
    max_crashes: int,
    cause: str,
    *,
    wait: bool = True,
) -> Operation[Reclaimed]:
    """Take back every row of a dead worker id. Needs a transaction; skips rows whose outcome is committing right now.

    entered  (id, token) of the rows it was running; None when unknown: then all of them count a crash
    cause    how the process died, for those that fail with WorkerLost
    wait     False: skip rows whose parent another session holds, too
    """
    pairs = entered or ()
    rows_held = yield from held(worker)
    left: Collection[int] = ()
    if rows_held and wait:
        yield from lock_parents(list(rows_held))
    elif rows_held:
        left = yield from lock_free(list(rows_held))
    rows = yield (
        "reclaim",
        {
            "worker": worker,
            "except": Int8Array(sorted(left)),
            "entered_ids": Int8Array([pair[0] for pair in pairs]),
            "entered_tokens": Int4Array([pair[1] for pair in pairs]),
            "all_entered": entered is None,
            "max_crashes": max_crashes,
            "error": Jsonb({"type": "WorkerLost", "message": f"{cause}; that was crash {max_crashes} in this step"}),
        },
    )
    return (yield from _reclaimed(rows, wait))


def give_up(
    worker: int, steps: Sequence[tuple[int, int, str]], max_crashes: int, *, wait: bool = True
) -> Operation[Reclaimed]:
    """Take back rows whose steps ran too long, from a worker that lives: each counts a crash. Needs a transaction.

    steps  (id, token, why it was given up, for one that fails with WorkerLost)
    wait   False: skip rows whose parent another session holds, too
    Skips rows whose outcome is committing right now.
    """
    ordered = sorted(steps)
    ids = [step[0] for step in ordered]
    if wait:
        yield from lock_parents(ids)
    else:
        left = yield from lock_free(ids)
        ordered = [step for step in ordered if step[0] not in left]
    errors = [
        json.dumps({"type": "WorkerLost", "message": f"{why}; that was crash {max_crashes} in this step"})
        for _, _, why in ordered
    ]
    rows = yield (
        "give_up",
        {
            "worker": worker,
            "ids": Int8Array([step[0] for step in ordered]),
            "tokens": Int4Array([step[1] for step in ordered]),
            "errors": TextArray(errors),
            "max_crashes": max_crashes,
        },
    )
    return (yield from _reclaimed(rows, wait))


def _reclaimed(rows: Sequence[Sequence[Any]], wait: bool) -> Operation[Reclaimed]:
    """Count rows that were taken back, and do what follows from their end."""
    reclaimed = Reclaimed()
    ended: list[int] = []
    for instance_id, queue, status, crashed, _, _ in rows:
        reclaimed.ids.append(instance_id)
        reclaimed.taken[queue] += 1
        if crashed:
            reclaimed.crashed.append(instance_id)
        if status == "runnable":
            reclaimed.by_queue[queue] = reclaimed.by_queue.get(queue, 0) + 1
        else:
            ended.append(instance_id)
            if status == "failed":
                reclaimed.lost.append(instance_id)
    woken = Counter((yield from end(ended)))
    woken.update((yield from free(((row[4], row[5]) for row in rows), wait=wait)))
    for queue, count in woken.items():
        reclaimed.by_queue[queue] = reclaimed.by_queue.get(queue, 0) + count
    return reclaimed


def terminations(claims: Sequence[tuple[int, int]]) -> Operation[list[tuple[int, int]]]:
    """Return those of these (id, token) claims whose process is to be killed."""
    rows = yield (
        "terminations",
        {"ids": Int8Array([claim[0] for claim in claims]), "tokens": Int4Array([claim[1] for claim in claims])},
    )
    return [(row[0], row[1]) for row in rows]


def bury_expired(connected_since: datetime, ttl: float, grace: float) -> Operation[list[tuple[int, str]]]:
    """Mark leases dead that ran out while the reaper was connected; return (worker id, description)."""
    rows = yield "bury_expired", {"connected_since": connected_since, "ttl": ttl, "grace": grace}
    return [(row[0], f"{row[1]} process {row[4]} of {row[2]} on {row[3]}") for row in rows]


def orphaned() -> Operation[list[tuple[int, str]]]:
    """Return (worker id, description) of dead or unknown leases that still hold rows."""
    rows = yield "orphaned", {}
    return [(row[0], row[1]) for row in rows]


def predecessors(host: str, boot_id: str) -> Operation[list[tuple[int, int, str, str]]]:
    """Return (worker id, command_pid, command_start, name) of this host's and boot's live leases."""
    rows = yield "predecessors", {"host": host, "boot_id": boot_id}
    return [(row[0], row[1], row[2], row[3]) for row in rows]
