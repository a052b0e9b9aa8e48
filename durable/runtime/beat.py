"""The beat: makes scheduled rows runnable and fires schedules to the moment, reaps dead workers, collects garbage.

Any number may run at once: what they touch is claimed with SKIP LOCKED, and garbage collection is a row in `duties`
that one of them gets per interval. Two connections: LISTEN, to hear of rows due earlier, and one for statements.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time

import psycopg

from durable import forks
from durable.app import Durable
from durable.celery_signals import beat_init
from durable.containment import contain_logging
from durable.runtime import identity, limits, reporting
from durable.runtime.gc import collect
from durable.runtime.link import LOCKED, Link, Stopped
from durable.runtime.listener import Listener, listening_dsn
from durable.runtime.periodic import Firing
from durable.runtime.reaper import reap
from durable.runtime.shared import Bell, poll_timeout
from durable.storage import lanes, maintenance, partitions, workers
from durable.storage.session import advise, describe
from durable.wakeups import INTERVAL, due_channel

log = logging.getLogger(__name__)

PROMOTE_BATCH = 1000
STOP_GRACE = 5.0
"""Seconds that a beat that is told to stop waits for the database at most."""
LOOK_AT_LEAST_EVERY = 5.0
LOOK_AGAIN = INTERVAL + 0.005
"""Seconds after a notification at which rows are looked for whose own notification was saved."""


class Beat:
    """One beat process."""

    def __init__(self, app: Durable, name: str) -> None:
        self._app = app
        self._name = name
        self._bell = Bell()
        self._stopping = False
        title = f"durable {app.name} beat {os.getpid()}"
        conf = app.conf
        self._link = Link(
            app.dsn,
            app.sql,
            title,
            pooler=conf.pooler,
            most_wait=conf.max_poll_interval,
            pause=self._pause,
            patience=conf.lease_patience,
        )
        self._listener = Listener(listening_dsn(app), due_channel(app.schema), f"{title} listen", conf.lease_patience)
        self._firing = Firing(app, self._link)
        self._limits = limits.Declared(self._link, app)
        self._worker = 0
        now = time.monotonic()
        self._heartbeat_at = self._reap_at = self._gc_at = self._promote_at = self._look_again_at = now

    def run(self) -> int:
        """Beat until SIGTERM or SIGINT; return the exit code."""
        forks.begin()
        self.heed_signals()
        contain_logging()
        log.info("beat %s starts", self._name)
        beat_init.send(self._name)
        try:
            while not self._stopping:
                try:
                    self._turn()
                except psycopg.Error as error:
                    self._after_error(error)
            self._link.run(workers.bury([self._worker]))
        except Stopped:
            log.warning("the beat stops while the database is away")
        except psycopg.Error as error:
            log.warning("the beat's lease runs out by itself: %s", describe(error))
        self._link.drop()
        self._listener.close()
        return 0

    def heed_signals(self) -> None:
        """Let SIGTERM and SIGINT end it in order; before anything tells the world that it lives."""
        for number in (signal.SIGTERM, signal.SIGINT):
            forks.handle(number, lambda *_: self.stop())
        signal.set_wakeup_fd(-1)

    def stop(self) -> None:
        """End after the present turn, and soon if the database does not answer; safe in a signal handler."""
        self._stopping = True
        self._link.end_by(time.monotonic() + STOP_GRACE)
        self._bell.ring()

    def _after_error(self, error: psycopg.Error) -> None:
        if not self._link.broken(error):
            log.warning("the beat's statement failed, trying on: %s", advise(error, self._app.schema))
            if self._pause(0.5):
                raise Stopped

    def _turn(self) -> None:
        conf, now = self._app.conf, time.monotonic()
        if now >= self._heartbeat_at:
            self._heartbeat()
            self._heartbeat_at = now + conf.heartbeat_interval
        if self._listener.tend():
            self._promote_at = now
        self._limits.store_again()
        ping = self._listener.ping()
        if ping is not None and not self._link.notify([ping]):
            self._listener.ping_failed()
        if now >= self._promote_at:
            self._promote()
        if now >= self._reap_at and conf.reaper:
            self._reap_at = now + conf.reaper_interval
            assert self._link.connected_since is not None, "a statement ran on it"
            reap(self._link, conf, self._app.wakeups, self._link.connected_since)
        if now >= self._gc_at and conf.gc:
            self._gc_at = now + conf.gc_interval
            if self._link.run(maintenance.take_duty("gc", conf.gc_interval * 0.9)):
                collect(self._link, conf)
        self._sleep(min(self._heartbeat_at, self._promote_at, self._reap_at, self._gc_at))

    def _heartbeat(self) -> None:
        ttl = self._app.conf.lease_ttl
        try:
            alive = self._worker and self._worker in self._link.run(workers.heartbeat([self._worker], ttl))
        except LOCKED:
            log.warning("the beat's lease (worker %d) could not be extended: another session holds it", self._worker)
            return
        if not alive:
            partitions.ensure(self._link.connection, self._app.sql)
            self._firing.declare()
            self._limits.store()
            self._worker = self._link.run(workers.register(identity.own("beat", self._name), ttl))

    def _promote(self) -> None:
        """Make due rows runnable and fire schedules, then sleep until the next is due, as the database's clock says."""
        for operation_of in (maintenance.promote, maintenance.time_out, lanes.open_due_lanes):
            while woken := self._link.run(operation_of(PROMOTE_BATCH)):
                if operation_of is maintenance.time_out:
                    reporting.timed_out(woken)
                self._link.notify(self._app.wakeups.promoted(woken))
        self._firing.declare_again()
        self._firing.fire()
        wait = self._link.run(maintenance.next_due(self._firing.left))
        wait = LOOK_AT_LEAST_EVERY if wait is None else min(max(wait, 0.001), LOOK_AT_LEAST_EVERY)
        now = time.monotonic()
        self._promote_at = min(now + wait, self._firing.again_at)
        if self._look_again_at > now:
            # A notification came after the one this look was for: those saved behind it are not in sight yet.
            self._promote_at = min(self._promote_at, self._look_again_at)

    def _sleep(self, until: float) -> None:
        if self._stopping:
            return
        poll = select.poll()
        poll.register(self._bell.reader, select.POLLIN)
        listening = self._listener.fileno()
        if listening is not None:
            poll.register(listening, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(poll_timeout(until))}
        if listening in ready and self._listener.messages():
            # Look now, and once more for rows whose own notification was saved.
            now = time.monotonic()
            wait = self._link.run(maintenance.next_due(self._firing.left))
            soon = now + (LOOK_AT_LEAST_EVERY if wait is None else max(wait, 0.0))
            self._look_again_at = now + LOOK_AGAIN
            self._promote_at = min(self._promote_at, soon, self._look_again_at)
        self._bell.silence()

    def _pause(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._bell.reader, select.POLLIN)
        while not self._stopping and time.monotonic() < until:
            poll.poll(poll_timeout(until))
            self._bell.silence()
        return self._stopping
