"""The engine of a worker process of many slots: as `engine`, but it also takes rows from steps that run on.

A step beyond its time limit, and one whose cancel terminates, is given up (many_slots.py) and its row taken from it:
back to the queue with a crash counted, or cancelled. Rows with a crash behind them are not run here, among others, but
alone in a process that is forked for them (quarantine.py).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence

import psycopg

from durable.app import Durable
from durable.instance import Claimed
from durable.runtime import reporting
from durable.runtime.assembly import Parts, Process, many_slots
from durable.runtime.engine import LOOK_FOR_LOCKED, Engine
from durable.runtime.lookout import Lookout
from durable.runtime.running import Running
from durable.runtime.shared import BUSY, IDLE, Bell, Seat, SharedSeats
from durable.runtime.watch import Watch, has_limits
from durable.storage import workers

log = logging.getLogger(__name__)


class ManyEngine(Engine):
    """Claims and commits for many slots.

    kind    THREADS or ASYNCIO
    group   the number under which it is said how many slots it may use
    retire  asks for the end of the process once its steps have ended
    stop    asks for its end now
    """

    def __init__(
        self,
        app: Durable,
        kind: str,
        group: int,
        queue: str,
        name: str,
        seats: SharedSeats,
        seat: Seat,
        bell: Bell,
        stop_asked: Callable[[], float | None],
        lookout: Lookout,
        retire: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self._kind = kind
        self._seats, self._group = seats, group
        self._asked = 0
        self._overdue: deque[Running] = deque()
        self._unwanted: list[Claimed] = []
        super().__init__(app, queue, name, seats, seat, bell, stop_asked, lookout)
        if has_limits(app):
            Watch(self._slots, self._is_overdue, retire, stop).start()

    def _assemble(self, process: Process) -> Parts:
        parts, self._slots = many_slots(process, self._kind, lambda: self._seats.wanted(self._group))
        return parts

    def _is_overdue(self, step: Running) -> None:
        self._overdue.append(step)
        self._bell.ring()

    def _turn(self) -> None:
        if not self._take_from_steps():
            return
        if self._seat.state == BUSY and self.buffer.free:
            # A slot came free; without an outcome, if its step was given up. What came meanwhile was told to others.
            self._more = True
        super()._turn()

    def _in_drain(self) -> None:
        self._take_from_steps()

    def _take_from_steps(self) -> bool:
        """Take the rows of steps that were given up; False: the database failed, try again."""
        try:
            self._terminate()
            self._give_up()
        except psycopg.Error as error:
            self._after_error(error)
            return False
        return True

    def _give_up(self) -> None:
        """Count a crash for each step that ran beyond its time limit."""
        while self._overdue:
            steps = list(self._overdue)
            for step in steps:
                self._held.pop(step.claimed.id, None)
            taken = self._count_crashes(steps)
            for step in steps:
                self._overdue.popleft()
                log.warning(
                    "a step is given up: it ran longer than its time_limit of %g s",
                    step.limit,
                    extra=reporting.fields(step.claimed),
                )
            reporting.reclaimed(taken.taken)
            self._send(self._app.wakeups.handed_back(taken.by_queue))
            if len(taken.crashed) > len(taken.lost):
                self._hear_of_suspect()

    def _count_crashes(self, steps: Sequence[Running]) -> workers.Reclaimed:
        where = f"worker process {os.getpid()} of {self._name} on {os.uname().nodename}"
        given_up = [
            (
                step.claimed.id,
                step.claimed.token,
                f"its step ran longer than its time_limit of {step.limit:g} s in {where}",
            )
            for step in steps
        ]
        taken, whole = self._link.run_around_locks(
            lambda wait: workers.give_up(self._worker, given_up, self._app.conf.max_crashes, wait=wait)
        )
        if not whole:
            self._reconcile.again(LOOK_FOR_LOCKED)
        return taken

    def _terminate(self) -> None:
        """Give back what runs and is to be terminated, and so ends cancelled; and what was taken and will not begin."""
        roster = self._seat.roster
        assert roster is not None, "made with the seats"
        if roster.times_asked != self._asked:
            self._asked = roster.times_asked
            for step in self._slots.steps():
                if roster.is_asked(step.index, step.claimed.token) and self._slots.give_up(step):
                    log.warning("a step is given up: its instance is terminated", extra=reporting.fields(step.claimed))
                    self._unwanted.append(step.claimed)
        while self._slots.returned:
            self._unwanted.append(self._slots.returned.popleft())
        if self._unwanted:
            self._release(self._unwanted)
            self._unwanted = []

    def _hear_of_suspect(self) -> None:
        self._seat.met_suspect = True

    def _may_sleep(self) -> bool:
        return bool(self.buffer.free)

    def _claims_beside_work(self) -> bool:
        return bool(self.buffer.free)

    def _have_rows(self) -> None:
        self._seat.state = IDLE if self.buffer.free else BUSY
