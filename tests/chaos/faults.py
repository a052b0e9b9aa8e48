"""The table of faults. Each is done to a target that a rule names, and says whether it has bitten.

To add one: a subclass of Fault in FAULTS. `why_not` says why this machine can't; `make` returns what the fault log is
to keep, or raises Missed when nothing was there to be hurt.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from tests.chaos.application import SCHEMA
from tests.chaos.cluster import AGENT, CHILD, LEASE, Fleet, Place, Postgres, alive, stopped

Made = dict[str, Any]


class Missed(Exception):
    """The fault found nobody, or did nothing to them."""


@dataclass
class World:
    """What faults are done to."""

    fleet: Fleet
    postgres: Postgres
    restarts: list[tuple[float, float]] = field(default_factory=list)
    """When the server was away."""


class Fault:
    """One kind of fault. weight: its share of the schedule."""

    name = ""
    weight = 1.0

    def why_not(self) -> str | None:
        """Why it can't be made here, if it can't."""
        return None

    def make(self, world: World, dice: random.Random) -> Made:
        """Do it, see that it bit, undo it. Raises Missed."""
        raise NotImplementedError


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition. Raises Missed when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Missed(f"{what} did not come within {seconds:g} s")
        time.sleep(0.05)


@contextmanager
def taken(places: list[Place], dice: random.Random) -> Iterator[Place]:
    """One of these that no other fault has in its hands. Raises Missed when there is none."""
    for place in dice.sample(places, len(places)):
        if place.lock.acquire(blocking=False):
            try:
                until(lambda place=place: place.children("durable:"), 15, f"a process of {place.name}")  # type: ignore[misc]
                yield place
            finally:
                place.lock.release()
            return
    raise Missed("every command has a fault already")


def children(place: Place, title: str) -> list[int]:
    found = place.children(title)
    if not found:
        raise Missed(f"{place.name} has no {title}")
    return found


def buried(world: World, pids: list[int], seconds: float) -> int:
    """How many leases of these processes were found dead within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with world.postgres.connect() as connection:
                row = connection.execute(
                    f"SELECT count(*) FROM {SCHEMA}.workers WHERE pid = ANY(%s) AND dead_at IS NOT NULL", [pids]
                ).fetchone()
        except psycopg.OperationalError:
            row = None
        if row and row[0]:
            return int(row[0])
        time.sleep(0.1)
    raise Missed("no lease ran out")


class KillChild(Fault):
    """SIGKILL of a worker process in whatever it does."""

    name, weight = "kill-child", 6.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            victim = dice.choice(children(place, CHILD))
            os.kill(victim, signal.SIGKILL)
            until(lambda: not alive(victim), 5, "its death")
            return {"pids": [victim]}


class KillAgent(Fault):
    """SIGKILL of a command's agent: no heartbeats, nobody who listens, until it is replaced."""

    name, weight = "kill-agent", 2.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            (victim, *_) = children(place, AGENT)
            os.kill(victim, signal.SIGKILL)
            until(lambda: not alive(victim), 5, "its death")
            until(lambda: place.children(AGENT) not in ([], [victim]), 15, "another agent")
            return {"pids": [victim]}


class KillSupervisor(Fault):
    """SIGKILL of a whole command's parent: its children must die with it."""

    name, weight = "kill-supervisor", 2.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            family = children(place, "durable:")
            command = place.command
            command.process.kill()
            killed = time.monotonic()
            until(lambda: not any(map(alive, family)), 10, "the death of its children")
            gone = time.monotonic()
            until(lambda: place.command is not command, 10, "another command")
            return {"pids": family, "orphans_for": gone - killed}


class KillBeat(Fault):
    name, weight = "kill-beat", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        place = dice.choice(world.fleet.beats)
        with place.lock:
            command = place.command
            command.process.kill()
            until(lambda: place.command is not command, 10, "another beat")
            return {"pids": [command.pid]}


class KillProducer(Fault):
    """SIGKILL of a producer: nobody knows what became of its last call."""

    name, weight = "kill-producer", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        return {"pids": [world.fleet.kill_producer(dice.randrange(len(world.fleet.producers)))]}


class Zombie(Fault):
    """SIGSTOP of a whole command beyond its lease, then SIGCONT: it goes on with steps that others have run again."""

    name, weight = "stop-command", 2.0

    def targets(self, place: Place) -> list[int]:
        return [place.command.pid, *children(place, "durable:")]

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            pids = self.targets(place)
            with stopped(pids):
                time.sleep(LEASE + dice.uniform(0.2, 1.0))
                ran_out = buried(world, children(place, CHILD), 6)
            return {"pids": pids, "leases": ran_out}


class ZombieAgent(Zombie):
    """SIGSTOP of the agent alone: the children work on while their leases run out."""

    name, weight = "stop-agent", 2.0

    def targets(self, place: Place) -> list[int]:
        return children(place, AGENT)


class StopChild(Fault):
    """SIGSTOP of a worker process for less or more than a lease, which its agent keeps alive."""

    name, weight = "stop-child", 2.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            victim = dice.choice(children(place, CHILD))
            with stopped([victim]):
                time.sleep(dice.uniform(0.3, 1.3 * LEASE))
                bitten = alive(victim)
            if not bitten:
                raise Missed("it had died")
            return {"pids": [victim]}


