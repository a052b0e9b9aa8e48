"""Which commits notify, and what a notification says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from durable.instance import NewInstance, Payload
from durable.wakeups import ANY_QUEUE, INTERVAL, QUICKLY, TERMINATE, Wakeups, due_channel, parse, payload, queue_channel


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def new(**options: Any) -> NewInstance:
    return NewInstance("task", Payload("json", b"{}"), **options)


def said(operations: Any, statement: str = "notify") -> list[tuple[str, str]]:
    """Run the operations against nothing: (channel, payload) of each."""
    sent = []
    for operation in operations:
        name, parameters = operation.send(None)
        assert name == statement
        sent.append((parameters["channel"], parameters["payload"]))
    return sent


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def wakeups(clock: Clock) -> Wakeups:
    return Wakeups("s", True, clock)


QUEUES, DUE = queue_channel("s"), due_channel("s")


def test_the_first_insert_notifies_at_once_then_one_per_interval(wakeups: Wakeups, clock: Clock) -> None:
    assert said(wakeups.after_insert([new()])) == [(QUEUES, "default:1:0")]
    clock.now += INTERVAL / 2
    assert said(wakeups.after_insert([new()])) == []
    clock.now += INTERVAL / 2
    assert said(wakeups.after_insert([new()])) == [(QUEUES, "default:1:0")]


def test_slow_inserts_notify_each_time(wakeups: Wakeups, clock: Clock) -> None:
    for instance_id in range(1, 20):
        assert said(wakeups.after_insert([new()], [instance_id])) == [(QUEUES, "default:1:0")]
        clock.now += 1.01 / QUICKLY


def test_rows_of_others_count_as_quick(wakeups: Wakeups, clock: Clock) -> None:
    """Ids tell how many rows all processes have inserted since this one notified."""
    assert said(wakeups.after_insert([new()], [1])) == [(QUEUES, "default:1:0")]
    clock.now += INTERVAL / 2
    assert said(wakeups.after_insert([new()], [1 + QUICKLY])) == []
    clock.now += INTERVAL / 2
    assert said(wakeups.after_insert([new()], [2 + QUICKLY])) == [(QUEUES, "default:1:0")]


def test_quick_inserts_save_notifications(wakeups: Wakeups, clock: Clock) -> None:
    sent = 0
    for instance_id in range(1, 1001):
        sent += len(said(wakeups.after_insert([new()], [instance_id])))
        clock.now += 0.5 / QUICKLY
    assert sent == pytest.approx(1000 * 0.5 / QUICKLY / INTERVAL, abs=2)


def test_each_queue_has_its_own_interval(wakeups: Wakeups) -> None:
    assert said(wakeups.after_insert([new(queue="a")])) == [(QUEUES, "a:1:0")]
    assert said(wakeups.after_insert([new(queue="b"), new(queue="a")])) == [(QUEUES, "b:1:0")]


def test_a_batch_notifies_once_per_queue_with_its_count_and_best_priority(wakeups: Wakeups) -> None:
    batch = [new(priority=5), new(priority=-3), new(queue="b"), new()]
    assert said(wakeups.after_insert(batch)) == [(QUEUES, "default:3:-3"), (QUEUES, "b:1:0")]


def test_what_was_saved_is_owed_until_it_is_sent(wakeups: Wakeups, clock: Clock) -> None:
    wakeups.after_insert([new()])
    wakeups.after_insert([new(priority=2)])
    assert said(wakeups.owed()) == [(QUEUES, "default:1:2")]
    assert said(wakeups.owed()) == []
    assert said(wakeups.after_insert([new()])) == [], "sending what is owed counts as a notification"
    clock.now += 2 * INTERVAL
    wakeups.after_insert([new()])
    assert said(wakeups.owed()) == [], "a later notification made up for it"


def test_scheduled_rows_notify_beats_not_workers(wakeups: Wakeups, clock: Clock) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    assert said(wakeups.after_insert([new(delay=5.0), new(at=later)])) == [(DUE, "")]
    assert said(wakeups.after_insert([new(delay=1.0)])) == []
    assert said(wakeups.due_sooner()) == []
    clock.now += 2 * INTERVAL
    assert said(wakeups.due_sooner()) == [(DUE, "")]
    assert said(wakeups.after_insert([new(delay=0.0)])) == [(QUEUES, "default:1:0")]


def test_a_row_whose_time_is_past_notifies_workers(wakeups: Wakeups) -> None:
    assert said(wakeups.after_insert([new(at=datetime(2020, 1, 1, tzinfo=UTC))])) == [(QUEUES, "default:1:0")]


def test_a_callers_transaction_carries_constant_payloads(wakeups: Wakeups) -> None:
    batch = [new(), new(queue="b"), new(delay=3.0)]
    for _ in range(3):
        assert said(wakeups.in_transaction(batch), "notify_inside") == [(QUEUES, ANY_QUEUE), (DUE, "")]
        assert said(wakeups.any_queue(), "notify_inside") == [(QUEUES, ANY_QUEUE)]


def test_hand_backs_and_promotions_ask_for_a_look_from_the_head(wakeups: Wakeups) -> None:
    for _ in range(2):
        assert said(wakeups.handed_back({"a": 3, "b": 1})) == [(QUEUES, "a:3:!"), (QUEUES, "b:1:!")]
    assert said(wakeups.promoted({"a": 2})) == [(QUEUES, "a:2:!")]
    assert said(wakeups.handed_back({})) == []


def test_switched_off_nothing_is_sent() -> None:
    wakeups = Wakeups("s", False)
    batch = [new(), new(delay=1.0)]
    assert said(wakeups.after_insert(batch)) == []
    assert said(wakeups.owed()) == []
    assert said(wakeups.in_transaction(batch)) == []
    assert said(wakeups.handed_back({"a": 1})) == []
    assert said(wakeups.promoted({"a": 1})) == []
    assert said(wakeups.due_sooner()) == []


@pytest.mark.parametrize(("queue", "count", "priority"), [("a", 1, 0), ("b-c.d_e", 999_999, -32768), ("x", 5, None)])
def test_a_payload_is_read_back(queue: str, count: int, priority: int | None) -> None:
    assert parse(payload(queue, count, priority)) == (queue, count, priority)


def test_the_constant_payload_means_any_queue_from_the_head() -> None:
    assert parse(ANY_QUEUE) == (ANY_QUEUE, 1, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        ":1:0",
        "q::0",
        "q:1:",
        "q:1",
        "q:x:0",
        "q:-1:0",
        "q:1:--5",
        "q:1:-",
        "q:1:5-",
        "q:1:+5",
        "q:²:0",
        "q:1:²",
        "q:1:0:0",
        "q:1:99999999999",
        "q:1:-------9",
        "q: 1:0",
        "q:1:0\n",
        "x" * 7999,
        "q:" + "9" * 7000 + ":0",
        "ping 5",
        "\ud800:1:0:",
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_what_is_not_ours_is_ignored(text: str) -> None:
    assert parse(text) is None


def test_channels_fit_into_63_bytes_and_differ() -> None:
    longest = "s" * 40
    assert len(due_channel(longest)) < 64
    assert queue_channel("a") != queue_channel("b") != due_channel("b")


def test_a_termination_is_told_each_time_in_a_form_that_says_nothing_of_queues(wakeups: Wakeups) -> None:
    for _ in range(2):
        assert said(wakeups.terminations()) == [(QUEUES, TERMINATE)]
    assert parse(TERMINATE) is None, "what an agent that does not know it makes of it"
    assert Wakeups("s", False).terminations() == []


def test_a_notification_that_another_thread_sends_meanwhile_is_not_owed_any_more() -> None:
    class Vanishing(dict[str, str]):
        """Empty, though it was not when it was asked."""

        def __bool__(self) -> bool:
            return True

    wakeups = Wakeups("schema", True)
    wakeups._owed = Vanishing()
    assert wakeups.owed() == []
