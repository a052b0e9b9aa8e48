"""What a producer knows of the limit rows: names and weights are checked against them before anything is written.

The rows are read on the connection of the write itself, at most once in a few seconds, and again before a name is
called unknown. Limits that the app was configured with and that are missing are stored there too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from durable.errors import ValidationError
from durable.instance import NewInstance
from durable.limits import ConcurrencyLimit, RateLimit, checked_limits, name_of
from durable.storage import limits
from durable.storage.limits import CONCURRENCY, RATE, Limit, LimitRow
from durable.storage.session import Operation, T
from durable.validation import near

FRESH = 5.0
"""Seconds for which rows that were read are taken as they are."""


class LimitRows:
    """The limit rows as one process sees them; any thread may ask. Raises ConfigError for what is no limit."""

    def __init__(
        self,
        rate_limits: Mapping[str, RateLimit] | None = None,
        concurrency_limits: Mapping[str, ConcurrencyLimit] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        rates = checked_limits(rate_limits, RateLimit, "rate_limits")
        gates = checked_limits(concurrency_limits, ConcurrencyLimit, "concurrency_limits")
        self.configured: dict[tuple[str, str], Limit] = {
            **{(RATE, name): limit for name, limit in rates.items()},
            **{(CONCURRENCY, name): limit for name, limit in gates.items()},
        }
        self._clock = clock
        self._rows: dict[tuple[str, str], LimitRow] = {}
        self._read_at = float("-inf")

    def declare(self) -> Operation[dict[str, int]]:
        """Store the configured limits, but not over those that were set by hand. Needs a transaction.

        Returns how many rows came out of lanes of limits that changed, per queue.
        """
        return (yield from limits.put(self.configured)) if self.configured else {}

    def before(self, batch: Iterable[NewInstance], write: Operation[T]) -> Operation[T]:
        """Check the limits of rows, then write. Raises ValidationError; nothing is written then."""
        yield from self.check_rows(batch)
        return (yield from write)

    def check_rows(self, batch: Iterable[NewInstance]) -> Operation[None]:
        """`check` for rows to insert; the configured gates of their keys are stored too."""
        draws: list[tuple[str, int]] = []
        gated = False
        for new in batch:
            if new.rate_limit is not None:
                draws.append((new.rate_limit, new.weight))
            if new.concurrency_key is not None:
                gated = gated or (CONCURRENCY, name_of(new.concurrency_key)) in self.configured
        if gated and self._clock() - self._read_at > FRESH:
            yield from self._read()
        yield from self.check(draws)

    def check(self, draws: Iterable[tuple[str, int]]) -> Operation[None]:
        """Check buckets and how much is drawn from each. Raises ValidationError for an unknown name or weight."""
        for bucket, weight in dict.fromkeys(draws):
            name = name_of(bucket)
            if self._clock() - self._read_at > FRESH or not self._allows(name, weight):
                yield from self._read()
            row = self._rows.get((RATE, name))
            if row is None:
                known = [known for kind, known in self._rows if kind == RATE]
                raise ValidationError(
                    f"no rate limit is called {name!r} (the app's rate_limits={{...}} or `durable limits set` make one)"
                    f"{near(name, known)}"
                )
            if not self._allows(name, weight):
                raise ValidationError(f"weight {weight} is more than the burst of rate limit {name!r}, {row.burst}")

    def _allows(self, name: str, weight: int) -> bool:
        row = self._rows.get((RATE, name))
        return row is not None and weight <= (row.burst or 0)

    def _read(self) -> Operation[None]:
        rows = yield from limits.read()
        there = {(row.kind, row.name): row for row in rows}
        if not self.configured.keys() <= there.keys():
            yield from limits.put({key: limit for key, limit in self.configured.items() if key not in there})
            rows = yield from limits.read()
            there = {(row.kind, row.name): row for row in rows}
        self._rows = there
        self._read_at = self._clock()
