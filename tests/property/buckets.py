"""Token buckets: claims through the shipped SQL, while the clock does as it likes, against the formula on paper."""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from durable import RateLimit
from durable.storage import instances, lanes, limits, testing
from tests.fix_rows import Rows, done, new
from tests.property.specs import events

HOUR = 3600
TEN_YEARS = 10 * 366 * 24 * HOUR
SLACK = 600.0
"""Seconds that an example really takes at most; a token takes an hour, so that they don't matter."""
_LEAPS = st.one_of(
    st.just(0),
    st.integers(1, 20).map(lambda n: n * HOUR // 2),
    st.sampled_from([HOUR, 2 * HOUR, TEN_YEARS, TEN_YEARS, -HOUR, -TEN_YEARS]),
)
_EVENTS = [
    (1, "arrive", {"weights": st.lists(st.integers(1, 3), min_size=1, max_size=4), "together": st.booleans()}),
    (2, "claim_after", {"seconds": _LEAPS, "sweeps": st.booleans(), "ends": st.booleans()}),
]


class Buckets(RuleBasedStateMachine):
    """One bucket, of which a token comes back per hour.

    missing  seconds until each shard is full. A bucket that nobody has used is, whatever the clock did before
    level    the leaky bucket: what was granted and has not leaked away. A clock that goes back leaks nothing
    """

    rows: ClassVar[Rows]

    @initialize(burst=st.integers(1, 6), shards=st.integers(1, 3), allowed=st.integers(1, 3))
    def begin(self, burst: int, shards: int, allowed: int) -> None:
        self.rows.atomically(testing.wipe())
        self.burst, self.shards = burst, min(burst, shards)
        limit = RateLimit(allowed, allowed * HOUR, burst, self.shards)
        self.rows.atomically(limits.put({("rate", "mail"): limit}))
        self.worker = self.rows.worker()
        self.waiting: list[tuple[int, int]] = []
        self.missing = [0.0] * self.shards
        self.level = 0.0

    @rule(event=events(_EVENTS))
    def then(self, event: tuple[str, dict[str, Any]]) -> None:
        name, given = event
        getattr(self, name)(**given)

    def arrive(self, weights: list[int], together: bool) -> None:
        batch = [new(rate_limit="mail", weight=min(weight, self.burst)) for weight in weights]
        if together:
            ids: list[Any] = self.rows.atomically(instances.insert_many(batch))
        else:
            ids = [self.rows.run(instances.insert(row)) for row in batch]
        self.waiting += [(instance_id, row.weight) for instance_id, row in zip(ids, batch, strict=True)]

    def clock_moves(self, seconds: int) -> None:
        self.rows.fetch(
            "UPDATE {schema}.buckets SET full_at = full_at - make_interval(secs => %s),"
            " opens_at = opens_at - make_interval(secs => %s)",
            [seconds, seconds],
        )
        used = bool(self.rows.fetch("SELECT FROM {schema}.buckets"))
        self.missing = [missing - seconds for missing in self.missing] if used else [0.0] * self.shards
        self.level = max(0.0, self.level - max(0, seconds) / HOUR)

    def claim_after(self, seconds: int, sweeps: bool, ends: bool) -> None:
        """Who goes is who has the tokens, in order; the first who has not holds up all behind."""
        self.clock_moves(seconds)
        if sweeps:
            self.rows.run(lanes.sweep())
        foretold = []
        for instance_id, weight in self.waiting:
            if sum(map(self.tokens, range(self.shards))) < weight:
                break
            foretold.append(instance_id)
            self.take(weight)
            self.level += weight
        admitted = self.rows.claim_limited(self.worker, slots=100)
        assert [row.id for row in admitted.rows] == foretold
        assert self.level <= self.burst + 1e-9, "more was granted than leaks away"
        self.waiting = self.waiting[len(foretold) :]
        if ends:
            self.rows.flush(self.worker, *map(done, admitted.rows))
        if self.waiting and self.shards == 1:
            opens_in = self.missing[0] - (self.burst - self.waiting[0][1]) * HOUR
            assert self.opens_in() < opens_in + SLACK, "its turn is missed; a look that comes early only finds nothing"

    def opens_in(self) -> float:
        """Seconds until the lane opens, as it is stored."""
        (row,) = self.rows.fetch(
            "SELECT extract(epoch FROM opens_at - clock_timestamp())::float8 AS seconds FROM {schema}.buckets"
        )
        return float(row["seconds"])

    def size(self, shard: int) -> int:
        return self.burst // self.shards + (shard < self.burst % self.shards)

    def tokens(self, shard: int) -> int:
        """Whole ones; a shard's token takes as many hours as there are shards."""
        token = HOUR * self.shards
        return max(0, int((self.size(shard) * token - max(0.0, self.missing[shard])) // token))

    def take(self, weight: int) -> None:
        for shard in sorted(range(self.shards), key=self.tokens, reverse=True):
            part = min(weight, self.tokens(shard))
            weight -= part
            if part:
                self.missing[shard] = max(0.0, self.missing[shard]) + part * HOUR * self.shards

    @invariant()
    def every_number_is_finite(self) -> None:
        assert not self.rows.fetch(
            "SELECT FROM {schema}.buckets WHERE NOT isfinite(full_at) OR NOT isfinite(coalesce(opens_at, 'epoch'))"
        )