class StopBeat(Fault):
    """SIGSTOP of a beat beyond its lease."""

    name, weight = "stop-beat", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        place = dice.choice(world.fleet.beats)
        with place.lock:
            pid = place.command.pid
            with stopped([pid, *place.children("durable:")]):
                time.sleep(LEASE + 0.5)
                buried(world, [pid, *place.children("durable:")], 6)
            return {"pids": [pid]}


class TerminateBackends(Fault):
    """pg_terminate_backend of some or all sessions that are not ours."""

    name, weight = "terminate-backends", 4.0

    def make(self, world: World, dice: random.Random) -> Made:
        with world.postgres.connect() as connection:
            pids = [row[0] for row in connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend'"
                " AND application_name NOT LIKE 'chaos%' ORDER BY pid")]  # fmt: skip
            chosen = dice.sample(pids, dice.choice((1, 2, 4, len(pids))) if len(pids) >= 4 else len(pids))
            if not chosen:
                raise Missed("no sessions")
            ended = connection.execute("SELECT count(*) FROM unnest(%s) AS p WHERE pg_terminate_backend(p, 3000)",
                                       [chosen]).fetchone()  # fmt: skip
            if not ended or not ended[0]:
                raise Missed("no session ended")
            return {"sessions": ended[0]}


class CrashPostgres(Fault):
    """An immediate stop of the server, and a restart at once or after more than a lease."""

    name, weight = "crash-postgres", 1.2

    def make(self, world: World, dice: random.Random) -> Made:
        began = time.monotonic()
        away = dice.choice((0.0, 0.0, 0.5, LEASE + 0.5))
        world.postgres.crash(away)
        with world.postgres.connect() as connection:
            row = connection.execute(
                "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())"
            ).fetchone()
        ended = time.monotonic()
        world.restarts.append((began, ended))
        if row is None or row[0] > ended - began:
            raise Missed("the server was not started anew")
        return {"away": ended - began}


class LockTable(Fault):
    """An ACCESS EXCLUSIVE lock on the table of instances for a while."""

    name, weight = "lock-table", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        with world.postgres.connect() as holder, world.postgres.connect() as looker, ExitStack() as stack:
            stack.enter_context(holder.transaction())
            holder.execute("SET LOCAL lock_timeout = '5s'")
            holder.execute(f"LOCK TABLE {SCHEMA}.instances IN ACCESS EXCLUSIVE MODE")
            time.sleep(dice.uniform(0.3, 1.5))
            row = looker.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
        if not row or not row[0]:
            raise Missed("nobody waited")
        return {"waited": row[0]}


class _Network(Fault):
    """Something the proxy does. One at a time would be tidy; they may overlap."""

    def make(self, world: World, dice: random.Random) -> Made:
        before = world.fleet.proxy.touched
        self.disturb(world, dice)
        touched = world.fleet.proxy.touched - before
        if not touched:
            raise Missed("nothing went through")
        return {"touched": touched}

    def disturb(self, world: World, dice: random.Random) -> None:
        raise NotImplementedError


class Delay(_Network):
    """Every chunk is late."""

    name, weight = "net-delay", 1.5

    def disturb(self, world: World, dice: random.Random) -> None:
        world.fleet.proxy.latency = dice.uniform(0.005, 0.15)
        time.sleep(dice.uniform(0.5, 2.0))
        world.fleet.proxy.latency = 0.0


class Cut(_Network):
    """Every connection is reset."""

    name, weight = "net-cut", 2.5

    def disturb(self, world: World, dice: random.Random) -> None:
        world.fleet.proxy.cut()


class HalfOpen(_Network):
    """Nothing is read or written while both sockets stay, beyond a lease or not; then it goes on, or all are reset."""

    name, weight = "net-half-open", 1.5

    def disturb(self, world: World, dice: random.Random) -> None:
        world.fleet.proxy.half_open(True)
        time.sleep(dice.choice((0.5, 1.5, LEASE + 1)))
        if dice.random() < 0.5:
            world.fleet.proxy.cut()
        world.fleet.proxy.half_open(False)


class LoseAnswer(_Network):
    """The answer to a write is lost together with its connection: it was done, and nobody was told."""

    name, weight = "net-lose-answer", 5.0

    def disturb(self, world: World, dice: random.Random) -> None:
        before = world.fleet.proxy.touched
        world.fleet.proxy.swallow = dice.randint(1, 3)
        until(lambda: world.fleet.proxy.touched > before, 3, "an answer to be lost")
        time.sleep(0.2)
        world.fleet.proxy.swallow = 0


class Reload(Fault):
    """A deploy: the code changes, SIGHUP."""

    name, weight = "deploy-reload", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            old = children(place, CHILD)
            generation = world.fleet.deploy()
            place.command.process.send_signal(signal.SIGHUP)
            until(lambda: (now := place.children(CHILD)) and not set(now) & set(old), 20, "new processes")
            return {"generation": generation}


class Restart(Fault):
    """A deploy: the code changes, SIGTERM, another command."""

    name, weight = "deploy-restart", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            command, ended = place.command, len(place.ended)
            generation = world.fleet.deploy()
            command.process.send_signal(signal.SIGTERM)
            until(lambda: len(place.ended) > ended, 25, "its end")
            return {"generation": generation, "exit": place.ended[ended][1]}


FAULTS: list[Fault] = [
    kind() for kind in (
        KillChild, KillAgent, KillSupervisor, KillBeat, KillProducer, Zombie, ZombieAgent, StopChild, StopBeat,
        TerminateBackends, CrashPostgres, LockTable, Delay, Cut, HalfOpen, LoseAnswer, Reload, Restart,
    )
]  # fmt: skip
