"""The model: what the API promises, as plain Python in memory, one event after another. It knows no SQL and no clock.

Time is in seconds since the beginning and passes only by `travel`. Ids are given by the database, and which of several
claimable rows is claimed is the database's choice too, within `claimable`; everything else is foretold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.property.program import INITIAL, OTHER, Plan, State, plan, state_of, tag_of

TERMINAL = ("done", "failed", "cancelled")
MOST_CRASHES = 3
GATES = {"gate": 2}
"""How many may execute of a key of that name; of any other key one."""


@dataclass
class Signal:
    """A message in an inbox; a consumed one stays only as a tombstone of its dedup key."""

    number: int
    name: str
    payload: Any
    dedup: str | None
    consumed: bool = False


@dataclass
class Instance:
    """One instance; the fields are called as the columns where they are the same."""

    id: int
    kind: str
    state: State
    step: str
    status: str
    queue: str
    priority: int
    key: str | None
    scope: tuple[str, ...] | None
    limit: str | None
    due: int
    expires: int | None
    parent_id: int | None = None
    parent_round: int | None = None
    token: int = 0
    version: int = 0
    attempt: int = 0
    crashes: int = 0
    worker: int | None = None
    cancel_requested: bool = False
    awaits: tuple[str, ...] | None = None
    shown: set[int] = field(default_factory=set)
    newest: int = 0
    """The newest signal delivered; `seen`: the newest that a step whose outcome committed was shown."""
    seen: int = 0
    rerun: bool = False
    deadline: int | None = None
    inbox: list[Signal] = field(default_factory=list)
    pending: int = 0
    rounds: int = 0
    result: Any = None
    error: str | None = None

    @property
    def live(self) -> bool:
        return self.status not in TERMINAL

    @property
    def occupies(self) -> bool:
        """Whether its correlation key is taken by it."""
        return self.key is not None and (self.live if self.scope is None else self.status in self.scope)

    @property
    def awaited(self) -> list[Signal]:
        return [s for s in self.inbox if not s.consumed and s.name in (self.awaits or ())]

    @property
    def tag(self) -> int:
        return tag_of(self.state)


@dataclass(frozen=True)
class Flight:
    """A step that has run and is not committed: the claim it ran under, what it was shown, what it ends in."""

    id: int
    worker: int
    token: int
    version: int
    shown: tuple[int, ...]
    seen: int
    plan: Plan


class Model:
    """All instances, the paused queues, the time."""

    def __init__(self) -> None:
        self.now = 0
        self.instances: dict[int, Instance] = {}
        self.paused: set[str] = set()
        self._signals = 0

    # Producing

    def occupant(self, key: str | None) -> int | None:
        """Who has a correlation key."""
        return next((i.id for i in self.instances.values() if i.occupies and i.key == key), None)

    def free(self, spec: dict[str, Any]) -> bool:
        """Whether a new instance of a spec would find its key free: one that never occupies does not look."""
        return spec["key"] is None or spec["scope"] == [] or self.occupant(spec["key"]) is None

    def born(self, instance_id: int, spec: dict[str, Any], parent: Instance | None = None) -> Instance:
        """An instance was inserted."""
        assert instance_id not in self.instances, "ids are not used twice"
        scope = spec["scope"]
        live = ("scheduled", "runnable", "executing", "awaiting_signal", "awaiting_children")
        self.instances[instance_id] = born = Instance(
            id=instance_id,
            kind=spec["kind"],
            state=state_of(spec),
            step=INITIAL[spec["kind"]],
            status="scheduled" if spec["delay"] else "runnable",
            queue=spec["queue"],
            priority=spec["priority"],
            key=spec["key"],
            scope=None if scope is None else (*live, *scope) if scope else (),
            limit=spec["limit"],
            due=self.now + spec["delay"],
            expires=None if spec["expires"] is None else self.now + spec["expires"],
            parent_id=parent and parent.id,
            parent_round=parent and parent.rounds,
            rerun=spec["rerun"],
        )
        return born

    def deliver(self, target: int | str, name: str, payload: Any, dedup: str | None) -> bool | None:
        """Signal an id or a key's occupant: whether it was new, None when nothing live is there."""
        found = self.instances.get(target if isinstance(target, int) else self.occupant(target) or 0)
        if found is None or not found.live:
            return None
        if dedup is not None and any(s.dedup == dedup for s in found.inbox):
            return False
        self._signals += 1
        found.inbox.append(Signal(self._signals, name, payload, dedup))
        found.newest = self._signals
        if found.status == "awaiting_signal" and name in (found.awaits or ()):
            self._wake(found)
        return True

    # Steering

    def family(self, instance_id: int) -> list[Instance]:
        """An instance and everything below it; what is gone hides what was below."""
        if instance_id not in self.instances:
            return []
        below = [i.id for i in self.instances.values() if i.parent_id == instance_id]
        return [self.instances[instance_id], *(relative for child in below for relative in self.family(child))]

    def cancel(self, instance_id: int, cascade: bool) -> bool:
        """Cancel; whether anything was live."""
        relatives = self.family(instance_id)
        found = [i for i in relatives if i.live and (cascade or i.id == instance_id)]
        for i in found:
            i.error = i.error if i.cancel_requested else "Cancelled"
            i.cancel_requested = True
        self._end((i, "cancelled") for i in found if i.status != "executing")
        return bool(found)

    def rival(self, instance_id: int) -> int | None:
        """Who has the key that a failed one would need."""
        i = self.instances[instance_id]
        return None if i.status != "failed" or i.occupies or i.scope == () else self.occupant(i.key)

    def retry(self, instance_id: int) -> bool:
        """Put a failed one back, whose key is free."""
        i = self.instances[instance_id]
        if i.status != "failed":
            return False
        i.status, i.attempt, i.crashes, i.result, i.expires = "runnable", 0, 0, None, None
        i.deadline, i.parent_round = None, None
        return True

    def purge(self, queue: str) -> int:
        """Delete what never started; to a parent that is an end."""
        gone = [
            i
            for i in self.instances.values()
            if i.queue == queue and i.status in ("runnable", "scheduled") and not i.version
        ]
        for i in gone:
            del self.instances[i.id]
        self._lower(gone)
        return len(gone)

    # Time

    def promote(self) -> None:
        for i in self.instances.values():
            if i.status == "scheduled" and i.due <= self.now:
                i.status = "runnable"

    def time_out(self) -> None:
        for i in self.instances.values():
            if i.status == "awaiting_signal" and i.deadline is not None and i.deadline <= self.now:
                self._wake(i)

    def collect(self) -> None:
        """Forget finished ones that kept their key, but a live parent's."""
        for i in list(self.instances.values()):
            parent = self.instances.get(i.parent_id or 0)
            if not i.live and i.occupies and not (parent and parent.live):
                del self.instances[i.id]

    # Working

    def claimable(self, queue: str, limited: bool = False, suspect: bool = False) -> list[Instance]:
        """What a worker may claim next from a queue, the best yet to be chosen."""
        return [
            i
            for i in self.instances.values()
            if i.status == "runnable" and i.queue == queue and queue not in self.paused
            if (limited or (suspect == (i.crashes > 0))) and limited == (i.limit is not None)
            if i.limit is None or self.room(i.limit) > 0
        ]

    def room(self, limit: str) -> int:
        """How many more of a concurrency key may execute."""
        executing = sum(i.limit == limit and i.status == "executing" for i in self.instances.values())
        return GATES.get(limit.split(":")[0], 1) - executing

    def claim(self, instance_id: int, worker: int) -> Flight | None:
        """A row was claimed; None if it had expired, else what its step does."""
        i = self.instances[instance_id]
        i.token += 1
        if not i.version and i.expires is not None and i.expires <= self.now:
            i.error = "Expired"
            self._end([(i, "cancelled")])
            return None
        i.status, i.worker = "executing", worker
        return self.look(instance_id)

    def look(self, instance_id: int) -> Flight:
        """Run the step of an executing row."""
        i = self.instances[instance_id]
        assert i.worker is not None, "it is claimed"
        shown = i.awaited
        children = [
            (c.tag, c.status)
            for _, c in sorted(self.instances.items())
            if c.parent_id == i.id and c.parent_round == i.rounds
        ]
        inbox = [s.payload for s in i.inbox if not s.consumed]
        decided = plan(i.kind, i.state, [s.payload for s in shown], inbox, children, i.attempt)
        return Flight(i.id, i.worker, i.token, i.version, tuple(s.number for s in shown), i.newest, decided)

    def owns(self, flight: Flight) -> bool:
        """Whether the claim of a step still stands."""
        i = self.instances.get(flight.id)
        claim = (flight.worker, flight.token, flight.version)
        return i is not None and i.status == "executing" and (i.worker, i.token, i.version) == claim

    def flush(self, flights: Sequence[Flight], find: Callable[[int, int], int]) -> list[int]:
        """Commit outcomes in one transaction; return the ids of those that were not stale.

        find  the id that the database gave a child, of a parent and with a tag
        """
        owned = sorted((f for f in flights if self.owns(f)), key=lambda f: f.id)
        parents = []
        for flight in owned:
            i = self.instances[flight.id]
            i.version += 1
            unread, i.seen = i.newest > flight.seen, flight.seen
            if i.rerun and unread and flight.plan.kind in TERMINAL and not i.cancel_requested:
                i.status, i.error, i.crashes, i.worker = "runnable", None, 0, None
                continue
            if flight.plan.state is not None:  # kept also where a cancel overrules what was to come of it
                i.step, i.state = OTHER[i.step], flight.plan.state
                i.rounds += flight.plan.kind == "children"
            if i.cancel_requested:
                self._end([(i, "cancelled")])
                continue
            self._commit(i, flight)
            if flight.plan.kind == "children":
                parents.append((i, flight.plan.children))
        for parent, specs in parents:
            there = [self.born(find(parent.id, s["tag"]), s, parent) for s in specs if self.free(s)]
            parent.pending = len(there)
            parent.status = "awaiting_children" if there else "runnable"
        return [f.id for f in owned]

    def _commit(self, i: Instance, flight: Flight) -> None:
        decided = flight.plan
        i.error, i.crashes, i.worker = decided.error, 0, None
        if decided.kind in TERMINAL:
            i.result = decided.result
            self._end([(i, decided.kind)])
            return
        i.due = self.now + decided.delay
        i.status = "scheduled" if decided.delay else "runnable"
        if decided.kind == "retry":
            i.attempt += 1
            return
        i.attempt = 0
        if decided.kind == "await":
            i.status, i.awaits = "awaiting_signal", decided.names
            i.deadline = None if decided.timeout is None else self.now + decided.timeout
            dropped = [s.number for s in i.inbox if s.number in flight.shown and s.name not in decided.names]
            self._consume(i, dropped)
            i.shown |= set(flight.shown) - set(dropped)
            if any(s.number not in i.shown for s in i.awaited):
                self._wake(i)
            return
        i.awaits, i.shown = None, set()
        self._consume(i, flight.shown)
        if decided.inline and not decided.delay:
            i.status, i.worker = "executing", flight.worker

    def _consume(self, i: Instance, numbers: Iterable[int]) -> None:
        """Forget signals; one with a dedup key stays as a tombstone."""
        gone = set(numbers)
        for s in i.inbox:
            if s.number in gone:
                s.consumed, s.payload = True, None
        i.inbox = [s for s in i.inbox if not s.consumed or s.dedup is not None]

    # Losing

    def release(self, flight: Flight) -> None:
        """A claim was given back; no crash."""
        if self.owns(flight):
            self._take_back(self.instances[flight.id], crashed=False)

    def give_up(self, flight: Flight) -> None:
        """A claim was taken from a worker whose step ran too long."""
        if self.owns(flight):
            self._take_back(self.instances[flight.id], crashed=True)

    def reap(self, workers: Iterable[int]) -> None:
        """Everything that dead workers held was taken back."""
        dead = set(workers)
        for i in list(self.instances.values()):
            if i.status == "executing" and i.worker in dead:
                self._take_back(i, crashed=True)

    def _take_back(self, i: Instance, crashed: bool) -> None:
        i.worker = None
        i.crashes += crashed
        if i.cancel_requested:
            self._end([(i, "cancelled")])
        elif crashed and i.crashes >= MOST_CRASHES:
            i.error = "WorkerLost"
            self._end([(i, "failed")])
        else:
            i.status = "runnable"

    # Ends

    def _wake(self, i: Instance) -> None:
        i.status, i.deadline = "runnable", None

    def _end(self, ends: Iterable[tuple[Instance, str]]) -> None:
        """Finish instances together: all of them have ended before the first barrier is lowered."""
        gone = []
        for i, status in ends:
            i.status, i.worker = status, None
            if status != "failed":
                i.inbox = [s for s in i.inbox if s.number > i.seen]
            gone.append(i)
        self._lower(gone)

    def _lower(self, gone: Iterable[Instance]) -> None:
        for i in gone:
            parent = self.instances.get(i.parent_id or 0) if i.parent_round is not None else None
            if parent is not None and parent.status == "awaiting_children":
                parent.pending -= 1
                if not parent.pending:
                    parent.status = "runnable"
