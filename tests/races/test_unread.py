"""A signal and the end of its target, in both orders: what was accepted is there, what came too late was refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from durable.instance import Claimed
from durable.storage.claims import Commit
from tests.fix_rows import Rows
from tests.interleaving import ERROR, Held, delivering, flush, flushing, wait_blocked
from tests.interleaving import OUTCOMES as BY_KIND

ENDS = ("done", "done, key kept", "failed", "cancel")


def target(rows: Rows, worker: int, kind: str) -> Claimed:
    kept: dict[str, Any] = {"correlation_key": "k", "correlation_scope": ("done",)} if "kept" in kind else {}
    (claimed,) = rows.claimed(worker, **kept)
    return claimed


def kept_signals(rows: Rows, instance: int) -> list[str]:
    found = rows.fetch("SELECT name FROM {schema}.signals WHERE target_id = %s ORDER BY id", [instance])
    return [row["name"] for row in found]


@pytest.mark.parametrize("kind", ENDS)
def test_end_that_waits_for_a_delivery_keeps_it(rows: Rows, kind: str) -> None:
    worker, other, third = rows.worker(), rows.other(), rows.other()
    claimed = target(rows, worker, kind)
    delivery = Held(other, delivering(claimed.id)).until(None)
    end = rows.background(lambda: flush(third, worker, BY_KIND[kind](claimed, ())))
    wait_blocked(rows, third, end)
    assert delivery.commit().stored == [True]
    flushed = end.result(10)
    assert (flushed.committed, flushed.unread) == ({claimed.id}, {claimed.id: {"go": 1}})
    assert kept_signals(rows, claimed.id) == ["go"]
    ended = rows.history(claimed.id) or rows.live(claimed.id)
    assert ended is not None
    assert ended["inbox"] > (ended["signals_seen"] or 0)


@pytest.mark.parametrize("kind", ENDS)
def test_delivery_that_waits_for_an_end_is_refused(rows: Rows, kind: str) -> None:
    worker, other, third = rows.worker(), rows.other(), rows.other()
    claimed = target(rows, worker, kind)
    end = Held(other, flushing(worker, BY_KIND[kind](claimed, ()))).until(None)
    delivery = rows.background(lambda: third.atomically(delivering(claimed.id)))
    wait_blocked(rows, third, delivery)
    end.commit()
    assert delivery.result(10).stored == [None]
    assert kept_signals(rows, claimed.id) == []


@pytest.mark.parametrize("status", ["done", "failed"])
def test_rerun_decides_under_the_lock(rows: Rows, status: str) -> None:
    worker, other, third = rows.worker(), rows.other(), rows.other()
    claimed, quiet = rows.claimed(worker, 2)
    ends = [Commit(row, status, error=ERROR if status == "failed" else None, rerun=True) for row in (claimed, quiet)]

    late = Held(other, flushing(worker, *ends)).until("sent_meanwhile")
    delivery = rows.background(lambda: third.atomically(delivering(claimed.id)))
    wait_blocked(rows, third, delivery)  # the rows are locked before it is asked who has signals
    late.rollback()
    assert delivery.result(10).stored == [True]

    flushed = flush(rows, worker, *ends)
    assert (flushed.committed, flushed.rerun) == ({claimed.id, quiet.id}, {claimed.id: 1})
    assert (rows.status(claimed.id), rows.status(quiet.id)) == ("runnable", status)
    (again,) = rows.claim(worker)
    assert (again.attempt, again.version, again.seen) == (claimed.attempt, 1, again.inbox)
    flush(rows, worker, replace(ends[0], claimed=again))
    assert rows.status(claimed.id) == status


def test_rerun_that_waits_for_a_delivery_runs_again(rows: Rows) -> None:
    worker, other, third = rows.worker(), rows.other(), rows.other()
    (claimed,) = rows.claimed(worker)
    delivery = Held(other, delivering(claimed.id)).until(None)
    end = rows.background(lambda: flush(third, worker, Commit(claimed, "done", rerun=True)))
    wait_blocked(rows, third, end)
    delivery.commit()
    assert end.result(10).rerun == {claimed.id: 1}
    assert rows.status(claimed.id) == "runnable"


def test_stale_end_runs_nothing_again(rows: Rows) -> None:
    worker, thief = rows.worker(), rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.atomically(delivering(claimed.id))
    rows.bury(worker)
    rows.reclaim(worker, [])
    (stolen,) = rows.claim(thief)
    flushed = flush(rows, worker, Commit(claimed, "done", rerun=True))
    assert flushed.committed == set()
    assert rows.status(stolen.id) == "executing"


def test_plain_ends_ask_nothing_about_signals(rows: Rows) -> None:
    worker = rows.worker()
    names = []
    held = Held(rows.other(), flushing(worker, *[Commit(row, "done") for row in rows.claimed(worker, 3)]))
    while (name := held.step()) is not None:
        names.append(name)
    held.commit()
    assert names == ["finish"]
