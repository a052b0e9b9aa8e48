"""What a mixed load may never do, decided from its logs: plain functions, each returns what is wrong.

The verdicts do not depend on how fast a machine is. An overlap is one of steps that were inside of it by the database's
clock. A rate is broken if more tokens were given than burst + rate x window even when every claim took the longest time
that the log allows: a claim happened between the beginning of its transaction and the moment its row was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple


class Inside(NamedTuple):
    """A step was inside of something; None: it was killed there, and counts as a moment."""

    began: datetime
    ended: datetime | None


class Grant(NamedTuple):
    """Tokens were given at some moment of an interval."""

    since: datetime
    until: datetime
    weight: int = 1


class Firing(NamedTuple):
    """A schedule went on from one next occurrence to another; `count` occurrences were fired for it."""

    at: datetime
    to: datetime
    count: int


def most_at_once(steps: Iterable[Inside]) -> int:
    """The largest number of steps that were inside at one instant."""
    changes: list[tuple[datetime, int, int]] = []
    for began, ended in steps:
        # In one instant, whoever leaves has left; then the killed are looked at, then others enter.
        changes += [(began, 1, 0)] if ended in (None, began) else [(began, 2, 1), (ended, 0, -1)]
    now = most = 0
    for _, _, change in sorted(changes):
        now += change
        most = max(most, now if change else now + 1)
    return most


def too_fast(grants: Iterable[Grant], per_second: float, burst: int) -> list[str]:
    """Windows in which more tokens were given than burst + rate x window."""
    ordered = sorted(grants, key=lambda grant: grant.until)
    wrong = []
    for n, first in enumerate(ordered):
        tokens = 0
        for last in ordered[n:]:
            tokens += last.weight
            window = (last.until - first.since).total_seconds()
            if tokens > burst + per_second * window + 1e-6:
                wrong.append(f"{tokens} within {window:.3f} s")
    return wrong


def not_once(expected: Iterable[tuple[int, str]], committed: Iterable[tuple[int, str]]) -> dict[tuple[int, str], int]:
    """(instance, step) -> how often its effects are there, of those that are not there exactly once."""
    wanted, there = Counter(expected), Counter(committed)
    return {what: there[what] for what in wanted.keys() | there.keys() if there[what] != 1 or what not in wanted}


def wrongly_fired(firings: Sequence[Firing], every: timedelta, inserted: int) -> list[str]:
    """What is wrong with the occurrences of an interval, of which `inserted` instances are there."""
    wrong = [f"{f.count} from {f.at} to {f.to}" for f in firings if f.to - f.at != f.count * every]
    wrong += [f"from {a.to} to {b.at}" for a, b in pairwise(firings) if a.to != b.at]
    fired = sum(firing.count for firing in firings)
    return wrong if fired == inserted else [*wrong, f"{fired} occurrences, {inserted} instances"]
