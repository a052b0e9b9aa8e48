"""The places of a worker command: who may sit where, and how many there are to be.

Places come in groups, one per queue: processes of one slot each, as many as are wanted, or one process of as many
slots as are wanted. Beside each of the latter is a group for rows with a crash behind them, empty until there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from durable.runtime.roster import Roster
from durable.runtime.shared import Bell, SharedSeats
from durable.runtime.slots import PREFORK, SUSPECTS

SPARE = 16
"""Places per queue, or slots of its process, beyond those it starts with, for a larger number set while it runs."""
SUCCESSION = 2
"""Places for a process of many slots: its successor begins while it ends."""
MOST_SUSPECTS = 4
"""Processes per queue that run rows with a crash behind them."""


@dataclass
class Place:
    """One seat and who sits in it."""

    queue: str
    kind: str = PREFORK
    group: int = 0
    bell: Bell = field(default_factory=Bell)
    pid: int = 0
    forked_at: float = 0.0
    fork_at: float = 0.0
    pause: float = 0.0
    stopped_at: float | None = None
    retiring: bool = False
    reason: str = ""
    """Why it was killed, if we did it."""
    overdue: list[tuple[int, int]] | None = None
    """The claims that it was killed for; None: all it was stepping."""

    @property
    def has_many(self) -> bool:
        """Whether its process has many slots."""
        return self.kind not in (PREFORK, SUSPECTS)


class Places(list[Place]):
    """All of a command's places, in the order of its seats.

    queues  queue -> processes at the start, or slots of its process
    room    queue -> the most there can be until it is reloaded
    kind    PREFORK, THREADS or ASYNCIO
    """

    def __init__(self, queues: Mapping[str, int], room: Mapping[str, int], kind: str) -> None:
        self.groups = list(queues)
        self.room = [max(count, room.get(queue, count + SPARE)) for queue, count in queues.items()]
        started = list(queues.values())
        rosters: dict[int, Roster] = {}
        for group, queue in enumerate(queues):
            for _ in range(self.room[group] if kind == PREFORK else SUCCESSION):
                if kind != PREFORK:
                    rosters[len(self)] = Roster(self.room[group])
                self.append(Place(queue, kind, group))
        if kind != PREFORK:
            for queue, count in queues.items():
                for _ in range(min(count, MOST_SUSPECTS)):
                    self.append(Place(queue, SUSPECTS, len(self.groups)))
                self.room.append(min(count, MOST_SUSPECTS))
                self.groups.append(queue)
                started.append(0)
        self.seats = SharedSeats(len(self), started, rosters)
        self._many = {place.group for place in self if place.has_many}

    @property
    def quarantined(self) -> dict[str, tuple[int, list[int]]]:
        """By queue: the group of its processes for rows with a crash behind them, and the numbers of their seats."""
        found: dict[str, tuple[int, list[int]]] = {}
        for index, place in enumerate(self):
            if place.kind == SUSPECTS:
                found.setdefault(place.queue, (place.group, []))[1].append(index)
        return found

    def wanted(self, group: int) -> int:
        """How many processes a group is to have."""
        return 1 if group in self._many else self.seats.wanted(group)
