"""Waking the worker processes of a command: whom for a row, and what they are told to look for."""

from __future__ import annotations

from collections.abc import Sequence

from durable.runtime.quarantine import Quarantine
from durable.runtime.shared import IDLE, RESCAN, ROWS, SUSPECT, Bell, SharedSeats


class Ringer:
    """Wakes by queue; `queues` holds the queue of each seat. Those of the quarantine are woken for its rows alone."""

    def __init__(
        self, queues: Sequence[str], seats: SharedSeats, bells: Sequence[Bell], quarantine: Quarantine
    ) -> None:
        self._quarantine = quarantine
        self._queues = list(queues)
        self._seats = seats
        self._bells = list(bells)
        self._turn_of: dict[str, int] = {}

    def idle(self, queue: str) -> list[int]:
        """Those to wake for a row: of a paused queue nobody."""
        return [
            index
            for index, name in enumerate(self._queues)
            if name == queue
            and (seat := self._seats.seat(index)).state == IDLE
            and not seat.paused
            and not seat.leaves
            and index not in self._quarantine.indices
        ]

    def ring(self, queue: str, count: int, flags: int) -> None:
        """Wake as many idle children of a queue as there are rows, a different one first each time."""
        idle = self.idle(queue)
        turn = self._turn_of.get(queue, 0)
        self._turn_of[queue] = turn + 1
        for offset in range(min(count, len(idle))):
            index = idle[(turn + offset) % len(idle)]
            self._seats.seat(index).hint(flags | ROWS)
            self._bells[index].ring()

    def hint_busy(self, queue: str) -> None:
        """Have every child of a queue look from the head at its next claim."""
        for index, name in enumerate(self._queues):
            if name == queue:
                self._seats.seat(index).hint(RESCAN)

    def hint_suspect(self, queue: str) -> None:
        """Have one child claim a suspect: an idle one, else a busy one, which lets its buffer run dry for it."""
        if self._quarantine.has(queue):
            self._quarantine.needed(queue)
            return
        seats = self.idle(queue) or [
            index
            for index, name in enumerate(self._queues)
            if name == queue and (seat := self._seats.seat(index)).worker_id and not seat.paused
        ]
        if not seats:
            return
        index = seats[self._turn_of.get(queue, 0) % len(seats)]
        self._turn_of[queue] = self._turn_of.get(queue, 0) + 1
        self._seats.seat(index).hint(SUSPECT)
        self._bells[index].ring()
