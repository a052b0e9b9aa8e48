"""The two ends of a worker process: claimed rows in, outcomes out, across two threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, cast

from durable.instance import Claimed
from durable.runtime.buffer import Buffer, Outbox
from durable.storage.claims import Commit
from tests.fix_db import wait_until


def rows(*numbers: int) -> list[Claimed]:
    return [cast(Claimed, number) for number in numbers]


def commits(count: int) -> list[Commit]:
    return [Commit(cast(Claimed, number), "done") for number in range(count)]


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(work()), daemon=True)
    thread.start()
    return thread, seen


def test_rows_are_taken_in_the_order_they_were_put() -> None:
    buffer = Buffer(lambda: None)
    buffer.put(rows(1, 2))
    buffer.put(rows(3))
    assert len(buffer) == 3
    assert [buffer.take() for _ in range(3)] == [1, 2, 3]


def test_an_empty_buffer_wakes_the_engine_once_and_waits_for_rows() -> None:
    woken: list[int] = []
    buffer = Buffer(lambda: woken.append(1))
    thread, seen = in_thread(buffer.take)
    wait_until(lambda: buffer.slot_waits and woken)
    buffer.put(rows(5))
    thread.join(10)
    assert seen == [5]
    assert woken == [1]
    assert not buffer.slot_waits


def test_the_last_rows_are_taken_back_and_the_first_kept() -> None:
    buffer = Buffer(lambda: None)
    buffer.put(rows(1, 2, 3, 4))
    assert buffer.take_back(keep=1) == [4, 3, 2]
    assert buffer.take() == 1
    assert buffer.take_back() == []


def test_closing_ends_a_waiting_slot_but_only_after_the_rows_that_are_there() -> None:
    buffer = Buffer(lambda: None)
    thread, seen = in_thread(buffer.take)
    wait_until(lambda: buffer.slot_waits)
    buffer.close()
    thread.join(10)
    assert seen == [None]
    buffer.put(rows(1))
    assert buffer.take() == 1
    assert buffer.take() is None


def test_every_row_is_either_taken_or_taken_back_never_both() -> None:
    buffer = Buffer(lambda: None)
    taken: list[Any] = []

    def slot() -> None:
        while (row := buffer.take()) is not None:
            taken.append(row)

    thread, _ = in_thread(slot)
    back: list[Any] = []
    for start in range(0, 20_000, 10):
        buffer.put(rows(*range(start, start + 10)))
        back += buffer.take_back(keep=3)
    buffer.close()
    thread.join(10)
    assert sorted(taken + back) == list(range(20_000))


def test_outcomes_are_taken_oldest_first_and_no_more_than_asked() -> None:
    outbox = Outbox(lambda: None)
    given = commits(5)
    for commit in given:
        outbox.hand_over(commit)
    assert outbox.take(2) == given[:2]
    assert outbox.take(100) == given[2:]
    assert outbox.take(1) == []


def test_the_engine_is_rung_only_at_the_number_it_asked_for() -> None:
    rings: list[int] = []
    outbox = Outbox(lambda: rings.append(len(outbox)))
    outbox.hand_over(commits(1)[0])
    assert rings == []
    outbox.wake_at = 3
    for commit in commits(4):
        outbox.hand_over(commit)
    assert rings == [3]
    assert outbox.wake_at == math.inf


def test_a_slot_waits_until_everything_it_handed_over_is_settled() -> None:
    rings: list[int] = []
    outbox = Outbox(lambda: rings.append(1))
    outbox.wait_until_durable()
    for commit in commits(3):
        outbox.hand_over(commit)
    thread, seen = in_thread(outbox.wait_until_durable)
    wait_until(lambda: outbox.slot_waits and rings)
    outbox.settled(2)
    wait_until(lambda: len(rings) >= 2)
    assert not seen
    outbox.settled(1)
    thread.join(10)
    assert seen == [None]
    assert not outbox.slot_waits


def test_a_lost_lease_settles_everything_that_will_never_commit() -> None:
    outbox = Outbox(lambda: None)
    for commit in commits(3):
        outbox.hand_over(commit)
    thread, seen = in_thread(outbox.wait_until_durable)
    wait_until(lambda: outbox.slot_waits)
    outbox.settled_all()
    thread.join(10)
    assert seen == [None]
