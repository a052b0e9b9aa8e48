"""Memory that the supervisor, its agent and its worker processes share: one seat per worker process.

An anonymous mmap made before the first fork, so it survives every process but the supervisor. Each field is eight
aligned bytes with exactly one writer at a time, so nothing is locked. A seat outlives the processes that sit in it:
a child that dies leaves here what it was running.

    worker_id       the child's lease; 0 before it has one                          child writes
    deadline        CLOCK_MONOTONIC seconds until which the lease is surely live    agent writes (child at registration)
    state           STARTING, IDLE (sleeps until it is woken), BUSY                 child writes
    entered_id      instance being stepped, 0 when none                             child writes
    entered_token   its token                                                       child writes, before entered_id
    entered_at      CLOCK_MONOTONIC seconds when that began                         child writes
    limit_at        CLOCK_MONOTONIC seconds from which it may be killed, 0 for never child writes, before entered_id
    lost            a worker_id the agent found dead                                agent writes
    pid             of the child that sits here                                     supervisor writes
    hints           RESCAN, SUSPECT, ROWS, LOOK, taken by the child                 agent or sibling sets, child clears
    paused          whether the child's queue is                                    agent writes
    met_suspect     whether it met a row that must run alone, in another process    child writes, agent clears
    leaves          whether it claims nothing more and is to be replaced            child writes

A child of many slots notes what it steps in its roster (roster.py) instead of in the entered_ fields.

Per queue there is a `Traffic`: which of its processes looks for rows that no notification announced, and how often
there are any. Several processes write it; a value that a race overwrites costs one claim or one look too many.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from durable import forks
from durable.runtime.roster import Roster

STARTING, IDLE, BUSY = 0, 1, 2
RESCAN, SUSPECT, ROWS, LOOK = 1, 2, 4, 8
"""Hints: claim from the head; a row must run alone; a notification announced rows; take over as the lookout."""
LONGEST_POLL = 3600.0
"""Seconds a process sleeps at most: poll() counts milliseconds in 32 bits, and what is due may be months away."""

_FIELDS = 13
(_WORKER_ID, _DEADLINE, _STATE, _ENTERED_ID, _ENTERED_TOKEN, _ENTERED_AT, _LIMIT_AT, _LOST, _PID, _HINTS,
 _PAUSED, _MET_SUSPECT, _LEAVES) = range(_FIELDS)  # fmt: skip


_TRAFFIC_FIELDS = 4
_FOUND_AT, _GAP, _LOOKED_AT, _LOOKOUT = range(_TRAFFIC_FIELDS)


@dataclass(frozen=True, slots=True)
class Entered:
    """A row a child was stepping."""

    id: int
    token: int


class SharedSeats:
    """The memory itself; `seat(n)` is one child's part of it.

    started  how many processes each queue starts with; how many it is to have is written here by the agent
    rosters  by the number of a seat, of those whose processes have many slots
    bell     wakes the supervisor
    """

    def __init__(self, count: int, started: Sequence[int] = (1,), rosters: Mapping[int, Roster] | None = None) -> None:
        self._rosters = rosters or {}
        words = count * _FIELDS + 2 + len(started) * (1 + _TRAFFIC_FIELDS)
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, words * 8))
        self.bell = Bell()
        self.started = tuple(started)
        view = memoryview(self._memory)
        self._integers: memoryview[int] = view.cast("q")
        self._floats: memoryview[float] = view.cast("d")
        self._database_up = count * _FIELDS
        self.count = count
        for queue, processes in enumerate(started):
            self.want(queue, processes)

    def disown(self) -> None:
        """In a child that user code forks: go on with a private copy."""
        view = memoryview(bytearray(self._memory))
        self._integers, self._floats = view.cast("q"), view.cast("d")

    def seat(self, index: int) -> Seat:
        """Return seat number `index`."""
        return Seat(self._integers, self._floats, index * _FIELDS, self._rosters.get(index))

    def wanted(self, queue: int) -> int:
        """How many processes a queue is to have, by its number."""
        return int(self._integers[self._database_up + 2 + queue])

    def want(self, queue: int, processes: int) -> None:
        """Agent: have so many processes serve a queue; ring the bell then."""
        self._integers[self._database_up + 2 + queue] = processes

    def traffic(self, queue: int) -> Traffic:
        """Return what is known of a queue's arrivals, by its number."""
        first = self._database_up + 2 + len(self.started) + queue * _TRAFFIC_FIELDS
        return Traffic(self._integers, self._floats, first)

    def ask(self, signal: int) -> None:
        """Agent: have the supervisor do as if it had got a signal; ring the bell then."""
        self._integers[self._database_up + 1] = signal

    def take_asked(self) -> int:
        """Supervisor: the signal asked for since the last call, 0 for none."""
        signal = int(self._integers[self._database_up + 1])
        if signal:
            self._integers[self._database_up + 1] = 0
        return signal

    @property
    def database_up(self) -> bool:
        """Whether the agent, the command's one prober, reaches the database."""
        return bool(self._integers[self._database_up])

    @database_up.setter
    def database_up(self, value: bool) -> None:
        self._integers[self._database_up] = int(value)


