"""The slot: the main thread of a prefork worker process, where user code runs.

It takes claimed rows from the buffer, runs them one after another and hands the outcomes over. While steps are short
it goes on with the next instance as the engine commits; otherwise it waits for the commit first, so that a finished
result never sits behind a long or deadly neighbour.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from durable.instance import Claimed
from durable.runtime.buffer import Buffer, Outbox
from durable.runtime.executor import Executor
from durable.runtime.shared import Seat

SHORT_STEP = 0.02
"""Mean seconds of a step below which the slot runs ahead of the commit."""
LEASE_LOOK = 0.05


class Slot:
    """Runs steps. `owns(claimed)` tells whether the row is still this process's."""

    def __init__(
        self,
        executor: Executor,
        buffer: Buffer,
        outbox: Outbox,
        seat: Seat,
        owns: Callable[[Claimed], bool],
    ) -> None:
        self._executor = executor
        self._buffer = buffer
        self._outbox = outbox
        self._seat = seat
        self._owns = owns
        self.mean_step: float | None = None
        """Moving mean of the seconds a step takes; None before the first."""
        self.running = False
        self.ended = False

    def run(self) -> None:
        """Run steps until the buffer is closed."""
        take, execute, seat, outbox = self._buffer.take, self._executor.execute, self._seat, self._outbox
        clock = time.monotonic
        while (claimed := take()) is not None:
            started = clock()
            if (started >= seat.deadline and not self._lease_returns(claimed)) or not self._owns(claimed):
                continue
            seat.enter(claimed.id, claimed.token, started)
            self.running = True
            commit = execute(claimed)
            outbox.hand_over(commit)
            self.running = False
            seat.leave()
            took = clock() - started
            mean = self.mean_step
            mean = took if mean is None else mean + (took - mean) * 0.2
            self.mean_step = mean
            if mean >= SHORT_STEP or claimed.crashes:
                outbox.wait_until_durable()
        self.ended = True

    def _lease_returns(self, claimed: Claimed) -> bool:
        """Past the deadline nothing is started: wait for the agent's next heartbeat, or for the row to be taken."""
        while time.monotonic() >= self._seat.deadline:
            if not self._owns(claimed):
                return False
            time.sleep(LEASE_LOOK)
        return True
