"""How many worker processes a queue gets with --autoscale: a policy, without clocks or processes of its own.

One more (at a time, so that each has an effect before the next) when work waits while nobody is free; one less when
somebody has been free for a while.
"""

from __future__ import annotations

WAITED = 1.0
"""Age in seconds of the oldest runnable row that asks for another process."""
FREE_FOR = 10.0
"""Seconds in which somebody was free all the time, after which a process too many ends."""


class Autoscale:
    """The policy for one queue: between `least` and `most` processes."""

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._free_since: float | None = None

    def next(self, now: float, wanted: int, serving: int, free: int, oldest: float | None) -> int:
        """Return how many processes there should be.

        now      seconds of a clock that never goes back
        wanted   how many there should be so far; serving: how many there are; free: how many of those sleep
        oldest   age in seconds of the oldest runnable row, None when none waits
        """
        held = min(max(wanted, self._least), self._most)
        if held != wanted:
            return held
        if free:
            if self._free_since is None:
                self._free_since = now
            if now - self._free_since >= FREE_FOR and wanted > self._least:
                self._free_since = now
                return wanted - 1
            return wanted
        self._free_since = None
        late = oldest is not None and oldest > WAITED
        # Those asked for before must have begun to help.
        return wanted + 1 if late and serving >= wanted and wanted < self._most else wanted
