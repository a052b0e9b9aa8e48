"""Full-jitter backoff for a database that is away."""

from __future__ import annotations

import random


class Backoff:
    """Waits of random length, below a bound that doubles up to `most` seconds."""

    def __init__(self, first: float = 0.1, most: float = 5.0) -> None:
        self._first = first
        self._most = most
        self._bound = first

    def next(self) -> float:
        """Return the next wait in seconds."""
        wait = random.uniform(0, self._bound)  # noqa: S311 - spreads a herd, no secret
        self._bound = min(self._bound * 2, self._most)
        return wait

    def reset(self) -> None:
        """Start again at the shortest waits, after a success."""
        self._bound = self._first
