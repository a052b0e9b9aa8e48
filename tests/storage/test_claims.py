"""Claiming: which rows, in which order, for whom, and what it leaves in the row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from durable.runtime.link import Link
from durable.runtime.picker import HIGHEST, LOWEST, RESCAN_EVERY, TRAIL, Picker
from durable.storage import claims
from tests.fix_rows import HEAD, Rows, done


def ids(claimed: Any) -> list[int]:
    return [row.id for row in claimed]


def test_a_claim_marks_the_row_and_raises_its_token(rows: Rows) -> None:
    worker = rows.worker()
    (instance,) = rows.insert(correlation_key="k", max_attempts=5, priority=2, step="run", machine_version=3)
    rows.fetch("UPDATE {schema}.instances SET reason = 'handed back', version = 4, attempt = 2")
    (claimed,) = rows.claim(worker)
    row = rows.live(instance)
    assert row is not None
    assert (row["status"], row["worker_id"], row["token"], row["version"]) == ("executing", worker, 1, 4)
    assert row["reason"] is None
    assert (claimed.id, claimed.token, claimed.version, claimed.attempt) == (instance, 1, 4, 2)
    assert (claimed.machine, claimed.machine_version, claimed.step) == ("task", 3, "run")
    assert (claimed.priority, claimed.max_attempts, claimed.correlation_key) == (2, 5, "k")
    assert (claimed.state_type, claimed.state, claimed.queue) == ("json", b"{}", "default")
    assert (claimed.keeps_key, claimed.expired, claimed.eligible_at) == (False, None, row["eligible_at"])
    rows.release(worker, claimed)
    (again,) = rows.claim(worker)
    assert again.token == 2


def test_lower_priority_numbers_run_earlier_and_equal_ones_in_the_order_they_became_runnable(rows: Rows) -> None:
    expected: dict[int, list[int]] = {}
    for priority in (5, 0, -32768, 32767, 0, 5):
        expected.setdefault(priority, []).extend(rows.insert(2, priority=priority))
    worker = rows.worker()
    order = [instance for priority in sorted(expected) for instance in expected[priority]]
    assert ids(rows.claim(worker, 3)) == order[:3]
    assert ids(rows.claim(worker)) == order[3:]


def test_other_queues_and_rows_not_yet_eligible_are_never_claimed(rows: Rows) -> None:
    rows.insert(queue="other")
    rows.insert(delay=60.0)
    (mine,) = rows.insert()
    assert ids(rows.claim(rows.worker())) == [mine]


def test_empty_claim_writes_nothing(rows: Rows) -> None:
    """A process that looks for rows again and again must cost the server no transaction ids and no WAL."""
    worker = rows.worker()
    with rows.connection.transaction():
        assert rows.claim(worker) == []
        assert rows.run(claims.claim_suspect(worker, "default", [])) == []
        assert rows.fetch("SELECT txid_current_if_assigned() AS id") == [{"id": None}]
    rows.insert()
    with rows.connection.transaction():
        assert len(rows.claim(worker)) == 1
        (written,) = rows.fetch("SELECT txid_current_if_assigned() AS id")
        assert written["id"] is not None


@pytest.mark.parametrize("lease", ["expired", "buried", "unknown"])
def test_without_a_live_lease_nothing_is_claimed(rows: Rows, lease: str) -> None:
    (instance,) = rows.insert()
    (suspect,) = rows.insert()
    rows.fetch("UPDATE {schema}.instances SET crashes = 1 WHERE id = %s", [suspect])
    worker = rows.worker(-1.0) if lease == "expired" else rows.worker()
    if lease == "buried":
        rows.bury(worker)
    if lease == "unknown":
        worker += 1000
    assert rows.claim(worker) == []
    assert rows.run(claims.claim_suspect(worker, "default", [])) == []
    assert rows.status(instance) == rows.status(suspect) == "runnable"


def test_machines_a_worker_does_not_know_are_left_to_others(rows: Rows) -> None:
    (known,) = rows.insert(machine="a", machine_version=1)
    (newer,) = rows.insert(machine="a", machine_version=2)
    (other,) = rows.insert(machine="b")
    worker = rows.worker()
    assert ids(rows.claim(worker, unknown=["a:2", "b:1"])) == [known]
    assert ids(rows.claim(worker, unknown=["b:1"])) == [newer]
    assert ids(rows.claim(worker)) == [other]


def test_rows_with_a_crash_behind_them_are_claimed_one_at_a_time_and_apart(rows: Rows) -> None:
    (clean, *suspects) = rows.insert(3)
    rows.fetch("UPDATE {schema}.instances SET crashes = 1 WHERE id = ANY(%s)", [suspects])
    worker = rows.worker()
    assert ids(rows.claim(worker)) == [clean]
    (first,) = rows.run(claims.claim_suspect(worker, "default", []))
    assert (first.id, first.crashes) == (suspects[0], 1)
    assert rows.run(claims.claim_suspect(worker, "default", ["task:1"])) == []
    assert ids(rows.run(claims.claim_suspect(worker, "default", []))) == suspects[1:]
    assert rows.run(claims.claim_suspect(worker, "default", [])) == []


def test_a_row_past_its_expiry_is_claimed_and_says_so(rows: Rows) -> None:
    worker = rows.worker()
    rows.insert(2, expires_in=60.0)
    rows.fetch("UPDATE {schema}.instances SET expires_at = clock_timestamp() WHERE mod(id, 2) = 0")
    assert {row.id % 2: row.expired for row in rows.claim(worker)} == {0: True, 1: False}


def test_an_expired_claim_ends_cancelled_and_says_why(rows: Rows) -> None:
    worker = rows.worker()
    one, two = rows.claimed(worker, 2)
    assert rows.atomically(claims.expire(worker, [(one.id, one.token), (two.id, two.token + 1)])) == {}
    row = rows.history(one.id)
    assert row is not None
    assert (row["status"], row["error"]["type"]) == ("cancelled", "Expired")
    assert rows.status(two.id) == "executing"


def test_a_claim_starts_at_its_position_and_stops_at_its_priority(rows: Rows) -> None:
    first = rows.insert(priority=0)
    (middle,) = rows.insert(priority=1)
    last = rows.insert(priority=2)
    worker = rows.worker()
    row = rows.live(middle)
    assert row is not None
    later = row["eligible_at"] + timedelta(microseconds=1)
    assert rows.run(claims.claim(worker, "default", 10, (1, later), 1, [])) == []
    assert ids(rows.run(claims.claim(worker, "default", 10, (1, row["eligible_at"]), 1, []))) == [middle]
    assert ids(rows.run(claims.claim(worker, "default", 10, (0, HEAD[1]), HIGHEST, []))) == first + last


def test_two_claimers_never_get_the_same_row_and_do_not_wait(rows: Rows) -> None:
    everything = rows.insert(10)
    one, two = rows.worker(), rows.worker()
    other = rows.other()
    with other.connection.transaction():
        theirs = other.claim(one, 4)
        mine = rows.claim(two, 10)
        assert ids(theirs) == everything[:4]
        assert ids(mine) == everything[4:]
    assert rows.claim(two) == []


def test_a_row_that_another_session_locks_for_key_share_is_claimed(rows: Rows) -> None:
    """So a signal's insert, whose foreign key would lock its target so, never hides it from pickers."""
    (instance,) = rows.insert()
    other = rows.other()
    with other.connection.transaction():
        other.fetch("SELECT FROM {schema}.instances WHERE id = %s FOR KEY SHARE", [instance])
        assert ids(rows.claim(rows.worker())) == [instance]