class Seat:
    """One child's fields; see the module's head for who writes which."""

    __slots__ = ("__weakref__", "_base", "_floats", "_integers", "roster")

    def __init__(
        self, integers: memoryview[int], floats: memoryview[float], base: int, roster: Roster | None = None
    ) -> None:
        self._integers = integers
        self._floats = floats
        self._base = base
        self.roster = roster

    def disown(self) -> None:
        """In a child that user code forks: go on with a private copy."""
        start = self._base
        view = memoryview(bytearray(self._integers[start : start + _FIELDS].tobytes()))
        self._integers, self._floats, self._base = view.cast("q"), view.cast("d"), 0
        if self.roster is not None:
            self.roster.disown()

    def clear(self) -> None:
        """Empty the seat for a new child."""
        for field in range(_FIELDS):
            self._integers[self._base + field] = 0
        if self.roster is not None:
            self.roster.clear()

    @property
    def worker_id(self) -> int:
        return int(self._integers[self._base + _WORKER_ID])

    @worker_id.setter
    def worker_id(self, value: int) -> None:
        self._integers[self._base + _WORKER_ID] = value

    @property
    def deadline(self) -> float:
        return float(self._floats[self._base + _DEADLINE])

    @deadline.setter
    def deadline(self, value: float) -> None:
        self._floats[self._base + _DEADLINE] = value

    @property
    def state(self) -> int:
        return int(self._integers[self._base + _STATE])

    @state.setter
    def state(self, value: int) -> None:
        self._integers[self._base + _STATE] = value

    @property
    def lost(self) -> int:
        return int(self._integers[self._base + _LOST])

    @lost.setter
    def lost(self, value: int) -> None:
        self._integers[self._base + _LOST] = value

    @property
    def pid(self) -> int:
        return int(self._integers[self._base + _PID])

    @pid.setter
    def pid(self, value: int) -> None:
        self._integers[self._base + _PID] = value

    def enter(self, instance_id: int, token: int, at: float, limit_at: float = 0.0) -> None:
        """Note what is about to be stepped, and from when on it may be killed."""
        base, integers = self._base, self._integers
        integers[base + _ENTERED_TOKEN] = token
        self._floats[base + _ENTERED_AT] = at
        self._floats[base + _LIMIT_AT] = limit_at
        integers[base + _ENTERED_ID] = instance_id

    def leave(self) -> None:
        """Note that the outcome was handed over."""
        self._integers[self._base + _ENTERED_ID] = 0

    @property
    def entered(self) -> Entered | None:
        """What is being stepped, or None."""
        instance_id = int(self._integers[self._base + _ENTERED_ID])
        return Entered(instance_id, int(self._integers[self._base + _ENTERED_TOKEN])) if instance_id else None

    def running(self, now: float) -> list[tuple[int, int, float]]:
        """What is being stepped: (id, token, seconds since it began) of each."""
        if self.roster is not None:
            return [(step.id, step.token, max(0.0, now - step.at)) for step in self.roster.steps()]
        entered = self.entered
        return [] if entered is None else [(entered.id, entered.token, max(0.0, now - self.entered_at))]

    @property
    def entered_at(self) -> float:
        return float(self._floats[self._base + _ENTERED_AT])

    @property
    def limit_at(self) -> float:
        return float(self._floats[self._base + _LIMIT_AT])

    @property
    def paused(self) -> bool:
        return bool(self._integers[self._base + _PAUSED])

    @paused.setter
    def paused(self, value: bool) -> None:
        self._integers[self._base + _PAUSED] = int(value)

    @property
    def met_suspect(self) -> bool:
        return bool(self._integers[self._base + _MET_SUSPECT])

    @met_suspect.setter
    def met_suspect(self, value: bool) -> None:
        self._integers[self._base + _MET_SUSPECT] = int(value)

    @property
    def leaves(self) -> bool:
        return bool(self._integers[self._base + _LEAVES])

    @leaves.setter
    def leaves(self, value: bool) -> None:
        self._integers[self._base + _LEAVES] = int(value)

    def hint(self, flags: int) -> None:
        """Ask the child to look again; a hint that is overwritten by a race costs at most a second."""
        self._integers[self._base + _HINTS] |= flags

    def take_hints(self) -> int:
        """Return the hints given since the last call."""
        flags = int(self._integers[self._base + _HINTS])
        if flags:
            self._integers[self._base + _HINTS] = 0
        return flags


