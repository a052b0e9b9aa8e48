"""A worker process: the engine in a thread, the slot or the loop of many in the main thread, the signals that end both.

Forked from the supervisor, which has imported the app and holds no socket and no thread; whatever connects, connects
here. SIGTERM drains, SIGQUIT stops now; both give back every claim.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from durable import django_support, forks, task_hooks, telemetry
from durable.app import Durable
from durable.celery_signals import worker_process_init, worker_process_shutdown
from durable.runtime import soft_limit
from durable.runtime.engine import Engine
from durable.runtime.lookout import Colleague, Lookout
from durable.runtime.many_engine import ManyEngine
from durable.runtime.places import Place
from durable.runtime.shared import Bell, Seat, SharedSeats
from durable.runtime.slots import SUSPECTS
from durable.runtime.suspect_engine import SuspectEngine

log = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.0005
"""Seconds user code may hold the GIL while the engine waits for it; Python's default of 5 ms would cost a claim's
worth of steps each time an answer arrives."""
LOOK_AT_MEMORY = 0.1
"""Seconds between two looks at the size of the process."""
RETIRE = signal.SIGUSR1
"""Tells a process too many to end once its step has."""
QUIT_PATIENCE = 1.5
"""Seconds that a stop-now spends on giving claims back."""


class Stop:
    """When this process must be gone; set by signals, read by the engine."""

    def __init__(self, drain_timeout: float, bell: Bell) -> None:
        self._drain_timeout = drain_timeout
        self._bell = bell
        self.at: float | None = None

    def listen(self) -> None:
        """Install the handlers: SIGTERM drains, RETIRE without hurry, SIGQUIT stops now, SIGINT is the supervisor's."""
        forks.handle(signal.SIGTERM, lambda *_: self._stop(self._drain_timeout))
        forks.handle(signal.SIGQUIT, lambda *_: self._stop(0.0))
        forks.handle(RETIRE, lambda *_: self._stop(math.inf))
        forks.ignore(signal.SIGINT)
        forks.ignore(signal.SIGHUP)

    def retire(self) -> None:
        """Drain, as if asked to from outside."""
        self._stop(self._drain_timeout)

    def leave(self) -> None:
        """Drain without hurry: neighbours of what makes the process end are given their time."""
        if self.at is None:
            self._stop(math.inf)

    def now(self) -> None:
        """Give everything back, at once."""
        self._stop(0.0)

    def _stop(self, within: float) -> None:
        at = time.monotonic() + within
        self.at = at if self.at is None else min(self.at, at)
        self._bell.ring()


class Wear:
    """Whether a worker process has done its share: so many steps, or grown beyond so many bytes."""

    def __init__(self, most_steps: int | None, most_bytes: int | None, retire: Callable[[], None]) -> None:
        self._most_steps = most_steps
        self._most_bytes = most_bytes
        self._retire = retire
        self._steps = 0
        self._look_at = 0.0

    def after_step(self) -> bool:
        """Count a step; once the process has done its share, ask for its end and return True."""
        self._steps += 1
        if not (self._most_steps and self._steps >= self._most_steps) and not self._too_large():
            return False
        self._retire()
        return True

    def _too_large(self) -> bool:
        now = time.monotonic()
        if self._most_bytes is None or now < self._look_at:
            return False
        self._look_at = now + LOOK_AT_MEMORY
        return resident_bytes() > self._most_bytes


def resident_bytes() -> int:
    """Return this process's resident memory; where /proc does not tell, its peak."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_child(
    app: Durable,
    place: Place,
    name: str,
    seats: SharedSeats,
    seat: Seat,
    drain_timeout: float,
    colleagues: Sequence[Colleague],
) -> int:
    """Be a worker process in a place until told to stop; return the exit code.

    colleagues  the seats of the other processes of the queue
    """
    kind, queue, bell = place.kind, place.queue, place.bell
    sys.setswitchinterval(SWITCH_INTERVAL)
    forks.shared(seats)
    forks.shared(seat)
    stop = Stop(drain_timeout, bell)
    lookout = Lookout(seats.traffic(place.group), colleagues)

    def leave() -> None:
        if not seat.leaves:
            seat.leaves = True
            seats.bell.ring()
        stop.leave()

    if place.has_many:
        engine: Engine = ManyEngine(
            app, kind, place.group, queue, name, seats, seat, bell, lambda: stop.at, lookout, leave, stop.now
        )
        retire = leave
    else:
        engine_of = SuspectEngine if kind == SUSPECTS else Engine
        engine, retire = engine_of(app, queue, name, seats, seat, bell, lambda: stop.at, lookout), stop.retire
    finished = threading.Event()
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            engine.run()
        except BaseException as error:
            log.critical("%s: the engine failed", name, exc_info=error)
            failed.append(error)
        finally:
            finished.set()
            if failed or not engine.slot.ended:
                # The slot is inside user code, which can't be interrupted from here: its row was given back.
                try:
                    telemetry.leave()
                    logging.shutdown()
                finally:  # handlers of logging are user code
                    os._exit(70 if failed else 0)

    stop.listen()
    if not place.has_many:
        soft_limit.install()
    if app.conf.max_tasks_per_child or app.conf.max_memory_per_child:
        engine.slot.worn = Wear(app.conf.max_tasks_per_child, app.conf.max_memory_per_child, retire).after_step
    _support_django(app)
    worker_process_init.send(name)
    if not _started(app):
        return 70
    soft_limit.guard_handlers()
    thread = threading.Thread(target=serve, name="durable-engine", daemon=True)
    thread.start()
    engine.slot.run()
    bell.ring()
    finished.wait()
    _stopped(app)
    worker_process_shutdown.send(name, pid=os.getpid(), exitcode=0)
    return 0


def _support_django(app: Durable) -> None:
    """Have steps and hooks close Django's broken connections, if Django is in use."""
    steps = django_support.of_process()
    if steps is not None:
        app.step_managers.insert(0, steps)  # the outermost: a transaction of another manager is inside
        task_hooks.resets.append(steps.close_old)


def _started(app: Durable) -> bool:
    """Call the functions marked `on_process_start`; False when one raised."""
    for function in app.process_starts:
        try:
            forks.contained(function)
        except BaseException as error:
            log.critical("this worker process ends: %r, marked on_process_start, raised", function, exc_info=error)
            return False
    return True


def _stopped(app: Durable) -> None:
    """Call the functions marked `on_process_stop`."""
    for function in app.process_stops:
        try:
            forks.contained(function)
        except BaseException:
            log.exception("%r, marked on_process_stop, raised", function)
