"""Gates: slots drawn and given back through the shipped SQL, while their limit changes, against plain counting."""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from durable import ConcurrencyLimit
from durable.instance import Claimed
from durable.storage import instances, lanes, limits, testing
from durable.storage.claims import Commit
from tests.fix_rows import Rows, done, new
from tests.property.specs import events

KEY = "vendor:7"
_ENDS = st.sampled_from(["done", "retry", "release"])
_EVENTS = [
    (3, "arrive", {"count": st.integers(1, 4), "together": st.booleans()}),
    (2, "change", {"limit": st.integers(1, 5), "shards": st.integers(1, 3)}),
    (1, "drop", {}),
    (4, "claim", {"most": st.sampled_from([1, 2, 100, 100])}),
    (3, "end", {"picks": st.sets(st.integers(0, 9), min_size=1, max_size=3), "how": _ENDS}),
    (1, "die", {}),
    (1, "cancel", {"pick": st.integers(0, 9)}),
    (1, "sweep", {}),
]


class Gates(RuleBasedStateMachine):
    """One key, and what holds its slots. Without a limit of its name one may execute."""

    rows: ClassVar[Rows]

    @initialize()
    def begin(self) -> None:
        self.rows.atomically(testing.wipe())
        self.rows.atomically(limits.drop("concurrency", "vendor"))
        self.worker = self.rows.worker()
        self.limit: int | None = None
        self.executing: dict[int, Claimed] = {}

    @rule(event=events(_EVENTS))
    def then(self, event: tuple[str, dict[str, Any]]) -> None:
        name, given = event
        getattr(self, name)(**given)

    def arrive(self, count: int, together: bool) -> None:
        batch = [new(concurrency_key=KEY) for _ in range(count)]
        if together:
            self.rows.atomically(instances.insert_many(batch))
        else:
            for row in batch:
                self.rows.run(instances.insert(row))

    def change(self, limit: int, shards: int) -> None:
        self.limit = limit
        self.rows.atomically(limits.put({("concurrency", "vendor"): ConcurrencyLimit(limit, min(limit, shards))}))

    def drop(self) -> None:
        self.limit = None
        self.rows.atomically(limits.drop("concurrency", "vendor"))

    def claim(self, most: int) -> None:
        """As many go as there is room for, the best first."""
        room = max(0, (self.limit or 1) - len(self.executing))
        waiting = self.waiting()
        admitted = self.rows.claim_limited(self.worker, most).rows
        assert [row.id for row in admitted] == waiting[: min(most, room)]
        self.executing |= {row.id: row for row in admitted}

    def waiting(self) -> list[int]:
        found = self.rows.fetch(
            "SELECT id FROM {schema}.instances WHERE status = 'runnable' ORDER BY priority, eligible_at, id"
        )
        return [row["id"] for row in found]

    def end(self, picks: set[int], how: str) -> None:
        """Slots come back with what held them; a second outcome of the same claim is stale and gives nothing back."""
        ids = sorted({sorted(self.executing)[pick % len(self.executing)] for pick in picks if self.executing})
        ended = [self.executing.pop(instance_id) for instance_id in ids]
        if how == "release":
            self.rows.release(self.worker, *ended)
            return
        commits = [done(row) if how == "done" else Commit(row, "runnable", attempt=1, delay=0.0) for row in ended]
        assert self.rows.flush(self.worker, *commits) == set(ids)
        assert self.rows.flush(self.worker, *commits) == set()

    def die(self) -> None:
        """Everything goes back at once."""
        self.rows.bury(self.worker)
        assert sorted(self.rows.reclaim(self.worker, []).ids) == sorted(self.executing)
        self.executing.clear()
        self.worker = self.rows.worker()

    def cancel(self, pick: int) -> None:
        """One that waits goes; whoever was behind it in its lane does not wait for it."""
        waiting = self.waiting()
        assert not waiting or self.rows.cancel(waiting[pick % len(waiting)])

    def sweep(self) -> None:
        self.rows.run(lanes.sweep())

    @invariant()
    def slots_are_neither_lost_nor_made(self) -> None:
        used = self.rows.fetch("SELECT shard, used, capacity FROM {schema}.gates WHERE key = %s", [KEY])
        held = self.rows.fetch(
            "SELECT gate_shard AS shard, count(*) AS n FROM {schema}.instances"
            " WHERE status = 'executing' AND gate_shard IS NOT NULL GROUP BY 1"
        )
        assert {row["shard"]: row["used"] for row in used if row["used"]} == {row["shard"]: row["n"] for row in held}
        assert all(0 <= row["used"] <= row["capacity"] for row in used)
