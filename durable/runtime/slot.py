"""The slot: the main thread of a prefork worker process, where user code runs.

It takes claimed rows from the buffer, runs them one after another and hands the outcomes over. While steps are short
it goes on with the next instance as the engine commits; otherwise it waits for the commit first, so that a finished
result never sits behind a long or deadly neighbour.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from durable import forks
from durable.instance import Claimed
from durable.runtime import reporting, soft_limit
from durable.runtime.backoff import Backoff
from durable.runtime.buffer import Buffer, Outbox
from durable.runtime.executor import Executor
from durable.runtime.shared import Seat
from durable.runtime.step_transaction import StepAgain
from durable.storage.claims import Commit

log = logging.getLogger(__name__)

SHORT_STEP = 0.02
"""Mean seconds of a step below which the slot runs ahead of the commit."""
LEASE_LOOK = 0.05


class Slot:
    """Runs steps.

    owns      whether a claimed row is still this process's
    stopping  whether the process was asked to stop
    """

    def __init__(
        self,
        executor: Executor,
        buffer: Buffer,
        outbox: Outbox,
        seat: Seat,
        owns: Callable[[Claimed], bool],
        stopping: Callable[[], bool],
    ) -> None:
        self._executor = executor
        self._buffer = buffer
        self._outbox = outbox
        self._seat = seat
        self._owns = owns
        self._stopping = stopping
        self.mean_step: float | None = None
        """Moving mean of the seconds a step takes; None before the first."""
        self.running = False
        self.ended = False
        self.runs_suspects = True
        """Whether rows with a crash behind them are run here."""
        self.worn: Callable[[], bool] | None = None
        """Asked after each step: whether the process is to be replaced. It has asked for that then."""

    def run(self) -> None:
        """Run steps until the buffer is closed."""
        self._executor.take_variables()
        buffer, step, seat, outbox = self._buffer, self.step, self._seat, self._outbox
        take = buffer.take
        clock, enter = time.monotonic, self._enter
        while (claimed := take()) is not None:
            started = clock()
            if (started >= seat.deadline and not self._lease_returns(claimed)) or not self._owns(claimed):
                continue
            enter(claimed, started)
            self.running = True
            commit = step(claimed)
            if forks.strayed:
                forks.end()  # the rest of this loop is the parent's
            if not buffer:
                soft_limit.take_back()  # an alarm must not ring while this thread waits
            self.running = False
            if commit is not None:
                outbox.hand_over(commit)
            seat.leave()
            took = clock() - started
            mean = self.mean_step
            mean = took if mean is None else mean + (took - mean) * 0.2
            self.mean_step = mean
            if mean >= SHORT_STEP or claimed.crashes:
                outbox.wait_until_durable()
            if self.worn is not None and self.worn():
                break
        self.ended = True
        self.close()

    @property
    def count(self) -> int:
        """How many slots there are."""
        return 1

    @property
    def began(self) -> float:
        """time.monotonic() when the step began that runs."""
        return self._seat.entered_at

    def close(self) -> None:
        """End what steps have left running in the process."""
        self._executor.close()

    def expect(self, seconds: float) -> None:
        """Engine: a step that still runs has taken that long."""
        self.mean_step = max(self.mean_step or 0.0, seconds)

    def _enter(self, claimed: Claimed, now: float) -> None:
        limits = self._executor.time_limits
        limit = limits.get((claimed.machine, claimed.machine_version)) if limits else None
        self._seat.enter(claimed.id, claimed.token, now, 0.0 if limit is None else now + limit)

    def step(self, claimed: Claimed) -> Commit | None:
        """Run a step until it has happened; None when that is no longer for us to do."""
        try:
            return self._executor.execute(claimed)
        except StepAgain as reason:
            return self._again(claimed, reason)

    def _again(self, claimed: Claimed, reason: StepAgain) -> Commit | None:
        backoff = Backoff(first=0.02, most=1.0)
        while not self._stopping() and self._owns(claimed):
            self._seat.enter(claimed.id, claimed.token, time.monotonic())  # the wait is not the step's
            log.info("the step runs again: %s", reason, extra=reporting.fields(claimed))
            time.sleep(backoff.next())
            if time.monotonic() >= self._seat.deadline and not self._lease_returns(claimed):
                return None
            self._enter(claimed, time.monotonic())
            try:
                return self._executor.execute(claimed)
            except StepAgain as another:
                reason = another
        return None

    def _lease_returns(self, claimed: Claimed) -> bool:
        """Past the deadline nothing is started: wait for the agent's next heartbeat, or for the row to be taken."""
        while time.monotonic() >= self._seat.deadline:
            if not self._owns(claimed):
                return False
            time.sleep(LEASE_LOOK)
        return True
