"""Faults, and those that are done to processes. Each hurts a target that a rule names, and says whether it has bitten.

To add one: a subclass of Fault, named in tests.chaos.table. `why_not` says why this machine can't; `make` returns what
the fault log is to keep, or raises Missed when nothing was there to be hurt.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from durable import Durable
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
    app: Durable
    restarts: list[tuple[float, float]] = field(default_factory=list)
    """When the server was away."""
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def number(self) -> int:
        """Return a number that no other fault has."""
        return next(self.numbers)


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
            return {"pids": [victim], "place": place.name}


class KillAgent(Fault):
    """SIGKILL of a command's agent: no heartbeats, nobody who listens, until it is replaced."""

    name, weight = "kill-agent", 2.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            (victim, *_) = children(place, AGENT)
            os.kill(victim, signal.SIGKILL)
            until(lambda: not alive(victim), 5, "its death")
            until(lambda: place.children(AGENT) not in ([], [victim]), 15, "another agent")
            return {"pids": [victim], "place": place.name}


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
            return {"pids": family, "orphans_for": gone - killed, "place": place.name}


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
            return {"pids": pids, "leases": ran_out, "place": place.name}


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
            return {"pids": [victim], "place": place.name}


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


class Reload(Fault):
    """A deploy: the code changes, SIGHUP."""

    name, weight = "deploy-reload", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            old = children(place, CHILD)
            generation = world.fleet.deploy()
            place.command.process.send_signal(signal.SIGHUP)
            until(lambda: (now := place.children(CHILD)) and not set(now) & set(old), 20, "new processes")
            return {"generation": generation, "place": place.name}


def restarted(place: Place) -> int:
    """SIGTERM a command, for which another is started; return its exit code. Raises Missed when it does not end."""
    ended = len(place.ended)
    place.command.process.send_signal(signal.SIGTERM)
    until(lambda: len(place.ended) > ended, 25, "its end")
    return place.ended[ended][1]


class Restart(Fault):
    """A deploy: the code changes, SIGTERM, another command."""

    name, weight = "deploy-restart", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            return {"generation": world.fleet.deploy(), "exit": restarted(place), "place": place.name}


class Upgrade(Fault):
    """A deploy with a newer schema: `durable migrate`, then one command runs the new release and the others the old."""

    name, weight = "deploy-schema", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        with taken(world.fleet.workers, dice) as place:
            release = world.fleet.release()
            if code := world.fleet.migrate(release):
                raise Missed(f"migrate ended with {code}")
            place.moves_to(release)
            return {"release": release.name, "exit": restarted(place), "place": place.name}
