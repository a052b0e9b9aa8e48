"""A worker process: the engine in a thread, the slot in the main thread, and the signals that end both.

Forked from the supervisor, which has imported the app and holds no socket and no thread; whatever connects, connects
here. SIGTERM drains, SIGQUIT stops now; both give back every claim.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

from durable.app import Durable
from durable.celery_signals import worker_process_init, worker_process_shutdown
from durable.runtime.engine import Engine
from durable.runtime.shared import Bell, Seat, SharedSeats

log = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.0005
"""Seconds user code may hold the GIL while the engine waits for it; Python's default of 5 ms would cost a claim's
worth of steps each time an answer arrives."""
QUIT_PATIENCE = 1.5
"""Seconds that a stop-now spends on giving claims back."""


class Stop:
    """When this process must be gone; set by signals, read by the engine."""

    def __init__(self, drain_timeout: float, bell: Bell) -> None:
        self._drain_timeout = drain_timeout
        self._bell = bell
        self.at: float | None = None

    def listen(self) -> None:
        """Install the handlers: SIGTERM drains, SIGQUIT stops now, SIGINT is the supervisor's."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop(self._drain_timeout))
        signal.signal(signal.SIGQUIT, lambda *_: self._stop(0.0))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _stop(self, within: float) -> None:
        at = time.monotonic() + within
        self.at = at if self.at is None else min(self.at, at)
        self._bell.ring()


def run_child(
    app: Durable, queue: str, name: str, seats: SharedSeats, seat: Seat, bell: Bell, drain_timeout: float
) -> int:
    """Be a worker process until told to stop; return the exit code."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    stop = Stop(drain_timeout, bell)
    engine = Engine(app, queue, name, seats, seat, bell, lambda: stop.at)
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
                logging.shutdown()
                os._exit(70 if failed else 0)

    stop.listen()
    worker_process_init.send(name)
    thread = threading.Thread(target=serve, name="durable-engine", daemon=True)
    thread.start()
    engine.slot.run()
    bell.ring()
    finished.wait()
    worker_process_shutdown.send(name, pid=os.getpid(), exitcode=0)
    return 0
