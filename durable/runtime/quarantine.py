"""Processes for rows with a crash behind them, beside those of many slots: when there are to be any.

Such a row runs alone, so that it harms nobody and an innocent one clears itself. A process of many slots is hardly ever
empty, and to empty it for such a row would be to stop its queue. So the row gets a process of one slot, forked when it
is needed and ended when it was not for a while.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from durable.runtime.shared import IDLE, SUSPECT, Bell, SharedSeats

FREE_FOR = 10.0
"""Seconds after which processes that nobody needs end."""


class Quarantine:
    """Asks for processes. For the agent.

    seats_of  queue -> the group of its processes for such rows, and the numbers of their seats
    """

    def __init__(
        self, seats: SharedSeats, bells: Sequence[Bell], seats_of: Mapping[str, tuple[int, list[int]]]
    ) -> None:
        self._seats = seats
        self._bells = list(bells)
        self._of = dict(seats_of)
        self._needed_at: dict[str, float] = {}
        self.indices = frozenset(index for _, indices in self._of.values() for index in indices)
        """The seats of such processes."""

    def has(self, queue: str) -> bool:
        """Whether a queue's rows with a crash behind them are run so."""
        return queue in self._of

    def needed(self, queue: str) -> None:
        """Such a row waits: wake who is free, else have one more process, each when those before it work."""
        group, indices = self._of[queue]
        self._needed_at[queue] = time.monotonic()
        serving = [index for index in indices if self._seats.seat(index).worker_id]
        for index in serving:
            if self._seats.seat(index).state == IDLE:
                self._seats.seat(index).hint(SUSPECT)
                self._bells[index].ring()
                return
        wanted = self._seats.wanted(group)
        if wanted <= len(serving) and wanted < len(indices):
            self._seats.want(group, wanted + 1)
            self._seats.bell.ring()

    def turn(self, queues: Sequence[str], now: float) -> None:
        """Now and then: hear what processes of many slots have met, let those go that are not needed.

        queues  the queue of each seat
        """
        for index, queue in enumerate(queues):
            seat = self._seats.seat(index)
            if self.has(queue) and seat.met_suspect:
                seat.met_suspect = False
                self.needed(queue)
        for queue, needed_at in list(self._needed_at.items()):
            group, indices = self._of[queue]
            works = any(
                (seat := self._seats.seat(index)).worker_id and seat.state != IDLE and seat.entered is not None
                for index in indices
            )
            if works:
                self._needed_at[queue] = now
            elif now - needed_at > FREE_FOR:
                del self._needed_at[queue]
                self._seats.want(group, 0)
                self._seats.bell.ring()
