"""Signals: what wakes whom, what a step is shown, what consumes them, and where they may go."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from durable import Await, Context, Done, Durable, Machine, Next, NoTargetError, Retry, ScheduleChildren, Stop, step
from durable.errors import ConnectionUsageError, PayloadError, ValidationError
from durable.storage import maintenance
from tests.fix_db import wait_until
from tests.machines.driver import Driver, Drivers, View


def names(signals: Any) -> list[str]:
    return [signal.name for signal in signals]


def payloads(signals: Any) -> list[Any]:
    return [signal.payload for signal in signals]


@pytest.fixture
def waiter(app: Durable) -> type[Machine]:
    """Awaits `names` for `timeout` seconds and then tells what it was shown."""

    @app.machine(name="waiter")
    class Waiter(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await(ctx.state.get("names", ["go"]), then=self.woken, timeout=ctx.state.get("timeout"))

        @step
        def woken(self, ctx: Context) -> Any:
            if ctx.state.get("retries", 0) > ctx.attempt:
                return Retry()
            shown = [[s.name, s.payload] for s in ctx.awaited], [[s.name, s.payload] for s in ctx.all]
            return Next(self.after, {**ctx.state, "awaited": shown[0], "all": shown[1], "attempt": ctx.attempt})

        @step
        def after(self, ctx: Context) -> Any:
            if ctx.state.get("again"):
                return Await(ctx.state["again"], then=self.end)
            return Next(self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done(
                {
                    "first": ctx.state["awaited"],
                    "all": ctx.state["all"],
                    "attempt": ctx.state["attempt"],
                    "awaited": [[s.name, s.payload] for s in ctx.awaited],
                    "left": [[s.name, s.payload] for s in ctx.all],
                }
            )

    return Waiter


@pytest.fixture
def pack(app: Durable) -> type[Machine]:
    """Accumulates until it has `want` signals named part; counts how often it looked."""

    @app.machine(name="pack")
    class Pack(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("part", then=self.look, state={**ctx.state, "looks": 0})

        @step
        def look(self, ctx: Context) -> Any:
            state = {**ctx.state, "looks": ctx.state["looks"] + 1}
            if len(ctx.awaited) < ctx.state["want"]:
                return Await("part", then=self.look, state=state, timeout=ctx.state.get("timeout"))
            return Done({"parts": payloads(ctx.awaited), "looks": state["looks"]})

    return Pack


# Waking


@pytest.mark.parametrize("when", ["before the first step", "during the step", "after the park"])
def test_a_signal_is_never_lost_whenever_it_arrives(
    app: Durable, driver: Driver, view: View, waiter: type[Machine], when: str
) -> None:
    result = waiter.delay()
    if when == "before the first step":
        assert result.signal("go", 1)
    commit = driver.execute(driver.claim())
    if when == "during the step":
        assert result.signal("go", 1)
    driver.flush(commit)
    if when == "after the park":
        assert view.of(result.id, "status", "step", "awaits") == ("awaiting_signal", "woken", ["go"])
        assert result.signal("go", 1)
    assert view.of(result.id, "status", "step", "version") == ("runnable", "woken", 1)
    driver.drain()
    assert result.get(timeout=5)["first"] == [["go", 1]]


def test_a_signal_before_the_park_makes_it_runnable_and_says_so(
    app: Durable, driver: Driver, waiter: type[Machine]
) -> None:
    result = waiter.delay()
    result.signal("go")
    driver.step()
    assert driver.ready == {"default": 1}


def test_only_a_matching_name_wakes_and_others_stay_in_the_inbox(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    result = waiter.delay(names=["approve", "reject"])
    driver.drain()
    result.signal("other", 1)
    assert view.status(result.id) == "awaiting_signal"
    assert driver.drain() == []
    result.signal("reject", 2)
    assert view.status(result.id) == "runnable"
    driver.drain()
    told = result.get(timeout=5)
    assert told["first"] == [["reject", 2]]
    assert told["all"] == [["other", 1], ["reject", 2]]
    assert told["left"] == [["other", 1]], "only what was awaited was consumed"


def test_several_signals_are_shown_at_once_oldest_first(app: Durable, driver: Driver, waiter: type[Machine]) -> None:
    result = waiter.delay(names=["b", "a"])
    driver.drain()
    for n, name in enumerate(["b", "a", "x", "b"]):
        result.signal(name, n)
    driver.drain()
    assert result.get(timeout=5)["first"] == [["b", 0], ["a", 1], ["b", 3]]


def test_a_signal_carries_any_payload_and_its_time(app: Durable, driver: Driver) -> None:
    seen: list[Any] = []

    @app.machine(name="seer")
    class Seer(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("go", then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            seen.extend(ctx.awaited)
            return Done()

    sent = [None, 0, "ü", [1, {"n": None}], {"amount": 100}]
    result = Seer.delay()
    for payload in sent:
        result.signal("go", payload)
    driver.drain()
    assert payloads(seen) == sent
    assert sorted(seen, key=lambda s: (s.created_at, s.id)) == seen
    assert all(s.created_at.tzinfo is not None for s in seen)


def test_payloads_are_jsonb_for_people(app: Durable, view: View, waiter: type[Machine]) -> None:
    result = waiter.delay()
    result.signal("go", {"amount": 100})
    app.signal_many([{"target": result.id, "name": "go", "payload": {"amount": 7}}])
    rows = view.rows("SELECT jsonb_typeof(payload), payload ->> 'amount' FROM {schema}.signal_view ORDER BY id")
    assert rows == [("object", "100"), ("object", "7")]


# Packs


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2], [2, 3, 1]])
def test_a_pack_accumulates_in_any_order_and_finishes_once(
    app: Durable, driver: Driver, view: View, pack: type[Machine], order: list[int]
) -> None:
    result = pack.delay(want=3)
    driver.drain()
    for n, part in enumerate(order, start=1):
        result.signal("part", part)
        driver.drain()
        assert view.status(result.id) == ("done" if n == 3 else "awaiting_signal")
        assert driver.drain() == [], "what was shown does not wake again"
    assert result.get(timeout=5) == {"parts": order, "looks": 3}


def test_a_pack_that_came_early_is_looked_at_once(app: Durable, driver: Driver, pack: type[Machine]) -> None:
    result = pack.delay(want=3)
    for part in range(3):
        result.signal("part", part)
    driver.drain()
    assert result.get(timeout=5) == {"parts": [0, 1, 2], "looks": 1}


def test_a_signal_during_a_renewed_await_wakes_it_again(
    app: Durable, driver: Driver, view: View, pack: type[Machine]
) -> None:
    result = pack.delay(want=2)
    driver.drain()
    result.signal("part", 1)
    commit = driver.execute(driver.claim())
    result.signal("part", 2)
    driver.flush(commit)
    assert view.status(result.id) == "runnable"
    driver.drain()
    assert result.get(timeout=5) == {"parts": [1, 2], "looks": 2}


def test_what_has_been_shown_is_remembered_once(app: Durable, driver: Driver, view: View, pack: type[Machine]) -> None:
    result = pack.delay(want=31)
    driver.drain()
    for n in range(30):
        result.signal("part", n)
        driver.drain()
    shown = "SELECT cardinality(shown) FROM {schema}.instances WHERE id = %s"
    assert view.rows(shown, result.id) == [(30,)]
    result.signal("part", 30)
    driver.drain()
    assert result.get(timeout=5) == {"parts": list(range(31)), "looks": 31}


@pytest.mark.parametrize("keep", [False, True])
def test_await_consumes_names_not_awaited_again(app: Durable, driver: Driver, view: View, keep: bool) -> None:
    @app.machine(name="switch")
    class Switch(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("a", then=self.first)

        @step
        def first(self, ctx: Context) -> Any:
            return Await("b", then=self.second, keep=keep)

        @step
        def second(self, ctx: Context) -> Any:
            return Await(["a", "b"], then=self.third)

        @step
        def third(self, ctx: Context) -> Any:
            return Done(names(ctx.awaited))

    result = Switch.delay()
    driver.drain()
    for name in ("a", "b"):
        result.signal(name, dedup_key=name)
        driver.drain()
    assert view.of(result.id, "status", "step") == ("awaiting_signal", "third"), "both were shown: neither wakes again"
    assert result.signal("a", dedup_key="a") is False, "a consumed signal is still a duplicate"
    result.signal("b")
    driver.drain()
    assert result.get(timeout=5) == (["a", "b", "b"] if keep else ["b", "b"])


def test_second_await_of_a_name_needs_a_new_signal(app: Durable, driver: Driver, view: View) -> None:
    @app.machine(name="two")
    class Two(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("approve", then=self.manager)

        @step
        def manager(self, ctx: Context) -> Any:
            return Await("paid", then=self.paid)

        @step
        def paid(self, ctx: Context) -> Any:
            return Await("approve", then=self.director, timeout=0)

        @step
        def director(self, ctx: Context) -> Any:
            return Done(payloads(ctx.awaited))

    ignored, answered = Two.delay(), Two.delay()
    driver.drain()
    for result in (ignored, answered):
        result.signal("approve", "the manager")
    driver.drain()
    for result in (ignored, answered):
        result.signal("paid")
    driver.drain()
    answered.signal("approve", "the director")
    driver.drain()
    assert answered.get(timeout=5) == ["the director"]
    driver.time_out()
    driver.drain()
    assert ignored.get(timeout=5) == []


def test_alternating_awaits_keep_nothing(app: Durable, driver: Driver, view: View) -> None:
    @app.machine(name="pingpong")
    class PingPong(Machine):
        @step(initial=True)
        def ping(self, ctx: Context) -> Any:
            return Await("a", then=self.pong)

        @step
        def pong(self, ctx: Context) -> Any:
            return Await("b", then=self.ping)

    result = PingPong.delay()
    driver.drain()
    for _ in range(5):
        for name in ("a", "b"):
            result.signal(name)
            driver.drain()
    assert view.inbox(result.id) == []
    assert view.rows("SELECT cardinality(shown) FROM {schema}.instances WHERE id = %s", result.id) == [(0,)]


def test_a_timeout_of_a_renewed_await_shows_what_has_arrived(
    app: Durable, driver: Driver, view: View, pack: type[Machine]
) -> None:
    result = pack.delay(want=2, timeout=0)
    driver.drain()
    result.signal("part", 1)
    driver.drain()
    assert driver.time_out() == {"default": 1}
    driver.step()
    assert view.of(result.id, "status", "state ->> 'looks'") == ("awaiting_signal", "2")


# What is consumed


def test_a_retry_of_a_woken_step_sees_the_same_signals_and_more(
    app: Durable, driver: Driver, waiter: type[Machine]
) -> None:
    result = waiter.delay(retries=2)
    driver.drain()
    result.signal("go", 1)
    driver.step()
    result.signal("go", 2)
    driver.drain()
    told = result.get(timeout=5)
    assert (told["first"], told["attempt"]) == ([["go", 1], ["go", 2]], 2)


def test_a_crash_in_a_woken_step_sees_the_same_signals(app: Durable, drivers: Drivers, waiter: type[Machine]) -> None:
    result = waiter.delay()
    first = drivers()
    first.drain()
    result.signal("go", 1)
    claimed = first.claim()
    first.execute(claimed)
    first.die([(claimed.id, claimed.token)])
    drivers().drain()
    assert result.get(timeout=5)["first"] == [["go", 1]]


def test_progress_consumes_exactly_what_was_shown_and_latecomers_survive(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    result = waiter.delay(again=["go"])
    driver.drain()
    result.signal("go", 1)
    result.signal("other", 2)
    claimed = driver.claim()
    result.signal("go", 3)
    driver.flush(driver.execute(claimed))
    assert view.inbox(result.id) == [("other", 2), ("go", 3)]
    driver.drain()
    told = result.get(timeout=5)
    assert (told["first"], told["awaited"]) == ([["go", 1]], [["go", 3]])


@pytest.mark.parametrize("outcome", ["next", "children"])
def test_every_progress_consumes(app: Durable, driver: Driver, view: View, outcome: str) -> None:
    @app.machine(name="progress")
    class Progress(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("go", then=self.woken)

        @step
        def woken(self, ctx: Context) -> Any:
            return Next(self.end, delay=60) if outcome == "next" else ScheduleChildren([], then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done(names(ctx.all))

    result = Progress.delay()
    driver.drain()
    result.signal("go")
    driver.step()
    assert view.count("signals") == 0


@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "cancelled while executing", "kept"])
def test_end_clears_signals_that_were_shown(app: Durable, driver: Driver, view: View, end: str) -> None:
    @app.machine(name="ender")
    class Ender(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("go", then=self.woken)

        @step
        def woken(self, ctx: Context) -> Any:
            return Next(self.last)

        @step
        def last(self, ctx: Context) -> Any:
            return Stop("no") if end == "failed" else Done()

    options: dict[str, Any] = {"correlation_key": "k", "correlation_scope": ["done"]} if end == "kept" else {}
    result = app.insert(Ender, **options)
    driver.drain()
    result.signal("go", dedup_key="1")
    driver.step()
    result.signal("late", dedup_key="2")
    assert view.count("signals") == 2
    if end == "cancelled":
        result.cancel()
    elif end == "cancelled while executing":
        commit = driver.execute(driver.claim())
        result.cancel()
        driver.flush(commit)
    else:
        driver.drain()
    assert result.status == ("done" if end == "kept" else end.split()[0])
    # A failed one can be retried and keeps all, the tombstone of "go" too; no step was shown "late" before the cancel.
    assert view.count("signals") == {"failed": 2, "cancelled": 1}.get(end, 0)
    assert view.count("instances") == (1 if end == "kept" else 0)


def test_signals_never_reach_the_next_machine_of_a_worker(app: Durable, driver: Driver, waiter: type[Machine]) -> None:
    one, two, three = (waiter.delay() for _ in range(3))
    driver.drain()
    app.signal_many([{"target": r.id, "name": "go", "payload": n} for n, r in enumerate((one, two, three))])
    driver.drain()
    assert [r.get(timeout=5)["all"] for r in (one, two, three)] == [[["go", 0]], [["go", 1]], [["go", 2]]]


# Redelivery


def test_a_dedup_key_makes_redelivery_a_no_op_even_after_it_was_consumed(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    result, other = waiter.delay(again=["go"]), waiter.delay()
    driver.drain()
    assert result.signal("go", 1, dedup_key="e1") is True
    assert result.signal("go", 2, dedup_key="e1") is False
    assert other.signal("go", 3, dedup_key="e1") is True, "per instance"
    driver.drain()
    assert view.of(result.id, "status", "step") == ("awaiting_signal", "end")
    assert result.signal("go", 4, dedup_key="e1") is False
    assert driver.drain() == []
    assert view.status(result.id) == "awaiting_signal"
    assert result.signal("go", 5, dedup_key="e2") is True
    driver.drain()
    told = result.get(timeout=5)
    assert (told["first"], told["awaited"]) == ([["go", 1]], [["go", 5]])


def test_without_a_dedup_key_duplicates_are_kept(app: Durable, driver: Driver, waiter: type[Machine]) -> None:
    result = waiter.delay()
    driver.drain()
    assert [result.signal("go", 1) for _ in range(3)] == [True] * 3
    driver.drain()
    assert result.get(timeout=5)["first"] == [["go", 1]] * 3


# Addressing


def test_nothing_live_is_an_error_and_nothing_is_stored(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    finished = app.insert(waiter, correlation_key="old")
    finished.cancel()
    reserved = app.insert(waiter, correlation_key="kept", correlation_scope=["cancelled"])
    reserved.cancel()
    free = app.insert(waiter, correlation_key="free", correlation_scope=())
    for target in (finished.id, reserved.id, 424242, "old", "kept", "never", "free"):
        with pytest.raises(NoTargetError, match="nothing live"):
            app.signal(target, "go", 1, dedup_key="k")
    assert view.count("signals") == 0
    assert free.signal("go")


def test_a_correlation_key_reaches_its_present_occupant_only(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    first = app.insert(waiter, correlation_key="order:42")
    driver.drain()
    app.signal("order:42", "go", 1)
    driver.drain()
    assert first.status == "done"
    with pytest.raises(NoTargetError):
        app.signal("order:42", "go", 2)
    second = app.insert(waiter, correlation_key="order:42")
    bystander = app.insert(waiter, correlation_key="order:43")
    app.signal("order:42", "go", 3)
    driver.drain()
    assert second.get(timeout=5)["first"] == [["go", 3]]
    assert bystander.status == "awaiting_signal"


def test_any_live_status_takes_signals(app: Durable, driver: Driver, view: View, waiter: type[Machine]) -> None:
    scheduled = app.insert(waiter, schedule_in=60)
    executing = waiter.delay()
    driver.claim()
    parked_elsewhere = waiter.delay(names=["other"])
    driver.drain()
    for result, status in ((scheduled, "scheduled"), (executing, "executing"), (parked_elsewhere, "awaiting_signal")):
        assert result.signal("go", 1)
        assert view.status(result.id) == status
        assert view.inbox(result.id) == [("go", 1)]


# Timeouts


def test_a_timeout_wakes_with_nothing_awaited_and_the_attempt_unchanged(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    result = waiter.delay(timeout=0.15)
    parked_at = time.monotonic()
    driver.drain()
    result.signal("other")
    assert driver.time_out() == {} or time.monotonic() - parked_at >= 0.15, "never early"
    wait_until(lambda: driver.time_out() or view.status(result.id) != "awaiting_signal")
    assert time.monotonic() - parked_at >= 0.15
    assert view.of(result.id, "status", "deadline", "attempt") == ("runnable", None, 0)
    driver.drain()
    told = result.get(timeout=5)
    assert (told["first"], told["all"], told["attempt"]) == ([], [["other", None]], 0)


def test_a_signal_just_before_the_deadline_wins_and_it_wakes_once(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    result = waiter.delay(timeout=0)
    driver.drain()
    result.signal("go", 1)
    assert view.of(result.id, "status", "deadline") == ("runnable", None)
    assert driver.time_out() == {}
    driver.drain()
    assert result.get(timeout=5)["first"] == [["go", 1]]
    assert driver.steps(result.id) == ["start", "woken", "after", "end"]


def test_parks_without_a_deadline_or_with_a_later_one_are_not_touched(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    due, later, never = waiter.delay(timeout=0), waiter.delay(timeout=3600), waiter.delay()
    driver.drain()
    seconds = driver.run(maintenance.next_due())
    assert seconds <= 0
    assert driver.time_out() == {"default": 1}
    assert [view.status(r.id) for r in (due, later, never)] == ["runnable", "awaiting_signal", "awaiting_signal"]
    assert 3500 < driver.run(maintenance.next_due()) <= 3600
    assert driver.time_out() == {}


def test_a_signal_after_the_timeout_is_still_delivered(app: Durable, driver: Driver, waiter: type[Machine]) -> None:
    result = waiter.delay(timeout=0)
    driver.drain()
    driver.time_out()
    result.signal("go", 1)
    driver.drain()
    assert result.get(timeout=5)["first"] == [["go", 1]]


def test_timeouts_go_in_bounded_batches_the_longest_overdue_first(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    app.insert_many([(waiter, {"kwargs": {"timeout": 0}})] * 5)
    driver.drain()
    assert [driver.run(maintenance.time_out(2)) for _ in range(4)] == [
        {"default": 2},
        {"default": 2},
        {"default": 1},
        {},
    ]


def test_a_machine_that_has_started_does_not_expire(app: Durable, driver: Driver, connection: Any) -> None:
    """`expires` is for what has not started."""

    @app.machine(name="starter")
    class Starter(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("go", then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done("in the end")

    result = app.insert(Starter, expires=60)
    driver.drain()
    connection.execute(f"UPDATE {app.schema}.instances SET expires_at = clock_timestamp() - interval '1 s'")
    result.signal("go")
    driver.drain()
    assert result.get(timeout=5) == "in the end"


# Batches


def test_a_batch_tells_of_each_what_became_of_it(
    app: Durable, driver: Driver, view: View, waiter: type[Machine]
) -> None:
    one = app.insert(waiter, correlation_key="one")
    two = waiter.delay()
    driver.drain()
    two.signal("go", 0, dedup_key="old")
    told = app.signal_many(
        [
            {"target": one.id, "name": "go", "payload": 1, "dedup_key": "a"},
            {"target": "one", "name": "go", "payload": 2, "dedup_key": "a"},
            {"target": one.id, "name": "other", "payload": 3, "dedup_key": "a"},
            {"target": one.id, "name": "go", "payload": 4},
            {"target": one.id, "name": "go", "payload": 4},
            {"target": 424242, "name": "go"},
            {"target": "nobody", "name": "go"},
            {"target": two.id, "name": "go", "dedup_key": "old"},
            {"target": two.id, "name": "go", "payload": 5, "dedup_key": "a"},
        ]
    )
    assert told == [True, False, False, True, True, None, None, False, True]
    assert view.inbox(one.id) == [("go", 1), ("go", 4), ("go", 4)]
    assert view.inbox(two.id) == [("go", 0), ("go", 5)]
    assert app.signal_many([]) == []


def test_a_batch_to_one_target_keeps_its_order(app: Durable, driver: Driver, waiter: type[Machine]) -> None:
    result = waiter.delay()
    driver.drain()
    keys = [None, "z", "a", None, "m"] * 5
    app.signal_many(
        [
            {"target": result.id, "name": "go", "payload": n, "dedup_key": key and f"{key}{n}"}
            for n, key in enumerate(keys)
        ]
    )
    driver.drain()
    assert [payload for _, payload in result.get(timeout=5)["first"]] == list(range(25))


@pytest.mark.parametrize("keyed", [False, True])
def test_five_thousand_signals_go_at_once(app: Durable, view: View, waiter: type[Machine], keyed: bool) -> None:
    many = app.insert_many([(waiter, {})] * 2500)
    busy = waiter.delay()
    targets = [r.id for r in many] + [busy.id] * 2500
    messages = [
        {"target": target, "name": "go", "payload": n, **({"dedup_key": str(n)} if keyed else {})}
        for n, target in enumerate(targets)
    ]
    assert app.signal_many(messages) == [True] * 5000
    assert view.count("signals") == 5000
    assert [payload for _, payload in view.inbox(busy.id)] == list(range(2500, 5000))
    if keyed:
        assert app.signal_many(messages) == [False] * 5000


# In the caller's transaction


def test_a_signal_on_the_callers_connection_lives_and_dies_with_its_transaction(
    app: Durable, driver: Driver, view: View, waiter: type[Machine], database: str
) -> None:
    result = waiter.delay()
    driver.drain()
    with psycopg.connect(database) as caller:
        assert app.signal(result.id, "go", 1, connection=caller)
        caller.rollback()
        assert (view.status(result.id), view.count("signals")) == ("awaiting_signal", 0)
        assert app.signal(result.id, "go", 2, connection=caller)
        assert (view.status(result.id), view.count("signals")) == ("awaiting_signal", 0)
        caller.commit()
    assert view.status(result.id) == "runnable"
    driver.drain()
    assert result.get(timeout=5)["first"] == [["go", 2]]


def test_no_target_leaves_the_callers_transaction_usable(
    app: Durable, view: View, waiter: type[Machine], database: str
) -> None:
    result = waiter.delay()
    with psycopg.connect(database) as caller:
        with pytest.raises(NoTargetError):
            app.signal("nobody", "go", connection=caller)
        assert app.signal_many([{"target": result.id, "name": "go"}], connection=caller) == [True]
    assert view.count("signals") == 1


def test_an_autocommit_connection_commits_each_delivery(
    app: Durable, view: View, waiter: type[Machine], connection: Any
) -> None:
    result = waiter.delay()
    assert app.signal(result.id, "go", connection=connection)
    assert view.count("signals") == 1


def test_signals_have_async_twins(app: Durable, driver: Driver, waiter: type[Machine], database: str) -> None:
    result = waiter.delay()
    driver.drain()

    async def send() -> None:
        try:
            assert await app.asignal(result.id, "other", 1, dedup_key="k") is True
            assert await app.asignal(result.id, "other", 1, dedup_key="k") is False
            with pytest.raises(NoTargetError):
                await app.asignal("nobody", "go")
            async with await psycopg.AsyncConnection.connect(database) as caller:
                assert await app.asignal(result.id, "go", 2, connection=caller) is True
                await caller.rollback()
                messages = [{"target": result.id, "name": "go", "payload": 3}, {"target": "nobody", "name": "go"}]
                assert await app.asignal_many(messages, connection=caller) == [True, None]
            assert await waiter.adelay()
        finally:
            await app.aclose()

    asyncio.run(send())
    driver.drain()
    assert result.get(timeout=5)["first"] == [["go", 3]]


def test_a_connection_that_can_not_be_used_is_refused(app: Durable, waiter: type[Machine], database: str) -> None:
    result = waiter.delay()
    with psycopg.connect(database) as caller:
        caller.close()
        with pytest.raises(ConnectionUsageError, match="closed"):
            app.signal(result.id, "go", connection=caller)
    with pytest.raises(ConnectionUsageError, match="must be"):
        app.signal(result.id, "go", connection=object())


# Left behind


def test_signals_of_what_is_gone_are_swept(
    app: Durable, driver: Driver, view: View, waiter: type[Machine], connection: Any
) -> None:
    live = waiter.delay()
    live.signal("go", 1)
    insert = f"INSERT INTO {app.schema}.signals (target_id, name, created_at) VALUES (%s, 'left', now() - %s)"
    for target in (live.id, 424242):
        for age in (timedelta(seconds=1), timedelta(minutes=2)):
            connection.execute(insert, (target, age))
    assert driver.run(maintenance.sweep_signals()) == 2
    assert view.rows("SELECT target_id, count(*) FROM {schema}.signals GROUP BY 1") == [(live.id, 3)]


# Bad input


BAD: list[tuple[Any, Any, Any, Any, type[Exception]]] = [
    (0, "go", None, None, ValidationError),
    (-1, "go", None, None, ValidationError),
    (2**63, "go", None, None, ValidationError),
    (True, "go", None, None, ValidationError),
    (1.0, "go", None, None, ValidationError),
    (None, "go", None, None, ValidationError),
    ("", "go", None, None, ValidationError),
    ("a\0b", "go", None, None, ValidationError),
    ("x" * 256, "go", None, None, ValidationError),
    ("k", "", None, None, ValidationError),
    ("k", "a\0b", None, None, ValidationError),
    ("k", "\ud800", None, None, ValidationError),
    ("k", "x" * 256, None, None, ValidationError),
    ("k", 5, None, None, ValidationError),
    ("k", "go", object(), None, PayloadError),
    ("k", "go", float("nan"), None, PayloadError),
    ("k", "go", "a\0b", None, PayloadError),
    ("k", "go", "x" * 2**21, None, PayloadError),
    ("k", "go", {1: 2}, None, PayloadError),
    ("k", "go", None, "", ValidationError),
    ("k", "go", None, "a\0b", ValidationError),
    ("k", "go", None, 7, ValidationError),
]


def test_bad_input_is_refused_before_anything_is_written(app: Durable, view: View, waiter: type[Machine]) -> None:
    good = app.insert(waiter, correlation_key="k")
    for target, name, payload, dedup_key, error in BAD:
        with pytest.raises(error):
            app.signal(target, name, payload, dedup_key=dedup_key)
        bad = {"target": target, "name": name, "payload": payload, "dedup_key": dedup_key}
        with pytest.raises(ValidationError, match="signal_many, entry 1"):
            app.signal_many([{"target": good.id, "name": "go"}, bad])
    assert view.count("signals") == 0


def test_a_message_of_another_shape_is_refused_with_its_place(app: Durable) -> None:
    messages: list[Any] = [{"name": "go"}, {"target": 1}, {"target": 1, "name": "go", "to": 2}, 5, None]
    for message in messages:
        with pytest.raises(ValidationError, match="signal_many, entry 0"):
            app.signal_many([message])
