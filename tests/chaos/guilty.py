"""Faults that are instances: they fork in a step, or raise what ends a process where user code is called.

They are inserted among the load, a few at once, and logged like a producer's, so that each must come to its own right
end; what they did to others is for tests.chaos.harm_rules to find.
"""

from __future__ import annotations

import random
import time
from typing import Any

import psycopg

from tests.chaos import hostile
from tests.chaos.application import SCHEMA
from tests.chaos.client import Log
from tests.chaos.faults import Fault, Made, Missed, World
from tests.chaos.model import Spec

ENDS_WITHIN = 60.0
"""Seconds after which the fault no longer waits for them. What is not over at the end is a violation then."""


class Guilty(Fault):
    """Inserts instances of `draw` and waits for their ends."""

    at_once = (2, 5)

    def draw(self, key: str, dice: random.Random) -> Spec:
        """Return one instance."""
        raise NotImplementedError

    def make(self, world: World, dice: random.Random) -> Made:
        name = f"{self.name}-{world.number()}"
        specs = [self.draw(f"{name}-{n}", dice) for n in range(dice.randint(*self.at_once))]
        log = Log(world.fleet.clients / f"{name}.jsonl")
        outcome, ids = log.call(
            "insert",
            lambda: [result.id for result in world.app.insert_many([spec.entry() for spec in specs])],
            specs=[spec.as_json() for spec in specs],
        )
        if outcome != "ok":
            raise Missed(f"they were not inserted: {outcome}")
        left = _left(world, ids)
        if left == len(ids):
            raise Missed("none of them was run in time")
        return {"ids": ids, "left": left, "of": sorted({str(spec.given) for spec in specs})}


def _left(world: World, ids: list[int]) -> int:
    """Wait for their ends; return how many have not come."""
    until = time.monotonic() + ENDS_WITHIN
    left = len(ids)
    while left and time.monotonic() < until:
        time.sleep(0.2)
        try:
            with world.postgres.connect() as connection:
                row = connection.execute(f"SELECT count(*) FROM {SCHEMA}.history WHERE id = ANY(%s)", [ids]).fetchone()
        except psycopg.OperationalError:
            continue
        left = len(ids) - (row[0] if row else 0)
    return left


def _spec(key: str, machine: str, **given: Any) -> Spec:
    return Spec(key, machine, machine, {"k": key, **given}, {"priority": 0})


class ForkStep(Guilty):
    """A step forks a child that leaves it by return, by an exit, an exception or later than its parent."""

    name, weight = "fork-step", 3.0

    def draw(self, key: str, dice: random.Random) -> Spec:
        return _spec(key, dice.choice(("fork", "fork-async", "fork-machine")), how=dice.choice(hostile.LEAVES))


class ForkBusy(Guilty):
    """A step starts a process, a busy pool or a command, and ends it with a signal."""

    name, weight, at_once = "fork-busy", 1.5, (1, 3)

    def draw(self, key: str, dice: random.Random) -> Spec:
        return _spec(key, "fork-busy", how=dice.choice(hostile.BUSY))


class ForkOrphan(Guilty):
    """A worker process dies while a child lives that a step has forked, with copies of all that was open."""

    name, weight, at_once = "fork-orphan", 0.7, (1, 1)

    def draw(self, key: str, dice: random.Random) -> Spec:
        return _spec(key, "fork-orphan", how="orphan")


class ExitStep(Guilty):
    """Code of a step raises what ends a process: in a task, its result, its error, a machine, `handle`, a state."""

    name, weight = "exit-step", 3.0

    def draw(self, key: str, dice: random.Random) -> Spec:
        kind = dice.choice(list(hostile.RAISES))
        match dice.choice(("exit", "exit-machine", "exit-state", "exit-init")):
            case "exit":
                return _spec(key, "exit", place=dice.choice(("body", "str", "json")), kind=kind)
            case "exit-machine":
                return _spec(key, "exit-machine", place=dice.choice(hostile.STEP_PLACES), kind=kind)
            case "exit-state":
                return _spec(key, "exit-state", kind=kind)
            case _:
                return _spec(key, "exit-init")


class ExitHook(Guilty):
    """What is called around a step raises what ends a process: hooks, managers, receivers, backoffs, log filters."""

    name, weight = "exit-hook", 3.0

    def draw(self, key: str, dice: random.Random) -> Spec:
        place = dice.choice([*(place for place in hostile.PLACES if place not in ("body", "str", "json")),
                             "backoff", "enter", "leave"])  # fmt: skip
        if place in ("backoff", "enter", "leave"):
            return _spec(key, f"exit-{place}")
        return _spec(key, "exit", place=place, kind=dice.choice(list(hostile.RAISES)))


class ExitLoop(Guilty):
    """A coroutine's part raises what ends a process, is left behind, or stops the loop."""

    name, weight = "exit-loop", 2.0

    def draw(self, key: str, dice: random.Random) -> Spec:
        place = dice.choice(list(hostile.LOOP_PLACES))
        return _spec(key, "exit-async", place=place, kind=dice.choice(list(hostile.RAISES)))
