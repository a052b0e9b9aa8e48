"""Figures and what is expected of them: series of interleaved runs, ratios round by round, targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FLOOR = "SQL floor"
OURS = "durable"


@dataclass
class Series:
    """One contender's figures, run by run.

    setting  what it was run with, written beside its figure
    missing  why there are no figures; empty when there are
    """

    name: str
    runs: list[float] = field(default_factory=list)
    setting: str = ""
    missing: str = ""

    @property
    def median(self) -> float:
        """Return the median of the runs. Raises ValueError when there are none."""
        if not self.runs:
            raise ValueError(f"{self.name} has no runs: {self.missing or 'it was not run'}")
        return statistics.median(self.runs)


@dataclass(frozen=True)
class Target:
    """What is to be reached by `subject`: at least `limit` (or at most), in the measure's unit, or times `base`."""

    subject: str
    limit: float
    base: str | None = None
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}" + (f" of {self.base}" if self.base else "")


@dataclass
class Measure:
    """One thing measured, for each contender, in one unit."""

    what: str
    unit: str
    series: list[Series]
    targets: list[Target] = field(default_factory=list)

    def find(self, name: str) -> Series | None:
        """Return the contender of that name if it has figures."""
        return next((series for series in self.series if series.name == name and series.runs), None)

    def reached(self, target: Target) -> float | None:
        """Return the figure a target is about, or None when it was not measured."""
        subject = self.find(target.subject)
        if subject is None:
            return None
        if target.base is None:
            return subject.median
        base = self.find(target.base)
        return None if base is None else ratio(subject, base)

    def met(self, target: Target) -> bool | None:
        """Return whether a target is met, or None when it was not measured."""
        value = self.reached(target)
        if value is None:
            return None
        return value <= target.limit if target.at_most else value >= target.limit


def ratio(subject: Series, base: Series) -> float:
    """Return the median of the ratios round by round: what slows a whole round down slows both sides."""
    return statistics.median(a / b for a, b in zip(subject.runs, base.runs, strict=True))


def interleave(runs: int, contenders: Mapping[str, Callable[[], float]]) -> list[Series]:
    """Run each contender once per round, in the order given, `runs` rounds; return their series."""
    series = [Series(name) for name in contenders]
    for _ in range(runs):
        for one in series:
            one.runs.append(contenders[one.name]())
    return series


def interleave_many(runs: int, contenders: Mapping[str, Callable[[], Mapping[str, float]]]) -> dict[str, list[Series]]:
    """As `interleave`, for runs that yield several figures by name; return the contenders' series by figure."""
    found: dict[str, list[Series]] = {}
    for _ in range(runs):
        for name, run in contenders.items():
            for figure, value in run().items():
                kinds = found.setdefault(figure, [])
                one = next((series for series in kinds if series.name == name), None)
                if one is None:
                    kinds.append(one := Series(name))
                one.runs.append(value)
    return found


def percentile(values: list[float], percent: int) -> float:
    """Return the value that `percent` of the values do not exceed (nearest rank)."""
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