def test_a_claim_does_not_wait_for_the_disk_but_later_commits_do(rows: Rows) -> None:
    rows.insert(2)
    worker = rows.worker()
    rows.claim(worker, 1)
    assert rows.fetch("SHOW synchronous_commit") == [{"synchronous_commit": "on"}]
    with rows.connection.transaction():
        rows.claim(worker, 1)
        assert rows.fetch("SHOW synchronous_commit") == [{"synchronous_commit": "off"}]
    assert rows.fetch("SHOW synchronous_commit") == [{"synchronous_commit": "on"}]


def test_what_a_worker_holds_is_known_by_its_id(rows: Rows) -> None:
    one, two = rows.worker(), rows.worker()
    mine = rows.claimed(one, 3)
    rows.claimed(two, 1)
    rows.flush(one, done(mine[0]))
    assert rows.run(claims.held(one)) == {row.id: row.token for row in mine[1:]}
    assert rows.run(claims.held(12345)) == {}


# Where a picker looks


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class PickerBench:
    """A picker, and the positions of the claims it makes."""

    def __init__(self, rows: Rows, link: Link) -> None:
        self.worker = rows.worker()
        self.clock = Clock()
        self.link = link
        self.picker = Picker(link, "default", self.clock)

    def claim(self, limit: int) -> list[int]:
        return ids(self.picker.claim(self.worker, limit))


