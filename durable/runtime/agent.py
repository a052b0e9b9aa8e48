"""The agent: the helper process of a worker command. Notifier, heartbeats, hand-back; two connections.

It exists so that user code, which may hold the GIL for as long as it likes, can neither lose a lease nor miss a
wake-up, and so that the supervisor needs no socket.

* Heartbeats extend the leases of all worker processes in one statement. A lease that turns out dead is written into
  that child's seat; one that lives gets a deadline, measured from before the statement was sent.
* Notifications of a queue ring as many idle children as there are rows. The agent looks again a moment later for
  rows whose notification was saved, and once per `poll_interval` for everything.
* A claim that is to be terminated has its process killed (termination.py); a notification says when to look, and the
  poll finds those that were missed, or are entered later.
* The supervisor reports each dead child with what it was running: its rows go back at once.
* Orders (a queue paused, a command to end; orders.py) are looked for now and then, and when a notification says so.
* It promotes what is due and reaps, so that a missing beat costs about a second; GC only when no beat did it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from durable import forks
from durable.app import Durable
from durable.runtime import identity, limits, reporting
from durable.runtime.gc import collect
from durable.runtime.link import LOCKED, Link, Stopped
from durable.runtime.listener import Listener, listening_dsn
from durable.runtime.orders import Orders
from durable.runtime.periodic import StandIn
from durable.runtime.quarantine import Quarantine
from durable.runtime.reaper import reap, take_back
from durable.runtime.ringing import Ringer
from durable.runtime.shared import RESCAN, SUSPECT, Bell, SharedSeats, poll_timeout
from durable.runtime.termination import terminate
from durable.storage import claims, lanes, maintenance, partitions, workers
from durable.storage.session import advise
from durable.wakeups import ANY_QUEUE, INSPECT, INTERVAL, ORDERS, TERMINATE, parse, queue_channel

log = logging.getLogger(__name__)

LOOK_AGAIN = INTERVAL + 0.005
"""Seconds after a notification at which rows are looked for whose own notification was saved."""
PROMOTE_BATCH = 1000


@dataclass(slots=True)
class Death:
    """A child that ended: its lease, what it was running, whether that counts as a crash, how it ended."""

    worker: int
    entered: list[tuple[int, int]]
    cause: str


class Agent:
    """The agent of one command.

    queues  the queue of each seat
    room    of each queue, the most processes or slots; else as many as it has seats
    inbox   pipe on which the supervisor reports deaths, one JSON line each; its end means the supervisor is gone
    """

    def __init__(
        self,
        app: Durable,
        name: str,
        queues: Sequence[str],
        seats: SharedSeats,
        bells: Sequence[Bell],
        inbox: int,
        autoscale: tuple[int, int] | None = None,
        quarantine: Quarantine | None = None,
        room: Sequence[int] | None = None,
    ) -> None:
        self._app = app
        self._name = name
        self._queues = list(queues)
        self._seats = seats
        self._bells = list(bells)
        self._inbox = inbox
        self._partial = b""
        self._stopping = False
        conf = app.conf
        title = f"durable {app.name} agent {os.getpid()}"
        self._link = Link(
            app.dsn,
            app.sql,
            title,
            pooler=conf.pooler,
            most_wait=conf.max_poll_interval,
            pause=self._pause,
            patience=conf.lease_patience,
        )
        self._listener = Listener(listening_dsn(app), queue_channel(app.schema), f"{title} listen", conf.lease_patience)
        self._stand_in = StandIn(app, self._link)
        self._limits = limits.Declared(self._link, app)
        self._known = [f"{task}:{version}" for task, version in app.definitions]
        self._orders = Orders(self._link, self._queues, seats, bells, autoscale, room)
        self._quarantine = quarantine or Quarantine(seats, bells, {})
        ringer = Ringer(self._queues, seats, bells, self._quarantine)
        self._idle, self._ring = ringer.idle, ringer.ring
        self._hint_busy, self._hint_suspect = ringer.hint_busy, ringer.hint_suspect
        self._deaths: list[Death] = []
        self._priorities: dict[str, set[int]] = {queue: set() for queue in self._queues}
        now = time.monotonic()
        self._heartbeat_at = now
        self._probe_at = now
        self._look_again_at = now
        self._reap_at = now + conf.reconcile_interval
        self._terminate_at = now
        self._orders_at = self._orders_look_at = now
        self._gc_look_at = now + conf.gc_interval + conf.beat_grace

    def run(self) -> int:
        """Serve until the supervisor says stop; return the exit code."""
        forks.ignore(signal.SIGTERM)
        forks.ignore(signal.SIGINT)
        try:
            self._start()
            while not self._stopping or self._deaths:
                self._guarded_turn()
        except Stopped:
            log.warning("the agent stops while the database is away")
        self._link.drop()
        self._listener.close()
        return 0

    def _start(self) -> None:
        while True:
            try:
                self._connected()
                partitions.ensure(self._link.connection, self._app.sql)
                self._stand_in.declare()
                self._limits.store()
                self._release_predecessors()
                return
            except psycopg.Error as error:
                self._after_error(error)

    def _guarded_turn(self) -> None:
        try:
            self._turn()
        except psycopg.Error as error:
            self._after_error(error)

    def _after_error(self, error: psycopg.Error) -> None:
        if self._link.broken(error):
            self._seats.database_up = False
            self._connected()
            for bell in self._bells:
                bell.ring()
        else:
            log.warning("the agent's statement failed, trying on: %s", advise(error, self._app.schema))
            if self._pause(0.2):
                raise Stopped

    def _connected(self) -> None:
        """Connect, however long that takes; then heartbeats come first, before anybody reaps our children."""
        _ = self._link.connection
        self._seats.database_up = True
        self._heartbeat_at = time.monotonic()

    def _turn(self) -> None:
        conf, now = self._app.conf, time.monotonic()
        if now >= self._heartbeat_at:
            self._heartbeat()
            self._heartbeat_at = now + conf.heartbeat_interval
        if now >= self._orders_look_at:
            self._orders_at, self._orders_look_at = now, now + conf.reconcile_interval
        if self._deaths:
            self._hand_back()
        if self._listener.tend():
            # What came before is known to nobody here; the probe alone would see no row of an unknown task.
            self._probe_at = self._orders_at = now
            for queue in dict.fromkeys(self._queues):
                self._ring(queue, 1, RESCAN)
        ping = self._listener.ping()
        if ping is not None and not self._link.notify([ping]):
            self._listener.ping_failed()
        if now >= self._orders_at:
            self._orders_at = math.inf
            self._orders.look()
        self._orders.scale(now)
        self._quarantine.turn(self._queues, now)
        if now >= self._reap_at and conf.reaper:
            self._reap()
        if now >= self._probe_at:
            self._probe()
        if now >= self._terminate_at:
            terminate(self._seats, self._bells, self._link)
            self._terminate_at = now + conf.poll_interval
        if now >= self._gc_look_at:
            self._collect_if_nobody_does()
        self._stand_in.turn()
        self._limits.store_again()
        self._wait()

    def _wait(self) -> None:
        due = min(self._heartbeat_at, self._probe_at, self._terminate_at, self._orders_at)
        if self._deaths:
            due = min(due, time.monotonic() + 0.05)
        self._listen_until(due)

    def _listen_until(self, due: float) -> None:
        poll = select.poll()
        poll.register(self._inbox, select.POLLIN | select.POLLHUP)
        listening = self._listener.fileno()
        if listening is not None:
            poll.register(listening, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(poll_timeout(due))}
        if self._inbox in ready:
            self._read_inbox()
        if listening in ready:
            for payload in self._listener.messages():
                self._notified(payload)

    # What the supervisor says

    def _read_inbox(self) -> None:
        data = os.read(self._inbox, 65536)
        if not data:
            self._stopping = True
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if message.get("stop"):
                self._stopping = True
            else:
                entered = [(row[0], row[1]) for row in message["entered"]]
                self._deaths.append(Death(message["worker"], entered, message["cause"]))

    def _hand_back(self) -> None:
        """Take back the rows of dead children; a row that commits right now is met again, if it is still there."""
        total = workers.Reclaimed()
        left: list[Death] = []
        for death in self._deaths:
            try:
                self._link.run(workers.bury([death.worker]))
                taken = take_back(self._link, death.worker, death.entered, self._app.conf.max_crashes, death.cause)
                total.add(taken)
                if taken.crashed:
                    self._link.run(workers.note_crash(death.worker, death.cause))
            except LOCKED:
                left.append(death)  # its lease, or what its rows need, is held by another session
                continue
            if self._link.run(claims.held(death.worker)):
                left.append(death)
        self._deaths = left
        if total.ids:
            log.warning(
                "%d rows of dead worker processes are handed back, %d of them crashed, %d failed for it",
                len(total.ids),
                len(total.crashed),
                len(total.lost),
            )
        reporting.reclaimed(total.taken)
        self._wake_for(total.by_queue)

    def _wake_for(self, by_queue: dict[str, int]) -> None:
        for queue, count in by_queue.items():
            self._ring(queue, count, RESCAN | SUSPECT)
        self._link.notify(self._app.wakeups.handed_back(by_queue))

    def _release_predecessors(self) -> None:
        """Claims of commands of this host and boot that are gone: killed, and perhaps started again.

        A command that lives reports its own dead children, and knows what they were running.
        """
        host = identity.own("worker", self._name)
        gone = [
            Death(worker, [], f"command {pid} ({name}) is gone")
            for worker, pid, started, name in self._link.run(workers.predecessors(host.host, host.boot_id))
            if not identity.exists(pid, started)
        ]
        for death in gone:
            try:
                self._link.run(workers.bury([death.worker]))
                # What it had entered is not known any more: all its rows count a crash, as when the reaper finds them.
                taken = take_back(self._link, death.worker, None, self._app.conf.max_crashes, death.cause)
            except LOCKED:
                continue  # another session holds its lease: the next reaper's turn finds it again
            if taken.ids:
                log.warning("%s; %d rows are handed back", death.cause, len(taken.ids))
            reporting.reclaimed(taken.taken)
            self._wake_for(taken.by_queue)

    # Waking children

    def _notified(self, payload: str) -> None:
        if payload == TERMINATE:
            self._terminate_at = time.monotonic()
            return
        if payload == INSPECT:
            self._heartbeat_at = time.monotonic()
            return
        if payload == ORDERS:
            self._orders_at = time.monotonic()
            return
        parsed = parse(payload)
        if parsed is None:
            log.debug("a notification that is not ours: %r", payload[:80])
            return
        queue, count, priority = parsed
        queues = set(self._queues) if queue == ANY_QUEUE else {queue} & set(self._queues)
        for name in queues:
            flags = 0
            if priority is None:
                flags = RESCAN | SUSPECT
            elif priority not in self._priorities[name]:
                self._priorities[name].add(priority)
                flags = RESCAN
            if flags:
                self._hint_busy(name)
            self._ring(name, count, flags)
        if queues:
            self._look_again_at = time.monotonic() + LOOK_AGAIN
            self._probe_at = min(self._probe_at, self._look_again_at)

    # On the clock

    def _heartbeat(self) -> None:
        ttl = self._app.conf.lease_ttl
        seated = {
            seat.worker_id: index for index in range(self._seats.count) if (seat := self._seats.seat(index)).worker_id
        }
        if not seated:
            return
        sent = time.monotonic()
        entered = {worker: self._seats.seat(index).running(sent) for worker, index in seated.items()}
        alive, locked = self._extend(list(seated), ttl, entered)
        for worker, index in seated.items():
            seat = self._seats.seat(index)
            if seat.worker_id != worker:
                continue  # another child sits there by now
            if worker in alive:
                seat.deadline = sent + ttl
            elif worker not in locked:
                seat.lost = worker
                self._bells[index].ring()

    def _extend(
        self, leases: list[int], ttl: float, entered: Mapping[int, Sequence[tuple[int, int, float]]]
    ) -> tuple[set[int], set[int]]:
        """Extend leases; return those that are alive, and those whose row another session holds."""
        try:
            return self._link.run(workers.heartbeat(leases, ttl, entered)), set()
        except LOCKED:
            alive: set[int] = set()
            locked: set[int] = set()
            for worker in leases:
                try:
                    alive |= self._link.run(workers.heartbeat([worker], ttl, entered))
                except LOCKED:
                    locked.add(worker)
            if locked:
                log.warning("the leases of workers %s could not be extended: other sessions hold them", sorted(locked))
            return alive, locked

    def _probe(self) -> None:
        idle = {queue: len(self._idle(queue)) for queue in dict.fromkeys(self._queues)}
        probe = self._link.run(maintenance.probe(idle, self._known))
        now = time.monotonic()
        self._probe_at = now + self._app.conf.poll_interval
        if self._look_again_at > now:
            # A notification came after the one this look was for: those saved behind it are not in sight yet.
            self._probe_at = min(self._probe_at, self._look_again_at)
        for queue, waiting in probe.waiting.items():
            if waiting:
                self._ring(queue, waiting, RESCAN)
        for queue in probe.suspects:
            self._hint_suspect(queue)
        if probe.due or probe.opens:
            for operation_of in (maintenance.promote, maintenance.time_out, lanes.open_due_lanes):
                woken = self._link.run(operation_of(PROMOTE_BATCH))
                if operation_of is maintenance.time_out:
                    reporting.timed_out(woken)
                self._link.notify(self._app.wakeups.promoted(woken))
        if probe.expired and self._app.conf.reaper:
            self._reap()

    def _reap(self) -> None:
        """At once when the probe saw a lease run out; else now and then, for rows that were locked at the time."""
        self._reap_at = time.monotonic() + self._app.conf.reconcile_interval
        self._release_predecessors()
        connection_began = self._link.connected_since
        assert connection_began is not None, "a statement ran on it"
        reap(self._link, self._app.conf, self._app.wakeups, connection_began)

    def _collect_if_nobody_does(self) -> None:
        conf = self._app.conf
        self._gc_look_at = time.monotonic() + conf.beat_grace
        if conf.gc and self._link.run(maintenance.take_duty("gc", conf.gc_interval + conf.beat_grace)):
            log.warning(
                "no beat has collected garbage for %.0f s; start `durable beat`", conf.gc_interval + conf.beat_grace
            )
            collect(self._link, conf)

    def _pause(self, seconds: float) -> bool:
        """Wait, hearing the supervisor; return whether it said stop."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._inbox, select.POLLIN | select.POLLHUP)
        while not self._stopping and time.monotonic() < until:
            if poll.poll(poll_timeout(until)):
                self._read_inbox()
        return self._stopping
