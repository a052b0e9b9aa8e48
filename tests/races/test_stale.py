"""An outcome of any kind whose claim was taken away: it waits for the thief, is told so, and changes nothing.

The row in question is a child that its parent waits for, and holds signals that its step was shown: so that a status,
a step, a signal, a counter or a child that changed all the same would be seen.
"""

from __future__ import annotations

from typing import Any

import pytest

from durable.instance import Claimed
from durable.storage import claims, instances, signals, workers
from durable.storage.session import Operation
from tests.fix_rows import HEAD, Rows, done
from tests.interleaving import (
    OUTCOMES,
    Held,
    delivering,
    everything,
    family,
    flush,
    flushing,
    going_on,
    handed,
    inbox,
    spawning,
    wait_blocked,
)

every_kind = pytest.mark.parametrize("kind", OUTCOMES)


def subject(rows: Rows, worker: int) -> tuple[Claimed, list[int]]:
    """A claimed child of a waiting parent, and the ids of the signals in its inbox."""
    (parent,) = rows.claimed(worker)
    flush(rows, worker, spawning(parent, 1))
    (child,) = rows.fetch("SELECT id FROM {schema}.instances WHERE parent_id = %s", [parent.id])
    rows.atomically(delivering(child["id"], child["id"]))
    (claimed,) = rows.claim(worker, 1, "kids")
    shown = [signal.id for signal in rows.run(signals.inbox([claimed.id]))[claimed.id]]
    assert len(shown) == 2
    return claimed, shown


def theft(rows: Rows, how: str, worker: int, claimed: Claimed) -> Operation[Any]:
    """The operation that takes the row away; what must have happened before is done here."""
    pairs = [(claimed.id, claimed.token)]
    if how == "reaped":
        return workers.reclaim(worker, None, 3, "it died")
    if how == "failed by the reaper":
        return workers.reclaim(worker, None, 1, "it died")
    if how == "handed back":
        return claims.release(worker, pairs)
    if how == "expired":
        return claims.expire(worker, pairs)
    rows.reclaim(worker, [])
    thief = rows.worker()
    if how == "claimed again":
        return claims.claim(thief, "kids", 10, HEAD, 32767, [])
    (again,) = rows.claim(thief, 10, "kids")
    assert (again.id, again.token) == (claimed.id, claimed.token + 1)
    if how == "gone on elsewhere":
        return flushing(thief, going_on(again))
    assert how == "finished elsewhere"
    return flushing(thief, done(again))


@every_kind
@pytest.mark.parametrize(
    "how",
    [
        "reaped",
        "failed by the reaper",
        "handed back",
        "expired",
        "claimed again",
        "gone on elsewhere",
        "finished elsewhere",
    ],
)
def test_an_outcome_of_any_kind_waits_for_the_thief_of_its_row_and_then_changes_nothing(
    rows: Rows, kind: str, how: str
) -> None:
    worker, owner, watcher = rows.worker(), rows.other(), rows.other()
    claimed, shown = subject(rows, worker)
    thief = Held(rows, theft(rows, how, worker, claimed)).until(None)
    late = rows.background(lambda: flush(owner, worker, OUTCOMES[kind](claimed, shown)))
    wait_blocked(watcher, owner, late)
    after_the_theft = everything(rows)
    thief.commit()
    flushed = late.result(20)
    assert (flushed.committed, flushed.ready, flushed.ended, flushed.inboxes) == (set(), {}, set(), {})
    assert everything(rows) == after_the_theft


@every_kind
def test_the_run_that_took_over_stands_and_ends_as_if_nobody_else_had_been_there(rows: Rows, kind: str) -> None:
    worker, owner, watcher = rows.worker(), rows.other(), rows.other()
    claimed, shown = subject(rows, worker)
    rows.reclaim(worker, [])
    thief = rows.worker()
    claim = Held(rows, claims.claim(thief, "kids", 10, HEAD, 32767, [])).until(None)
    late = rows.background(lambda: flush(owner, worker, OUTCOMES[kind](claimed, shown)))
    wait_blocked(watcher, owner, late)
    (again,) = claim.commit()
    assert late.result(20).committed == set()
    assert (again.version, again.step, again.attempt, again.inbox) == (0, claimed.step, 0, max(shown))
    assert inbox(rows, claimed.id) == 2
    assert flush(rows, thief, done(again)).ready == {"default": 1}, "its parent was counted once, by this end"
    assert rows.status(claimed.id) == "done"
    (parent,) = rows.fetch("SELECT status::text, children_pending AS n FROM {schema}.instances")
    assert parent == {"status": "runnable", "n": 0}


