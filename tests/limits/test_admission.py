"""The part of a worker process that looks for limited rows: when, how often, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from durable import Durable, RateLimit
from durable.instance import Claimed
from durable.runtime.admission import BUSY_INTERVAL, WIDEST_WINDOW, WINDOW, LimitedPicker
from durable.runtime.link import Link
from durable.storage import instances, limits
from tests.fix_rows import HEAD, Rows, done, new


class Clock:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Looker:
    """A limited picker with a lease, on a link of its own."""

    def __init__(self, app: Durable, rows: Rows) -> None:
        self.clock = Clock()
        self.link = Link(app.dsn, app.sql, "limited", pooler=False, most_wait=1.0, pause=lambda _: True)
        self.picker = LimitedPicker(self.link, "default", app.wakeups, self.clock)
        self.worker = rows.worker()

    def look(self, limit: int = 10, slots: int = 1, *, busy: bool = False) -> list[Claimed]:
        return self.picker.claim(self.worker, limit, slots, True, [], HEAD if busy else None)

    def soon(self) -> float:
        """Seconds until it wants to look again."""
        return self.picker.next_at - self.clock.now


@pytest.fixture
def looker(app: Durable, rows: Rows) -> Iterator[Looker]:
    looker = Looker(app, rows)
    yield looker
    looker.link.drop()


def keyed(rows: Rows, count: int, key: str = "k") -> list[int]:
    return [rows.run(instances.insert(new(concurrency_key=key))) for _ in range(count)]


def test_without_limited_rows_it_asks_one_cheap_question_and_waits_to_be_told(rows: Rows, looker: Looker) -> None:
    rows.insert(3)
    assert looker.look() == []
    assert looker.soon() == float("inf")
    looker.picker.look_soon()
    assert looker.soon() == pytest.approx(BUSY_INTERVAL)


def test_it_looks_again_at_once_as_long_as_it_finds_rows_and_when_a_lane_was_opened(rows: Rows, looker: Looker) -> None:
    ids = keyed(rows, 1, "a") + keyed(rows, 1, "b")
    assert [row.id for row in looker.look()] == ids
    assert looker.picker.is_due()
    assert looker.look() == []
    assert not looker.picker.is_due()
    looker.picker.look_now()
    assert looker.picker.is_due()


def test_it_wakes_when_a_token_lane_opens(rows: Rows, looker: Looker) -> None:
    rows.atomically(limits.put({("rate", "mail"): RateLimit(1, 10.0, burst=1)}))
    rows.insert(3, rate_limit="mail")
    assert len(looker.look()) == 1
    assert looker.look() == []
    assert 9.0 < looker.soon() <= 10.0


def test_rows_that_another_claim_holds_are_looked_for_again_with_patience(rows: Rows, looker: Looker) -> None:
    keyed(rows, 1)
    other = rows.other()
    waits = []
    with other.connection.transaction():
        other.fetch("SELECT FROM {schema}.instances FOR NO KEY UPDATE")
        for _ in range(5):
            assert looker.look() == []
            waits.append(looker.soon())
    assert waits == sorted(waits)
    assert waits[0] < 0.01
    assert waits[-1] < 0.1
    assert len(looker.look()) == 1


def test_its_window_grows_while_there_is_much_to_park_and_parking_leaves_time_to_others(
    rows: Rows, looker: Looker
) -> None:
    keyed(rows, 700)
    looker.look(limit=1)
    windows = []
    while rows.fetch("SELECT FROM {schema}.instances WHERE status = 'runnable' AND lane IS NULL LIMIT 1"):
        looker.look(limit=1)
        windows.append(looker.picker._window)
    assert max(windows) == WIDEST_WINDOW
    assert len(windows) < 12
    assert looker.look() == []
    assert looker.picker._window == WINDOW


def test_a_claim_that_loses_a_key_after_all_is_given_up_whole_and_made_again(rows: Rows, looker: Looker) -> None:
    first, second = keyed(rows, 2)
    (free,) = keyed(rows, 1, "other")
    rival = rows.other()
    worker = rows.worker()
    with rival.connection.transaction():
        # By hand, past the advisory lock that claims keep each other off with.
        rival.fetch(
            "UPDATE {schema}.instances SET status = 'executing', worker_id = %s, token = 1 WHERE id = %s",
            [worker, first],
        )
        looker.link.connection.execute("SET lock_timeout = 0")  # else it comes back another time
        looking = _Pid(looker.link.connection.info.backend_pid)
        going = rows.background(looker.look)
        rows.wait_blocked(looking, going)  # type: ignore[arg-type]
    assert going.result(20) == []
    assert rows.status(free) == "runnable", "the claim aborts whole"
    assert [row.id for row in looker.look()] == [free]
    assert rows.live(second)["lane"] == "key k"  # type: ignore[index]


class _Pid:
    """What is asked of a session to see whether it waits."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


def test_rows_with_a_rate_limit_ask_a_busy_process_to_let_its_slot_wait(rows: Rows, looker: Looker) -> None:
    rows.atomically(limits.put({("rate", "mail"): RateLimit(10)}))
    (row_id,) = rows.insert(1, rate_limit="mail")
    assert looker.look(slots=0) == []
    assert looker.picker.dry
    (row,) = looker.look(slots=1)
    assert row.id == row_id
    assert not looker.picker.dry
    rows.flush(looker.worker, done(row))


def test_what_it_passes_on_is_announced_to_others(rows: Rows, looker: Looker) -> None:
    rows.atomically(limits.put({("rate", "mail"): RateLimit(10)}))
    rows.insert(5, rate_limit="mail")
    rows.connection.execute(f'LISTEN "durable.{rows.schema}"')
    assert len(looker.look()) == 1
    heard = list(rows.connection.notifies(timeout=5, stop_after=1))
    assert [notify.payload for notify in heard] == ["default:4:0"]
