"""How a comparison decides: the median of the pair ratios, its bootstrap interval, and the goal."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000
SLACK = 0.03
"""The interval's lower end may lie this far below the goal."""


def interval(ratios: Sequence[float], percent: float = 95.0) -> tuple[float, float]:
    """Return the bootstrap interval of the median (percentile method, the same for the same ratios).

    Args:
        ratios: One per pair; at least one.
        percent: How much of the resampled medians lies inside.
    """
    if not ratios:
        raise ValueError("there are no ratios")
    draw = random.Random(14)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    outside = round(RESAMPLES * (100 - percent) / 200)
    return medians[outside], medians[RESAMPLES - 1 - outside]


@dataclass(frozen=True)
class Pairs:
    """One figure of both sides, run by run: `old[i]` and `new[i]` ran directly after each other.

    Attributes:
        what: The figure's name.
        unit: Its unit.
        goal: What the ratio is to reach.
        lower_is_better: Whether the ratio is old/new (latencies) instead of new/old.
        judged: False for what is only shown.
        tail: Whether it scatters so much (p95, p99) that it fails only when the whole interval lies below the goal.
    """

    what: str
    unit: str
    old: tuple[float, ...]
    new: tuple[float, ...]
    goal: float
    lower_is_better: bool = False
    tail: bool = False
    judged: bool = True

    @property
    def ratios(self) -> list[float]:
        """How good the new side is beside the old one, pair by pair; 1 is as good, more is better."""
        pairs = zip(self.old, self.new, strict=True)
        return [old / new if self.lower_is_better else new / old for old, new in pairs]

    @property
    def median(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def ends(self) -> tuple[float, float]:
        """The median's 95 % bootstrap interval."""
        return interval(self.ratios)

    @property
    def holds(self) -> bool:
        """Whether the goal is reached."""
        lower, upper = self.ends
        if not self.judged:
            return True
        if self.tail:
            return upper >= self.goal
        return self.median >= self.goal and lower >= self.goal - SLACK


@dataclass(frozen=True)
class Count:
    """Something counted on both sides, that may not rise.

    Attributes:
        old, new: The least of several rounds: a round only ever adds to the count (a poll more, a batch cut in two).
        wobble: By which part such counts differ from round to round; a new statement is far more.
        limit: What the new side may not exceed, whatever the old one has; None for none.
        judged: False for what is only shown.
    """

    what: str
    old: float
    new: float
    wobble: float
    limit: float | None = None
    judged: bool = True

    @property
    def holds(self) -> bool:
        """Whether the new side counts no more than the old one, within what such counts wobble."""
        if not self.judged:
            return True
        return self.new <= self.old * (1 + self.wobble) and (self.limit is None or self.new <= self.limit)