def test_a_mixed_batch_waits_for_those_taken_away_and_makes_riders_only_for_the_others(rows: Rows) -> None:
    """One of each kind is taken away while the flush waits; its twin of the same kind commits."""
    worker, owner, watcher = rows.worker(), rows.other(), rows.other()
    kinds = list(OUTCOMES)
    taken, kept = rows.claimed(worker, len(kinds)), rows.claimed(worker, len(kinds))
    parent, children = family(rows, worker, 3)
    everyone = [row.id for row in (*taken, *kept)]
    rows.atomically(delivering(*everyone))
    taken, kept = handed(rows, *taken), handed(rows, *kept)
    commits = [
        OUTCOMES[kind](row, [signal.id for signal in row.signals])
        for group in (taken, kept)
        for kind, row in zip(kinds, group, strict=True)
    ]
    lost = [(row.id, row.token) for row in (*taken, children[0])]
    thief = Held(rows, claims.release(worker, lost)).until(None)
    late = rows.background(lambda: flush(owner, worker, *commits, *map(done, children)))
    wait_blocked(watcher, owner, late)
    untouched = {row.id: rows.live(row.id) for row in (*taken, children[0])}
    thief.commit()
    flushed = late.result(20)

    assert flushed.committed == {row.id for row in (*kept, *children[1:])}
    assert {row.id: rows.live(row.id) for row in (*taken, children[0])} == untouched
    assert [inbox(rows, row.id) for row in taken] == [1] * len(kinds)
    by_kind = dict(zip(kinds, kept, strict=True))
    gone = {kind for kind, row in by_kind.items() if inbox(rows, row.id) == 0}
    assert gone == {"done", "done, key kept", "cancel", "next", "next later", "inline hop"}, "failed ones keep theirs"
    spawned = rows.fetch("SELECT DISTINCT parent_id FROM {schema}.instances WHERE parent_id IS NOT NULL ORDER BY 1")
    assert [row["parent_id"] for row in spawned] == sorted([by_kind["children"].id, parent])
    # Two retries and steps at once, a park that was woken, a parent without children; and two children.
    assert flushed.ready == {"default": 4, "kids": 2}
    row = rows.live(parent)
    assert row is not None
    assert (row["status"], row["children_pending"]) == ("awaiting_children", 1)


@pytest.mark.parametrize("first", ["thief", "owner"])
def test_of_an_inline_hop_and_a_reaper_one_wins_and_the_hop_keeps_its_claim_only_if_it_does(
    rows: Rows, first: str
) -> None:
    worker, owner, reaper = rows.worker(), rows.other(), rows.other()
    (claimed,) = rows.claimed(worker)
    hop = OUTCOMES["inline hop"](claimed, [])
    if first == "owner":
        held = Held(owner, flushing(worker, hop)).until(None)
        assert reaper.atomically(workers.reclaim(worker, None, 3, "it died")).ids == [], "its outcome is committing"
        assert held.commit().committed == {claimed.id}
        row = rows.live(claimed.id)
        assert row is not None
        assert (row["status"], row["step"], row["token"], row["version"]) == ("executing", "more", 1, 1)
        assert reaper.atomically(workers.reclaim(worker, None, 3, "it died")).ids == [claimed.id]
        assert flush(owner, worker, done(hop.next_claim(False))).committed == set()
    else:
        held = Held(reaper, workers.reclaim(worker, None, 3, "it died")).until(None)
        late = rows.background(lambda: flush(owner, worker, hop))
        wait_blocked(rows, owner, late)
        held.commit()
        assert late.result(20).committed == set()
    row = rows.live(claimed.id)
    assert row is not None
    assert (row["status"], row["crashes"], row["attempt"]) == ("runnable", 1, 0)
    assert row["step"] == ("more" if first == "owner" else claimed.step)


@every_kind
@pytest.mark.parametrize("first", ["cancel", "outcome"])
def test_a_cascade_from_the_parent_and_an_outcome_of_its_child_in_both_orders(
    rows: Rows, kind: str, first: str
) -> None:
    worker, owner, canceller = rows.worker(), rows.other(), rows.other()
    claimed, shown = subject(rows, worker)
    (parent,) = rows.fetch("SELECT parent_id AS id FROM {schema}.instances WHERE id = %s", [claimed.id])
    outcome = OUTCOMES[kind](claimed, shown)
    if first == "cancel":
        held = Held(canceller, instances.cancel(parent["id"], "enough", True)).until(None)
        second = rows.background(lambda: flush(owner, worker, outcome))
        wait_blocked(rows, owner, second)
        assert held.commit().found is True
        assert second.result(20).committed == {claimed.id}
        assert rows.status(claimed.id) == "cancelled"
        assert rows.fetch("SELECT id FROM {schema}.instances") == []
    else:
        held = Held(owner, flushing(worker, outcome)).until(None)
        cancelling = rows.background(lambda: canceller.atomically(instances.cancel(parent["id"], "enough", True)))
        wait_blocked(rows, canceller, cancelling)
        assert held.commit().committed == {claimed.id}
        assert cancelling.result(20).found is True
        over = {"done": "done", "done, key kept": "done", "failed": "failed", "stop": "failed", "cancel": "cancelled"}
        if kind == "inline hop":
            assert rows.status(claimed.id) == "executing", "asked to end with its next commit"
            flush(rows, worker, done(outcome.next_claim(False)))
        assert rows.status(claimed.id) == over.get(kind, "cancelled")
    assert rows.status(parent["id"]) == "cancelled"


def test_children_of_a_parent_that_is_forgotten_end_as_ever(rows: Rows) -> None:
    """Cancelled without them, and its history gone: nobody waits for them any more."""
    worker = rows.worker()
    parent, children = family(rows, worker)
    assert rows.cancel(parent)
    rows.fetch("DELETE FROM {schema}.history WHERE id = %s", [parent])
    flushed = flush(rows, worker, *map(done, children))
    assert (flushed.committed, flushed.ready) == ({row.id for row in children}, {})
    assert [rows.status(row.id) for row in children] == ["done", "done"]
