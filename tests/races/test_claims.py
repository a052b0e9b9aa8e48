"""Claimers against each other, and against whatever else moves rows at the same moment.

A claim waits for nothing but its own worker's lease, so that is where these tests hold it: its statement has begun and
seen the table, and picks and locks its rows only after others have changed them.
"""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from durable.instance import Claimed
from durable.storage import claims, signals
from tests.fix_rows import Rows, Session, done
from tests.interleaving import GO, Held, delivering, flush, going_on, wait_blocked


def claiming(session: Session, worker: int, limit: int, suspects: bool) -> list[Claimed]:
    if suspects:
        return session.run(claims.claim_suspect(worker, "default", []))
    return session.claim(worker, limit)


class HeldClaim:
    """A claim whose statement has begun, and waits for its worker's lease."""

    def __init__(self, rows: Rows, worker: int, suspects: bool = False) -> None:
        claimer = rows.other()
        self._keeper = rows.other()
        self._keeper.connection.execute("BEGIN")
        self._keeper.fetch("SELECT FROM {schema}.workers WHERE id = %s FOR UPDATE", [worker])
        self._going: Future[list[Claimed]] = rows.background(lambda: claiming(claimer, worker, 10, suspects))
        wait_blocked(rows, claimer, self._going)

    def go_on(self) -> list[Claimed]:
        """What it claims."""
        self._keeper.connection.execute("ROLLBACK")
        return self._going.result(20)


@pytest.mark.parametrize("suspects", [False, True], ids=["claim", "claim_suspect"])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_two_claimers_at_once_neither_share_a_row_nor_wait(rows: Rows, suspects: bool, end: str) -> None:
    ids = rows.insert(3)
    rows.fetch("UPDATE {schema}.instances SET crashes = %s", [int(suspects)])
    one, two = rows.worker(), rows.worker()
    first, second = rows.other(), rows.other()
    first.connection.execute("BEGIN")
    theirs = claiming(first, one, 2, suspects)
    second.connection.execute("BEGIN")
    second.fetch("SET LOCAL lock_timeout = '1ms'")  # to wait for anything is an error
    mine = claiming(second, two, 10, suspects)
    taken = [row.id for row in (*theirs, *mine)]
    assert taken == ids[: len(taken)]
    assert len(taken) == (2 if suspects else 3)
    first.connection.execute("COMMIT" if end == "commit" else "ROLLBACK")
    second.connection.execute("COMMIT")
    assert rows.run(claims.held(two)) == {row.id: 1 for row in mine}
    assert rows.run(claims.held(one)) == ({row.id: 1 for row in theirs} if end == "commit" else {})


@pytest.mark.parametrize("suspects", [False, True], ids=["claim", "claim_suspect"])
def test_a_claim_that_saw_rows_before_another_took_them_does_not_take_them_too(rows: Rows, suspects: bool) -> None:
    first, second = rows.insert(2)
    rows.fetch("UPDATE {schema}.instances SET crashes = %s", [int(suspects)])
    one, two = rows.worker(), rows.worker()
    held = HeldClaim(rows, one, suspects)
    (theirs,) = claiming(rows, two, 1, suspects)
    assert theirs.id == first
    late = held.go_on()
    assert [row.id for row in late] == [second]
    assert rows.run(claims.held(two)) == {first: 1}
    assert rows.run(claims.held(one)) == {row.id: 1 for row in late}
    assert flush(rows, two, done(theirs)).committed == {first}


@pytest.mark.parametrize("change", ["a step", "an end", "a cancel", "a hand-back", "a signal", "a retry"])
def test_a_claim_that_saw_an_older_row_never_runs_it_as_it_was(rows: Rows, change: str) -> None:
    """It leaves the row to the next look, for which the change notifies."""
    (instance,) = rows.insert()
    one, two = rows.worker(), rows.worker()
    held = HeldClaim(rows, one)
    if change == "a signal":
        assert rows.atomically(delivering(instance)).ready == {"default": 1}, "whoever was just looking is woken"
    elif change == "a cancel":
        assert rows.cancel(instance)
    else:
        (row,) = rows.claim(two)
        if change == "a hand-back":
            rows.release(two, row)
        elif change == "an end":
            flush(rows, two, done(row))
        elif change == "a retry":
            flush(rows, two, claims.Commit(row, "runnable", attempt=1, delay=0.0))
        else:
            flush(rows, two, going_on(row, state=GO))
    now = rows.live(instance)
    assert held.go_on() == [], "it is left to the next look"
    late = rows.claim(one)
    if change in ("an end", "a cancel"):
        assert late == []
        return
    (claimed,) = late
    assert now is not None
    assert (claimed.version, claimed.step, claimed.state, claimed.attempt, claimed.inbox, claimed.token) == (
        now["version"],
        now["step"],
        now["state"],
        now["attempt"],
        now["inbox"],
        now["token"] + 1,
    )
    assert flush(rows, one, done(claimed)).committed == {instance}


# Signals in an open transaction


def test_a_delivery_in_an_open_transaction_hides_its_target_only_until_it_ends(rows: Rows) -> None:
    """Its lock is stronger than a foreign key's (docs/decisions.md, 12): skipped, never waited for, not lost."""
    target, neighbour = rows.insert(2)
    one, two = rows.worker(), rows.worker()
    for end in ("rollback", "commit"):
        held = Held(rows.other(), delivering(target)).until(None)
        claimer = rows.other()
        claimer.fetch("SET lock_timeout = '1ms'")
        found = claimer.claim(one)
        assert [row.id for row in found] == [neighbour], "its neighbours are claimed"
        if end == "rollback":
            held.rollback()
            rows.release(one, *found)
            (claimed,) = rows.claim(two, 1)
            assert (claimed.id, claimed.inbox) == (target, None)
            rows.release(two, claimed)
        else:
            assert held.commit().ready == {"default": 1}, "its commit wakes whoever passed by"
            (claimed,) = rows.claim(two)
            (signal,) = rows.run(signals.inbox([target]))[target]
            assert (claimed.id, claimed.inbox) == (target, signal.id)


def test_a_bare_insert_of_a_signal_hides_nothing(rows: Rows) -> None:
    """No foreign key touches the instances, so that a row in the signals table locks no target."""
    (instance,) = rows.insert()
    other = rows.other()
    other.connection.execute("BEGIN")
    other.fetch("INSERT INTO {schema}.signals (target_id, name) VALUES (%s, 'go')", [instance])
    (claimed,) = rows.claim(rows.worker())
    assert claimed.id == instance
    other.connection.execute("COMMIT")
