"""Looking at a schema, for the command line: instances in full, queues, workers, totals; and emptying a queue.

Not for hot paths: some of these statements read every row. SQL in sql/instances.sql and sql/workers.sql.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from durable.limits import lanes_of
from durable.storage import instances, lanes
from durable.storage.arrays import Int8Array, TextArray
from durable.storage.session import Operation

BLOCKS_BEFORE = 1024
"""Blocks before the end of the history into which sessions may still write: each extends it by some at a time."""
COUNT_MOST = 100_000
"""Finished instances of one status that are counted, which takes some 30 ms."""


def waits_for(lane: str | None, limit_missing: bool | None) -> str | None:
    """Return what a parked row waits for, in words."""
    if lane is None:
        return None
    kind, _, name = lane.partition(" ")
    if kind == "key":
        return f"concurrency key {name}"
    return f"rate limit {name}{', which does not exist' if limit_missing else ''}"


class Listed(NamedTuple):
    """One line of a listing; `version` counts committed outcomes."""

    id: int
    queue: str
    priority: int
    status: str
    machine: str
    machine_version: int
    step: str
    attempt: int
    crashes: int
    version: int
    created_at: datetime
    eligible_at: datetime
    finished_at: datetime | None
    correlation_key: str | None
    error: dict[str, Any] | None
    reason: str | None
    concurrency_key: str | None
    rate_limit: str | None
    lane: str | None
    limit_missing: bool | None
    unread: bool
    """Whether it is finished and has signals that no step was shown."""

    @property
    def waits_for(self) -> str | None:
        """The limit that it waits for, in words."""
        return waits_for(self.lane, self.limit_missing)


class Detail(NamedTuple):
    """Everything about one instance; payloads are undecoded, the worker's columns are None while nobody runs it."""

    id: int
    machine: str
    machine_version: int
    step: str
    queue: str
    priority: int
    status: str
    attempt: int
    crashes: int
    version: int
    token: int
    max_attempts: int | None
    created_at: datetime
    eligible_at: datetime
    finished_at: datetime | None
    expires_at: datetime | None
    correlation_key: str | None
    correlation_scope: list[str] | None
    cancel_requested: bool
    reason: str | None
    error: dict[str, Any] | None
    state_type: str
    state: bytes
    result_type: str | None
    result: bytes | None
    worker_id: int | None
    worker_name: str | None
    worker_host: str | None
    worker_pid: int | None
    awaits: list[str] | None
    deadline: datetime | None
    parent_id: int | None
    concurrency_key: str | None
    rate_limit: str | None
    weight: int
    lane: str | None
    limit_missing: bool | None
    signals_seen: int | None
    """Of a finished one: the newest signal that a step was shown; newer ones are unread."""


class QueueState(NamedTuple):
    """One queue: live instances by what they wait for, the oldest runnable one's age in seconds, worker processes.

    paused_at, pause_reason  None unless it is paused
    concurrency              worker processes per command; None: as each command was started
    ageing                   seconds after which its rows join the best priority that waits; None: never
    """

    queue: str
    runnable: int
    scheduled: int
    executing: int
    awaiting: int
    oldest: float | None
    workers: int
    paused_at: datetime | None = None
    pause_reason: str | None = None
    concurrency: int | None = None
    ageing: float | None = None


class WorkerState(NamedTuple):
    """One process with a lease; `busy` counts the rows it holds, running or buffered."""

    id: int
    kind: str
    name: str
    host: str
    pid: int
    queue: str | None
    slots: int
    started_at: datetime
    heartbeat_at: datetime
    expires_at: datetime
    alive: bool
    busy: int


class Held(NamedTuple):
    """One claim of a worker process; `since` when its step runs, None when it only waits there, as of `told_at`."""

    worker: str
    host: str
    pid: int
    queue: str
    id: int
    task: str
    step: str
    attempt: int
    since: datetime | None
    told_at: datetime


class Registered(NamedTuple):
    """What a worker command serves and can run: queues, "name:version" of tasks and machines; `pid` the command's."""

    worker: str
    host: str
    pid: int
    queues: list[str]
    tasks: list[str]


class ProcessHealth(NamedTuple):
    """One process with a lease, whether that is live, and the seconds since its last heartbeat."""

    id: int
    kind: str
    name: str
    host: str
    pid: int
    command_pid: int
    queue: str | None
    alive: bool
    heartbeat_age: float


class QueueHead(NamedTuple):
    """The instance that is next in a queue, how long it has waited in seconds, and the slots that run nothing."""

    queue: str
    free: int
    id: int
    waited: float


class Totals(NamedTuple):
    """Status -> number of instances, a status without any is missing; and of which statuses it is no exact one."""

    counts: dict[str, int]
    estimated: frozenset[str]


class Failure(NamedTuple):
    """One of the latest failures."""

    id: int
    machine: str
    queue: str
    finished_at: datetime
    error: dict[str, Any] | None


class HistoryEnd(NamedTuple):
    """A moment half a second ago, its day (UTC), and the block with which that day's history ended."""

    at: datetime
    day: str
    block: int


class ServerFacts(NamedTuple):
    """The database server, as seen from a session in it."""

    version: str
    database: str
    max_connections: int


