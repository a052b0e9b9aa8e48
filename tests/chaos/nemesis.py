"""When which fault is made: drawn from the seed before the run. Each runs in a thread of its own: they overlap."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from tests.chaos.faults import Fault, Missed, World
from tests.chaos.table import FAULTS

APART = (0.4, 1.6)
"""Seconds between the beginnings of two faults."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault to be made: seconds after the beginning, which, and its dice."""

    at: float
    fault: Fault
    dice: str


def plan(seed: int, seconds: float, only: Sequence[str] = ()) -> tuple[list[Planned], dict[str, str]]:
    """Return the schedule, and why the faults that this machine can't make are not in it."""
    asked = [fault for fault in FAULTS if not only or fault.name in only]
    skipped = {fault.name: why for fault in asked if (why := fault.why_not())}
    dice = random.Random(f"{seed}:nemesis")
    schedule, at = [], 0.5
    while at < seconds:
        (fault,) = dice.choices(asked, [one.weight for one in asked])
        schedule.append(Planned(at, fault, f"{seed}:fault:{len(schedule)}"))
        at += dice.uniform(*APART)
    # Left out afterwards, so that the others come when they come elsewhere.
    return [planned for planned in schedule if planned.fault.name not in skipped], skipped


class Nemesis:
    """Makes the faults of a schedule. `log` has one entry per fault: kind, t, end, bitten, what it did or why not."""

    def __init__(self, world: World, schedule: Sequence[Planned]) -> None:
        self._world, self._schedule = world, schedule
        self.log: list[dict[str, Any]] = []

    def run(self) -> None:
        """Make them all; return when the last one is over."""
        began = time.monotonic()
        threads = []
        for planned in self._schedule:
            time.sleep(max(0.0, began + planned.at - time.monotonic()))
            thread = threading.Thread(target=self._make, args=(planned,), name=planned.fault.name, daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(90)
            if thread.is_alive():
                raise AssertionError(f"fault {thread.name} did not end")

    def _make(self, planned: Planned) -> None:
        entry: dict[str, Any] = {"kind": planned.fault.name, "t": time.monotonic(), "bitten": False}
        self.log.append(entry)
        try:
            entry.update(planned.fault.make(self._world, random.Random(planned.dice)), bitten=True)
        except (Missed, ProcessLookupError, psycopg.Error) as error:
            entry["why"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        entry["end"] = time.monotonic()
