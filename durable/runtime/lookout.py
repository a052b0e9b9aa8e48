"""The lookout: one process of a queue that claims again soon, while rows arrive that no notification announces.

A NOTIFY takes a lock of the whole server at commit, so producers that insert quickly send one for many rows
(wakeups.py). A row without one would wait for the end of a step, or for the agent's next look. So a process whose
claim finds such a row goes on claiming, a little oftener than rows come; the other processes sleep. When no row comes
for four times the mean gap, it sleeps too. Pauses follow the rows that this command finds, so that the commands of a
queue together claim a little more than once a row, however many there are.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from durable.runtime.shared import IDLE, LOOK, Bell, Seat, Traffic

SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.004
"""Seconds between two claims of a lookout."""
PAUSE_PER_GAP = 0.75
"""Part of the mean gap between rows that a lookout pauses: the claim itself takes most of the rest."""
PATIENCE = 0.02
"""Seconds beyond four gaps without a row after which a lookout sleeps."""
FIRST_GAP, LONGEST_GAP = 0.002, 0.05
"""Seconds between two rows: assumed of a new burst; and at most, since a notification comes that often anyway."""
WEIGHT = 0.2
"""Of the newest gap in the moving mean."""
ABSENT_AFTER = 0.005
"""Seconds beyond its pause after which a lookout that has not claimed counts as gone."""
ROUNDING = 0.0005
"""Seconds by which poll() sleeps too long on average: it counts whole milliseconds, and rounds up."""


class Colleague(NamedTuple):
    """Another process of the same queue."""

    seat: Seat
    bell: Bell


class Lookout:
    """One process's part in looking for the rows of its queue.

    Args:
        traffic: What the command knows of the queue's arrivals, in shared memory.
        colleagues: The seats of the other processes that serve the queue.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self, traffic: Traffic, colleagues: Sequence[Colleague] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._traffic = traffic
        self._colleagues = list(colleagues)
        self._clock = clock
        self._next = 0
        self._pid = os.getpid()
        self.at = math.inf
        """clock() at which this process is to claim as the lookout; inf while it is not."""

    @property
    def pause(self) -> float:
        """The seconds between two claims."""
        return max(SHORTEST_PAUSE, min(PAUSE_PER_GAP * self._traffic.gap, LONGEST_PAUSE))

    def expects_rows(self) -> bool:
        """Whether unannounced rows have come so lately that more may be expected."""
        traffic = self._traffic
        return self._clock() - traffic.found_at < 4 * traffic.gap + PATIENCE

    def is_covered(self) -> bool:
        """Whether another process is the lookout, and has claimed lately."""
        traffic = self._traffic
        return (
            traffic.lookout not in (0, self._pid)
            and self.expects_rows()
            and self._clock() - traffic.looked_at < self.pause + ABSENT_AFTER
        )

    def found(self, count: int) -> None:
        """Note that a claim found `count` rows which no notification had announced."""
        now, traffic = self._clock(), self._traffic
        gap = FIRST_GAP
        if self.expects_rows():
            gap = traffic.gap + (min((now - traffic.found_at) / count, LONGEST_GAP) - traffic.gap) * WEIGHT
        traffic.found(now, gap)

    def watch(self, claimed_at: float) -> None:
        """After a claim that took all there was: be the lookout if one is wanted.

        Args:
            claimed_at: clock() when that claim began.
        """
        if not self.expects_rows() or self.is_covered():
            self.at = math.inf
            return
        self._traffic.look(self._pid, claimed_at)
        self.at = claimed_at + self.pause - ROUNDING

    def hand_over(self) -> bool:
        """Make a sleeping colleague the lookout.

        Returns:
            Whether this process need not look any more: a colleague does, or nobody has to.
        """
        if not self.expects_rows() or self.is_covered():
            self.at = math.inf
            return True
        for turn in range(len(self._colleagues)):
            seat, bell = self._colleagues[(self._next + turn) % len(self._colleagues)]
            if seat.state == IDLE and seat.pid and not seat.paused and not seat.leaves:
                self._next += turn + 1
                self._traffic.look(seat.pid, self._clock())
                seat.hint(LOOK)
                bell.ring()
                self.at = math.inf
                return True
        return False

    def take_over(self) -> None:
        """Be the lookout, as a colleague has asked."""
        self.at = self._traffic.looked_at + self.pause - ROUNDING

    def is_due(self) -> bool:
        """Whether this process is to claim now as the lookout; true once for each time."""
        if self._clock() < self.at:
            return False
        self.at = math.inf
        return True
