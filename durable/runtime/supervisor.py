"""The supervisor: the process of `durable worker`. START HERE to read a worker.

    supervisor ──fork──> agent            notifier, heartbeats, hand-back (agent.py)
               ──fork──> worker process   one per queue and slot: engine thread + slot (child.py, engine.py, slot.py)
               ──fork──> beat             with -B (beat.py)

It has imported the app; it opens no socket and starts no thread, so that forking is safe for ever: a child that dies
is forked again from this clean process. Its loop: take signals, collect the dead, report them to the agent, replace
them. What a dead child was running is read from its seat in shared memory before the seat is given away.

Who may die where: a child: the agent hands its rows back at once. The agent: forked again, leases outlive it by
seconds. The supervisor: the kernel kills its children, their leases run out, the reaper takes their rows.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

from durable import django_support, forks, telemetry
from durable.app import Durable
from durable.celery_signals import worker_init, worker_ready, worker_shutdown
from durable.containment import contain_logging
from durable.outcomes import SoftTimeLimitExceeded
from durable.runtime.agent import Agent
from durable.runtime.beat import Beat
from durable.runtime.child import RETIRE, run_child
from durable.runtime.executor import time_limits
from durable.runtime.inherited import open_connections
from durable.runtime.interrupts import HardTimeLimitExceeded
from durable.runtime.lookout import Colleague
from durable.runtime.places import Place, Places
from durable.runtime.process import describe_exit, fork
from durable.runtime.quarantine import Quarantine
from durable.runtime.shared import IDLE
from durable.runtime.slots import PREFORK
from durable.runtime.termination import kill_hung, kill_running

log = logging.getLogger(__name__)

LIMIT_LOOK = 0.2
"""Seconds between two looks for steps beyond their time limit, if anything has one."""
KILL_AFTER_DRAIN = 2.0
"""Seconds beyond its drain time after which a child that doesn't end is killed."""
FORK_PAUSE_MOST = 5.0
HEALTHY_AFTER = 5.0


