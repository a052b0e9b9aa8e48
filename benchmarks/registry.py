"""What a benchmark is to the command line: a name, how large, with how many processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.database import Database
from benchmarks.figures import Measure


@dataclass(frozen=True)
class Size:
    """How much of it: what `count` counts is the benchmark's; `processes` are worker processes, run by run."""

    count: int
    runs: int
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Benchmark:
    """One sub-command.

    measure    takes a database and a size; returns what was measured
    count      the default size; of: what it counts, for the help
    least      below this a smaller scale does not go
    processes  the default
    """

    name: str
    measure: Callable[[Database, Size], list[Measure]]
    count: int
    of: str
    processes: tuple[int, ...] = (2,)
    least: int = 10

    @property
    def help(self) -> str:
        """Return the first line of the measuring function's docstring."""
        return (self.measure.__doc__ or "").strip().splitlines()[0]
