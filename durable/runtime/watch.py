"""The time limits of steps in a process of many slots: a thread that looks at what runs, now and then.

A thread of its own, since the engine may be waiting for the database and the loop for a step that blocks it. A loop
that does not move after one of its steps was given up is stuck in that step, with all its neighbours: the process ends
then, and gives their rows back at no cost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from durable.app import Durable
from durable.runtime.many_slots import ManySlots
from durable.runtime.running import Running

log = logging.getLogger(__name__)

TICK = 0.05
LOOP_PATIENCE = 5.0
"""Seconds after which a loop that has not moved since one of its steps was given up is stuck."""


def has_limits(app: Durable) -> bool:
    """Whether any step of an app has a time limit."""
    return bool(app.conf.time_limit or app.conf.soft_time_limit) or any(
        definition.options.time_limit or definition.options.soft_time_limit for definition in app.definitions.values()
    )


class Watch:
    """Looks.

    overdue  called with each step that was given up for its time limit
    retire   called when every slot is taken by such steps
    stop     called when the loop is stuck
    """

    def __init__(
        self,
        slots: ManySlots,
        overdue: Callable[[Running], None],
        retire: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._overdue = overdue
        self._retire = retire
        self._stop = stop
        self._stirred = threading.Event()
        self._loop_moved = threading.Event()
        self._stuck_at: float | None = None
        slots.on_step = self._stirred.set

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._run, name="durable-limits", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._stirred.clear()
            if not self._slots.running and self._stuck_at is None:
                self._stirred.wait()
            self._look(time.monotonic())
            time.sleep(TICK)

    def _look(self, now: float) -> None:
        for step in self._slots.steps():
            if step.limit_at is not None and now >= step.limit_at:
                if self._slots.give_up(step):
                    self._overdue(step)
                    self._ask_loop(now)
            elif step.look is not None:
                step.look(now)
        if self._stuck_at is not None:
            if self._loop_moved.is_set():
                self._stuck_at = None
            elif now >= self._stuck_at:
                self._stuck_at = None
                log.error("a step blocks the event loop beyond its time_limit: this worker process is replaced")
                self._stop()
        if self._slots.given_up >= self._slots.count:
            self._retire()

    def _ask_loop(self, now: float) -> None:
        if self._stuck_at is None:
            self._loop_moved.clear()
            self._stuck_at = now + LOOP_PATIENCE
            self._slots.tell_loop(self._loop_moved.set)
