"""What the database orders a command to do, as its agent finds and passes it on: paused queues.

The claims themselves look at the database, so that nothing here decides what is run: a paused queue's children are
told so that they give back what they have only buffered, and sleep instead of asking in vain.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from durable.runtime.link import Link
from durable.runtime.shared import RESCAN, SUSPECT, Bell, SharedSeats
from durable.storage import control

log = logging.getLogger(__name__)


class Orders:
    """The orders for one command.

    queues  the queue of each seat
    """

    def __init__(self, link: Link, queues: Sequence[str], seats: SharedSeats, bells: Sequence[Bell]) -> None:
        self._link = link
        self._queues = list(queues)
        self._seats = seats
        self._bells = list(bells)
        self.paused: set[str] = set()
        """The queues that were paused at the last look."""

    def look(self) -> None:
        """Read the orders and pass them on. Raises psycopg.Error."""
        found = self._link.run(control.queue_orders(list(dict.fromkeys(self._queues))))
        paused = {queue for queue, orders in found.items() if orders.paused}
        for queue in sorted(paused ^ self.paused):
            log.info("queue %s is %s", queue, "paused" if queue in paused else "worked off again")
        self.paused = paused
        for index, queue in enumerate(self._queues):
            # Each time for every seat: who was forked since has an empty one.
            seat, stops = self._seats.seat(index), queue in paused
            if seat.paused != stops:
                seat.paused = stops
                seat.hint(RESCAN | SUSPECT)
                self._bells[index].ring()