@pytest.fixture
def bench(rows: Rows) -> Any:
    link = Link(lambda: rows.dsn, rows.sql, "test", pooler=False, most_wait=1.0, pause=lambda seconds: True)
    yield PickerBench(rows, link)
    link.drop()


def move_before(rows: Rows, instance: int, other: int, by: timedelta) -> None:
    rows.fetch(
        "UPDATE {schema}.instances SET eligible_at = (SELECT eligible_at FROM {schema}.instances WHERE id = %s) - %s"
        " WHERE id = %s",
        [other, by, instance],
    )


def test_a_picker_trails_the_newest_row_it_has_seen(rows: Rows, bench: PickerBench) -> None:
    first = rows.insert(3)
    far, near, newest = rows.insert(3)
    assert bench.claim(2) == first[:2]
    move_before(rows, far, first[0], timedelta(seconds=5))
    move_before(rows, near, first[1], TRAIL / 2)
    assert bench.claim(2) == [near, first[2]], "a row just behind the position is found, one far behind is not"
    bench.clock.now += RESCAN_EVERY
    assert bench.claim(1) == [far], "once a second it looks from the head"
    assert bench.claim(1) == [newest]


@pytest.mark.parametrize("reason", ["told", "short", "empty"])
def test_a_picker_looks_from_the_head_when_there_is_reason_to(rows: Rows, bench: PickerBench, reason: str) -> None:
    first = rows.insert(3)
    (behind,) = rows.insert()
    move_before(rows, behind, first[0], timedelta(seconds=5))
    rows.fetch("UPDATE {schema}.instances SET queue = 'hidden' WHERE id = %s", [behind])
    assert bench.claim(1) == first[:1]
    rows.fetch("UPDATE {schema}.instances SET queue = 'default' WHERE id = %s", [behind])
    if reason == "told":
        bench.picker.rescan()
        assert bench.claim(1) == [behind]
    elif reason == "short":
        assert bench.claim(10) == first[1:]
        assert bench.claim(10) == [behind]
    else:
        assert bench.claim(2) == first[1:]
        assert bench.claim(2) == [behind]


def test_a_picker_takes_the_better_priority_first_from_each_position(rows: Rows, bench: PickerBench) -> None:
    low = rows.insert(4, priority=5)
    high = rows.insert(4, priority=0)
    assert bench.claim(6) == high + low[:2]
    more = rows.insert(2, priority=0)
    assert bench.claim(3) == [*more, low[2]]


def test_a_new_best_priority_waits_for_a_rescan_at_most(rows: Rows, bench: PickerBench) -> None:
    low = rows.insert(4, priority=5)
    assert bench.claim(1) == low[:1]
    (urgent,) = rows.insert(priority=-5)
    assert bench.claim(1) == [low[1]]
    bench.picker.rescan()
    assert bench.claim(1) == [urgent]


def test_a_picker_leaves_machines_it_was_told_to_hide(rows: Rows, bench: PickerBench) -> None:
    (strange,) = rows.insert(machine="strange")
    (known,) = rows.insert()
    bench.picker.hide("strange", 1)
    bench.picker.hide("strange", 1)
    assert bench.claim(10) == [known]
    rows.fetch("UPDATE {schema}.instances SET crashes = 1 WHERE id = %s", [strange])
    assert bench.picker.claim_suspect(bench.worker) == []


def test_a_picker_without_a_lease_gets_nothing_and_keeps_its_place(rows: Rows, bench: PickerBench) -> None:
    instances = rows.insert(2)
    assert bench.claim(1) == instances[:1]
    rows.bury(bench.worker)
    assert bench.claim(1) == []
    bench.worker = rows.worker()
    assert bench.claim(1) == instances[1:]


def test_every_row_is_claimed_once_whatever_the_order_of_arrival(rows: Rows, bench: PickerBench) -> None:
    expected: set[int] = set()
    got: list[int] = []
    for turn in range(30):
        expected.update(rows.insert(5, priority=turn % 3))
        got += bench.claim(3)
        bench.clock.now += 0.2
    while batch := bench.claim(50):
        got += batch
    assert len(got) == len(set(got))
    assert set(got) == expected


def test_positions_lie_in_the_range_of_priorities() -> None:
    assert (LOWEST, HIGHEST) == (-(2**15), 2**15 - 1)
    assert datetime(1970, 1, 1, tzinfo=UTC) == HEAD[1]