class Traffic:
    """What a command knows of the rows that arrive in one queue unannounced. Times are CLOCK_MONOTONIC seconds.

    found_at   when a claim last found rows that no notification had announced
    gap        moving mean of the seconds between two such rows
    looked_at  when the lookout last claimed
    lookout    pid of the process that claims again and again on behalf of the others; 0 for none
    """

    __slots__ = ("_base", "_floats", "_integers")

    def __init__(self, integers: memoryview[int], floats: memoryview[float], base: int) -> None:
        self._integers, self._floats, self._base = integers, floats, base

    @property
    def found_at(self) -> float:
        return self._floats[self._base + _FOUND_AT]

    @property
    def gap(self) -> float:
        return self._floats[self._base + _GAP]

    def found(self, now: float, gap: float) -> None:
        """Note that a claim has found rows, and the new mean."""
        self._floats[self._base + _GAP] = gap
        self._floats[self._base + _FOUND_AT] = now

    @property
    def looked_at(self) -> float:
        return self._floats[self._base + _LOOKED_AT]

    @property
    def lookout(self) -> int:
        return self._integers[self._base + _LOOKOUT]

    def look(self, pid: int, now: float) -> None:
        """Note that the process `pid` is the lookout, and claims now."""
        self._integers[self._base + _LOOKOUT] = pid
        self._floats[self._base + _LOOKED_AT] = now


def poll_timeout(until: float) -> float:
    """Return the milliseconds for poll() until a time.monotonic(); whoever wakes before it looks again, sleeps on."""
    return 1000 * min(max(0.0, until - time.monotonic()), LONGEST_POLL)


class Bell:
    """A pipe that wakes a process: ringing never blocks, and many rings are one."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)
        forks.shared(self)

    def disown(self) -> None:
        """In a child that user code forks: neither ring nor hear the parent, nor keep its pipe open."""
        forks.silence(self.reader, self._writer)

    def ring(self) -> None:
        """Wake the reader."""
        try:
            os.write(self._writer, b"\0")
        except BlockingIOError:
            return  # the pipe is full of rings nobody has heard yet: one more says nothing new

    def silence(self) -> bool:
        """Take all rings; return whether there was one."""
        try:
            return bool(os.read(self.reader, 65536))
        except BlockingIOError:
            return False