class Supervisor:
    """Runs one worker command.

    queues     queue -> number of worker processes at the start
    room       queue -> the most there can be until it is reloaded; else SPARE more
    pool       PREFORK; or THREADS, ASYNCIO: one process per queue, and those numbers are of its slots
    autoscale  fewest and most per queue, by how long work waits
    beat       whether a beat is forked too
    """

    def __init__(
        self,
        app: Durable,
        queues: Mapping[str, int],
        name: str,
        *,
        beat: bool = False,
        room: Mapping[str, int] | None = None,
        autoscale: tuple[int, int] | None = None,
        pool: str = PREFORK,
    ) -> None:
        self._app = app
        self._name = name
        self._beat_wanted = beat
        self._autoscale = autoscale
        self._places = Places(queues, room or {}, pool)
        self._seats = self._places.seats
        self._time_limits = bool(time_limits(app))
        self._inbox, self._to_agent = os.pipe()
        self._agent_pid = 0
        self._beat_pid = 0
        self._waker = self._seats.bell
        self._signals: list[int] = []
        self._draining: float | None = None
        self._reload = False

    def run(self) -> int:
        """Run until stopped by a signal; return the exit code. After SIGHUP it replaces itself by a fresh one."""
        django_support.close_all()  # a pool of them is threads, too
        forks.begin()
        forks.shared(self._seats)
        forks.shared(self)
        if threading.active_count() > 1:
            log.warning(
                "importing the app started threads; forking with threads is unsafe, start them in tasks instead"
            )
        contain_logging(SoftTimeLimitExceeded, HardTimeLimitExceeded)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            forks.handle(number, self._heard)
        worker_init.send(self._name)
        gc.collect()
        for found in open_connections():
            log.warning(
                "%s was opened before the worker processes are forked, which share it and read each other's answers; "
                "open it in a function marked @app.on_process_start",
                found,
            )
        gc.freeze()  # what was imported stays on pages the children share
        self._fork_agent()
        self._fill_places()
        if self._beat_wanted:
            self._fork_beat()
        log.info("worker %s: %d processes", self._name, sum(map(self._places.wanted, range(len(self._places.groups)))))
        worker_ready.send(self._name)
        while not (self._draining is not None and self._all_gone()):
            self._turn()
        self._end_agent()
        worker_shutdown.send(self._name)
        if self._reload:
            log.warning("worker %s starts afresh", self._name)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the same program again
        return 0

    def disown(self) -> None:
        """In a child that user code forks: neither write to the agent nor keep its pipe open."""
        forks.silence(self._inbox, self._to_agent)

    def _heard(self, number: int, _frame: object) -> None:
        self._signals.append(number)
        self._waker.ring()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._waker.reader, select.POLLIN)
        poll.poll(self._next_due() * 1000)
        self._waker.silence()
        while self._signals:
            self._take_signal(self._signals.pop(0))
        asked = self._seats.take_asked()
        if asked and self._draining is None:
            self._take_signal(asked)
        elif asked == signal.SIGTERM:
            self._reload = False  # it ends already, and is to stay away
        self._collect_dead()
        self._kill_overdue()
        if self._time_limits:
            self._kill_beyond_limit()
        if self._draining is None:
            self._retire_surplus()
            self._fill_places()

    def _next_due(self) -> float:
        """Seconds until something must be looked at though no signal comes."""
        if self._draining is not None or any(place.stopped_at is not None for place in self._places):
            return 0.2
        if self._time_limits or any(self._surplus(group) for group in range(len(self._places.groups))):
            return LIMIT_LOOK
        now = time.monotonic()
        waits = [self._places[index].fork_at - now for index in self._lacking()]
        return max(0.0, min([60.0, *waits]))

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        if number == signal.SIGHUP:
            self._reload = True
        again = self._draining is not None or number == signal.SIGQUIT
        if again:
            log.warning("worker %s stops now", self._name)
        else:
            log.info("worker %s drains: at most %.0f s for running steps", self._name, self._app.conf.drain_timeout)
        self._draining = time.monotonic() + (0.0 if again else self._app.conf.drain_timeout)
        for place in self._places:
            if place.pid:
                _kill(place.pid, signal.SIGQUIT if again else signal.SIGTERM)
                _kill(place.pid, signal.SIGCONT)
        if self._beat_pid:
            _kill(self._beat_pid, signal.SIGTERM)

    def _all_gone(self) -> bool:
        return not self._beat_pid and not any(place.pid for place in self._places)

    # The dead

    def _collect_dead(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended(pid, status)

    def _ended(self, pid: int, status: int) -> None:
        place = next((place for place in self._places if place.pid == pid), None)
        if os.WIFSTOPPED(status):
            if place is not None:
                place.stopped_at = time.monotonic()
            return
        if os.WIFCONTINUED(status):
            if place is not None:
                place.stopped_at = None
            return
        if place is not None:
            self._child_ended(place, status)
        elif pid == self._agent_pid:
            self._agent_pid = 0
            if self._draining is None or not self._all_gone():
                log.error("the agent %s; a new one is forked", describe_exit(status))
                self._fork_agent()
        elif pid == self._beat_pid:
            self._beat_pid = 0
            if self._draining is None:
                log.error("the beat %s; a new one is forked", describe_exit(status))
                self._fork_beat()

    def _child_ended(self, place: Place, status: int) -> None:
        pid, place.pid, place.stopped_at, retired, place.retiring = place.pid, 0, None, place.retiring, False
        seat = self._seats.seat(self._places.index(place))
        clean = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        if seat.worker_id and not clean:
            # A step that was killed because its drain time was over costs nothing; no more does a hung one's neighbour.
            entered = [running[:2] for running in seat.running(0.0)] if place.overdue is None else place.overdue
            crashed = [] if self._draining is not None else entered
            cause = (
                f"worker process {pid} of {self._name} on {os.uname().nodename} {describe_exit(status)}{place.reason}"
            )
            self._tell_agent({"worker": seat.worker_id, "entered": crashed, "cause": cause})
        seat.clear()
        place.reason, place.overdue = "", None
        now = time.monotonic()
        if clean or now - place.forked_at >= HEALTHY_AFTER:
            place.pause = 0.0
        place.fork_at = now + place.pause
        if not clean:
            place.pause = min(FORK_PAUSE_MOST, max(0.05, place.pause * 2))
        if self._draining is None:
            level = logging.INFO if clean else logging.WARNING
            then = "was one too many" if retired else "is replaced"
            log.log(level, "worker process %d (queue %s) %s; it %s", pid, place.queue, describe_exit(status), then)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for place in self._places:
            if not place.pid:
                continue
            # The agent would keep a stopped child's lease alive for ever.
            frozen = place.stopped_at is not None and now - place.stopped_at > self._app.conf.heartbeat_interval
            late = self._draining is not None and now > self._draining + KILL_AFTER_DRAIN
            if frozen or late:
                log.warning(
                    "worker process %d is killed: it %s", place.pid, "was stopped" if frozen else "does not end"
                )
                _kill(place.pid, signal.SIGKILL)
        if self._beat_pid and self._draining is not None and now > self._draining + KILL_AFTER_DRAIN:
            _kill(self._beat_pid, signal.SIGKILL)

    def _kill_beyond_limit(self) -> None:
        """Kill the children whose step runs longer than its `time_limit`: that step's process, and no other's."""
        now = time.monotonic()
        for index, place in enumerate(self._places):
            seat = self._seats.seat(index)
            if place.has_many:
                kill_hung(place, seat, now)
                continue
            entered, limit_at = seat.entered, seat.limit_at
            if entered is None or not limit_at or now < limit_at:
                continue
            if not kill_running(seat, entered, os.getpid(), limit_at):
                continue
            ran = limit_at - seat.entered_at
            place.reason = f": its step ran longer than its time_limit of {ran:g} s"
            log.warning("worker process %d is killed%s", place.pid, place.reason, extra={"instance": entered.id})

    # As many as are wanted

    def _fill_places(self) -> None:
        now = time.monotonic()
        for index in self._lacking():
            if now >= self._places[index].fork_at:
                self._fork_child(index)

    def _lacking(self) -> list[int]:
        """The places to fill: those left last first, so that the pause after a crash is kept."""
        found = []
        for group in range(len(self._places.groups)):
            free = [index for index, place in enumerate(self._places) if place.group == group and not place.pid]
            free.sort(key=lambda index: self._places[index].fork_at, reverse=True)
            found += free[: max(0, -self._surplus(group))]
        return found

    def _surplus(self, group: int) -> int:
        """How many processes a group has beyond those wanted; negative: lacks."""
        serving = sum(1 for place in self._places if place.group == group and place.pid and not place.retiring)
        return serving - self._places.wanted(group)

    def _retire_surplus(self) -> None:
        """Have as many end as are too many, idle ones first; one that has yet to register is met later."""
        for index, place in enumerate(self._places):
            if place.has_many and self._seats.seat(index).leaves:
                place.retiring = True  # it ends by itself
        for group in range(len(self._places.groups)):
            surplus = self._surplus(group)
            if surplus <= 0:
                continue
            serving = [
                (self._seats.seat(index).state != IDLE, -index, place)
                for index, place in enumerate(self._places)
                if place.group == group and place.pid and not place.retiring and self._seats.seat(index).worker_id
            ]
            for _, _, place in sorted(serving, key=lambda entry: entry[:2])[:surplus]:
                place.retiring = True
                _kill(place.pid, RETIRE)

    # Forking

    def _fork_child(self, index: int) -> None:
        place, seats = self._places[index], self._seats
        seat = seats.seat(index)
        seat.clear()
        app, name, drain_timeout = self._app, self._name, self._app.conf.drain_timeout
        colleagues = [
            Colleague(seats.seat(other), at.bell)
            for other, at in enumerate(self._places)
            if at.group == place.group and other != index
        ]
        place.forked_at = time.monotonic()
        place.pid = self._fork(
            lambda: self._without_agent(lambda: run_child(app, place, name, seats, seat, drain_timeout, colleagues)),
            f"durable:{place.queue}",
            "worker",
        )
        seat.pid = place.pid

    def _fork_agent(self) -> None:
        places, bells = self._places, [place.bell for place in self._places]
        quarantine = Quarantine(self._seats, bells, places.quarantined)
        queues = [place.queue for place in places]
        agent = Agent(
            self._app, self._name, queues, self._seats, bells, self._inbox, self._autoscale, quarantine, places.room
        )
        # The agent must see the end of the pipe when the supervisor is gone, so it keeps no writing end itself.
        self._agent_pid = self._fork(lambda: self._be_agent(agent), "durable:agent", "agent")

    def _be_agent(self, agent: Agent) -> int:
        os.close(self._to_agent)
        self._to_agent = -1
        return agent.run()

    def _fork_beat(self) -> None:
        app, name = self._app, self._name
        self._beat_pid = self._fork(lambda: self._without_agent(lambda: Beat(app, name).run()), "durable:beat", "beat")

    def _without_agent(self, body: Callable[[], int]) -> int:
        """Be a child that has nothing to say to the agent: its pipe ends with the supervisor."""
        os.close(self._inbox)
        os.close(self._to_agent)
        self._inbox = self._to_agent = -1
        return body()

    def _fork(self, body: Callable[[], int], title: str, role: str) -> int:
        def be() -> int:
            with telemetry.process(role):
                return body()

        django_support.close_all()
        return fork(be, title)

    def _tell_agent(self, message: Mapping[str, object]) -> None:
        os.write(self._to_agent, json.dumps(message).encode() + b"\n")

    def _end_agent(self) -> None:
        """Let the agent hand back what killed children left, then end it."""
        self._tell_agent({"stop": True})
        until = time.monotonic() + 5.0
        while self._agent_pid and time.monotonic() < until:
            self._collect_dead()
            time.sleep(0.01)
        if self._agent_pid:
            _kill(self._agent_pid, signal.SIGKILL)
            os.waitpid(self._agent_pid, 0)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended a moment ago; waitpid tells
