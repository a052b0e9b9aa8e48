"""What a worker process of many slots is stepping, in memory it shares with its supervisor and its agent.

One roster per seat of such a process, an anonymous mmap made before the first fork. Five columns of `slots` aligned
words, each entry written by its child alone, the id last, so that nothing is locked:

    id        instance being stepped, 0 when none
    token     its token
    at        CLOCK_MONOTONIC seconds when that began
    limit_at  CLOCK_MONOTONIC seconds from which it is beyond its time limit, 0 for never
    asked     the token of a claim that is to be terminated                              agent writes

and one more word, how often the agent has asked.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple


class Step(NamedTuple):
    """A row that is being stepped, at a place in the roster."""

    place: int
    id: int
    token: int
    at: float
    limit_at: float


class Roster:
    """The steps of one process with so many slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._memory = mmap.mmap(-1, (5 * slots + 1) * 8)
        view = memoryview(self._memory)
        self._integers: memoryview[int] = view.cast("q")
        self._floats: memoryview[float] = view.cast("d")

    def disown(self) -> None:
        """In a child that user code forks: go on with a private copy."""
        view = memoryview(bytearray(self._memory))
        self._integers, self._floats = view.cast("q"), view.cast("d")

    def clear(self) -> None:
        """Empty it for a new child."""
        self._memory[:] = bytes(len(self._memory))

    def enter(self, index: int, instance_id: int, token: int, at: float, limit_at: float) -> None:
        """Child: note what is about to be stepped."""
        slots, integers = self.slots, self._integers
        integers[slots + index] = token
        self._floats[2 * slots + index] = at
        self._floats[3 * slots + index] = limit_at
        integers[index] = instance_id

    def leave(self, index: int) -> None:
        """Child: note that the outcome was handed over, or will never count."""
        self._integers[index] = 0

    def steps(self) -> list[Step]:
        """What is being stepped."""
        slots = self.slots
        return [
            Step(
                index,
                instance_id,
                int(self._integers[slots + index]),
                float(self._floats[2 * slots + index]),
                float(self._floats[3 * slots + index]),
            )
            for index, instance_id in enumerate(self._integers[:slots].tolist())
            if instance_id
        ]

    def ask(self, instance_id: int, token: int) -> bool:
        """Agent: have the child terminate a claim if it steps it; return whether it does. Ring its bell then."""
        for step in self.steps():
            if (step.id, step.token) == (instance_id, token):
                if self._integers[4 * self.slots + step.place] == token:
                    return False  # it was asked before
                self._integers[4 * self.slots + step.place] = token
                self._integers[5 * self.slots] += 1
                return True
        return False

    @property
    def times_asked(self) -> int:
        """How often the agent has asked for something."""
        return int(self._integers[5 * self.slots])

    def is_asked(self, index: int, token: int) -> bool:
        """Child: whether the claim at a place is to be terminated."""
        return int(self._integers[4 * self.slots + index]) == token