def listing(
    queue: str | None, status: str | None, machine: str | None, limit: int | None, before: int | None = None
) -> Operation[list[Listed]]:
    """Return instances newest first, live and finished; `limit` None for all, `before` an id they lie below."""
    rows = yield from instances.listing(queue, status, machine, limit, before)
    return [Listed(*row) for row in rows]


def show(instance_id: int) -> Operation[Detail | None]:
    """Return everything about one instance, or None if there is none of that id."""
    rows = yield "show", {"id": instance_id}
    return Detail(*rows[0]) if rows else None


def children_by_status(instance_id: int) -> Operation[dict[str, int]]:
    """Return status -> number of an instance's children of every round, live and finished."""
    rows = yield "children_by_status", {"parent": instance_id}
    return {row[0]: row[1] for row in rows}


def queues() -> Operation[list[QueueState]]:
    """Return every queue that has live instances, workers or orders, by name."""
    rows = yield "queues", {}
    return [QueueState(*row) for row in rows]


def processes() -> Operation[list[WorkerState]]:
    """Return the worker processes and beats whose lease nobody has ended, by kind and name."""
    rows = yield "workers", {}
    return [WorkerState(*row) for row in rows]


def held_by_workers(worker: str | None) -> Operation[list[Held]]:
    """Return every claim of the worker processes (of commands of one name, or None: of all), by process."""
    rows = yield "held_by_workers", {"worker": worker}
    return [Held(*row) for row in rows]


def told_since(moment: datetime) -> Operation[bool]:
    """Return whether every live worker process has told what it runs since then (the database's clock)."""
    rows = yield "told_since", {"moment": moment}
    return bool(rows[0][0])


def registered(worker: str | None) -> Operation[list[Registered]]:
    """Return what each live worker command (of one name, or None: every one) can run."""
    rows = yield "registered", {"worker": worker}
    return [Registered(*row) for row in rows]


def health(name: str | None, host: str | None) -> Operation[list[ProcessHealth]]:
    """Return the leases nobody has ended, of the commands of that name and host (None: any)."""
    rows = yield "health", {"name": name, "host": host}
    return [ProcessHealth(*row) for row in rows]


def queue_heads(workers: Sequence[int], known: Sequence[str] | None) -> Operation[list[QueueHead]]:
    """Return who is next in the queues of these workers, where anybody waits.

    known  "name:version" of machines that count; None: all
    """
    rows = yield (
        "queue_heads",
        {"workers": Int8Array(sorted(workers)), "known": None if known is None else TextArray(known)},
    )
    return [QueueHead(*row) for row in rows]


def totals() -> Operation[Totals]:
    """Return how many instances there are of each status, live and finished.

    The live table is counted. Of the history no more than COUNT_MOST rows of each status are; of more, `done` is what
    Postgres' statistics say of all less the others, and of the others the number is only a lower bound.
    """
    live = yield "live_totals", {}
    history: dict[str, int] = dict((yield "history_totals", {"most": COUNT_MOST}))
    estimated = frozenset(status for status, count in history.items() if count > COUNT_MOST)
    if "done" in estimated:
        ((known,),) = yield "history_estimate", {}
        others = sum(count for status, count in history.items() if status != "done")
        history["done"] = max(history["done"], known - others)
    counts = Counter(history)
    counts.update(dict(live))
    return Totals({status: count for status, count in counts.items() if count}, estimated)


def recent_failures(limit: int) -> Operation[list[Failure]]:
    """Return the latest failures of the last day, newest first."""
    rows = yield "recent_failures", {"limit": limit}
    return [Failure(*row) for row in rows]


def history_end() -> Operation[HistoryEnd]:
    """Return where the history ends, to be compared with later."""
    rows = yield "history_end", {}
    return HistoryEnd(*rows[0])


def finished_between(since: HistoryEnd, until: HistoryEnd) -> Operation[dict[str, int]]:
    """Return queue -> instances that finished between two looks on one day; reads no more than was written since."""
    block = max(0, since.block - BLOCKS_BEFORE)
    return dict((yield "finished_between", {"since": since.at, "until": until.at, "block": block}))


def server() -> Operation[ServerFacts]:
    """Return what the session tells of its server."""
    rows = yield "server", {}
    return ServerFacts(*rows[0])


def purgeable(queue: str | None) -> Operation[int]:
    """Return how many instances `purge` would delete."""
    rows = yield "purgeable", {"queue": queue}
    return int(rows[0][0])


def purge(queue: str | None) -> Operation[int]:
    """Delete the waiting instances of a queue (None: of all) that never started; return how many. Needs a transaction.

    To a parent they count as ended. Instances that another session holds, or whose parent it holds, are left.
    """
    locked = yield "lock_purgeable", {"queue": queue}
    rows = yield "purge", {"ids": Int8Array([row[0] for row in locked])}
    yield from instances.lower_barriers(Counter(row[1] for row in rows if row[1] is not None))
    yield from instances.clear_inboxes([row[0] for row in rows if row[2] is not None])
    yield from lanes.open_lanes((lane for row in rows for lane in lanes_of(row[3], row[4])), wait=False)
    return len(rows)
