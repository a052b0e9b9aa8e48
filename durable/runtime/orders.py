"""What the database orders a command to do, as its agent finds and passes it on: paused queues, processes per queue,
an end of the command itself.

A paused queue: the claims themselves look at the database, so that nothing here decides what is run. The queue's
children are told so that they give back what they have only buffered, and sleep instead of asking in vain.

Processes, or slots of a queue's one process: an ordered number, else what --autoscale makes of the work that waits,
else what the command was started with. The supervisor, which can't ask, finds it in shared memory.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence

from durable.runtime import identity
from durable.runtime.autoscale import Autoscale
from durable.runtime.link import Link
from durable.runtime.shared import IDLE, RESCAN, SUSPECT, Bell, SharedSeats
from durable.storage import control

log = logging.getLogger(__name__)

SCALE_EVERY = 1.0
_SIGNALS = {"stop": signal.SIGTERM, "reload": signal.SIGHUP}


class Orders:
    """The orders for one command.

    queues     the queue of each seat
    autoscale  fewest and most processes per queue
    room       of each queue, the most processes or slots; else as many as it has seats
    """

    def __init__(
        self,
        link: Link,
        queues: Sequence[str],
        seats: SharedSeats,
        bells: Sequence[Bell],
        autoscale: tuple[int, int] | None = None,
        room: Sequence[int] | None = None,
    ) -> None:
        self._link = link
        self._queues = list(queues)
        self._names = list(dict.fromkeys(queues))
        self._room = list(room) if room is not None else [self._queues.count(name) for name in self._names]
        self._seats = seats
        self._bells = list(bells)
        self._scaled = {queue: Autoscale(*autoscale) for queue in self._names} if autoscale else {}
        self._scale_at = time.monotonic()
        self._set: set[str] = set()
        self.paused: set[str] = set()
        """The queues that were paused at the last look."""

    def look(self) -> None:
        """Read the orders and pass them on. Raises psycopg.Error."""
        command = identity.own("worker", "", command=os.getppid())
        found, asked = self._link.run(control.orders(self._names, command))
        if asked is not None:
            # First forgotten: after a reload it is the same process, which would reload again.
            self._link.run(control.forget_asked(command))
            log.warning("this worker is asked to %s", asked)
            self._seats.ask(_SIGNALS[asked])
            self._seats.bell.ring()
        self._pause({queue for queue, orders in found.items() if orders.paused})
        for number, queue in enumerate(self._names):
            ordered = found[queue].concurrency
            if ordered is not None:
                self._set.add(queue)
                self._want(number, ordered)
            elif queue in self._set or queue not in self._scaled:
                self._set.discard(queue)
                self._want(number, self._seats.started[number])

    def _pause(self, paused: set[str]) -> None:
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

    def _want(self, number: int, processes: int) -> None:
        queue = self._names[number]
        room = self._room[number]
        held = min(processes, room)
        if self._seats.wanted(number) == held:
            return
        if held < processes:
            log.warning(
                "queue %s is to have %d; this command has places for %d until it is reloaded",
                queue,
                processes,
                room,
            )
        log.info("queue %s: a concurrency of %d instead of %d", queue, held, self._seats.wanted(number))
        self._seats.want(number, held)
        self._seats.bell.ring()
        for index, name in enumerate(self._queues):
            if name == queue and self._seats.seat(index).roster is not None:
                self._bells[index].ring()  # it may have more slots

    def scale(self, now: float) -> None:
        """Once a second, if asked to: more or fewer processes. Raises psycopg.Error."""
        if not self._scaled or now < self._scale_at:
            return
        self._scale_at = now + SCALE_EVERY
        for number, queue in enumerate(self._names):
            if queue in self._set or queue in self.paused:
                continue
            seats = [self._seats.seat(index) for index, name in enumerate(self._queues) if name == queue]
            serving = [seat for seat in seats if seat.worker_id]
            free = sum(1 for seat in serving if seat.state == IDLE)
            # Nothing is asked while somebody is free.
            oldest = None if free else self._link.run(control.oldest_waiting(queue))
            wanted = self._seats.wanted(number)
            self._want(number, self._scaled[queue].next(now, wanted, len(serving), free, oldest))
