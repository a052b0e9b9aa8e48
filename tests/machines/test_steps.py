"""Steps and outcomes: what each leaves in the row, what errors become, inline hops, delays, coroutines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from durable import (
    Await,
    Cancel,
    Context,
    Done,
    Durable,
    Machine,
    Next,
    Retry,
    ScheduleChildren,
    Stop,
    TaskFailed,
    step,
)
from durable.errors import OutcomeError
from durable.outcomes import KEEP
from tests.fix_db import wait_until
from tests.machines.driver import Driver, View


def walker(app: Durable, name: str = "walker", **options: Any) -> type[Machine]:
    """A machine of four steps a, b, c, d that counts what it has seen in its state."""

    @app.machine(name=name, **options)
    class Walker(Machine):
        @step(initial=True)
        def a(self, ctx: Context) -> Any:
            return Next(self.b, {"seen": ["a"], "attempts": [ctx.attempt]})

        @step
        def b(self, ctx: Context) -> Any:
            return Next("c", self._seen(ctx))

        @step
        def c(self, ctx: Context) -> Any:
            return Next(Walker.d, self._seen(ctx))

        @step
        def d(self, ctx: Context) -> Any:
            return Done(self._seen(ctx))

        def _seen(self, ctx: Context) -> dict[str, Any]:
            return {"seen": [*ctx.state["seen"], ctx.step], "attempts": [*ctx.state["attempts"], ctx.attempt]}

    return Walker


def only(app: Durable, body: Callable[[Any, Any], Any], **members: Any) -> type[Machine]:
    """A machine of one step."""

    def one(self: Any, ctx: Any) -> Any:
        return body(self, ctx)

    return app.machine(type("Only", (Machine,), {"one": step(one), **members}), name="only")  # type: ignore[no-any-return]


def failing(app: Durable, outcome: Callable[[], Any], handle: Any = None) -> type[Machine]:
    """A machine whose second step returns what `outcome` makes; `handle` as given."""

    class Failing(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.bad, {"n": 1})

        @step
        def bad(self, ctx: Context) -> Any:
            return outcome()

        @step
        def rescue(self, ctx: Context) -> Any:
            return Done({"rescued": ctx.state})

    if handle is not None:
        Failing.handle = handle  # type: ignore[method-assign]
    return app.machine(Failing, name="failing")  # type: ignore[no-any-return]


# Going on


def test_each_transition_is_committed_before_the_next_step_starts(app: Durable, driver: Driver, view: View) -> None:
    result = walker(app).delay()
    columns = "status", "step", "version", "attempt", "token"
    seen = [view.of(result.id, *columns)]
    for _ in range(4):
        driver.step()
        seen.append(view.of(result.id, *columns))
    assert seen == [
        ("runnable", "a", 0, 0, 0),
        ("runnable", "b", 1, 0, 1),
        ("runnable", "c", 2, 0, 2),
        ("runnable", "d", 3, 0, 3),
        ("done", "d", 4, 0, 4),
    ]
    assert result.get(timeout=5) == {"seen": ["a", "b", "c", "d"], "attempts": [0, 0, 0, 0]}
    assert result.attempts == 4


def test_state_and_result_are_real_jsonb_on_every_path(app: Durable, driver: Driver, view: View) -> None:
    machine = walker(app)
    one = machine.delay(deep={"n": [1]}).id
    (two,) = app.insert_many([(machine, {"kwargs": {"deep": {"n": [2]}}})])
    kinds = "jsonb_typeof(state)", "state #>> '{deep,n,0}'"
    assert [view.of(instance, *kinds) for instance in (one, two.id)] == [("object", "1"), ("object", "2")]
    driver.step()
    assert view.of(one, "jsonb_typeof(state)", "state ->> 'seen'") == ("object", '["a"]')
    driver.drain()
    kinds = "jsonb_typeof(state)", "jsonb_typeof(result)", "result #>> '{seen,3}'"
    assert view.of(one, *kinds) == view.of(two.id, *kinds) == ("object", "object", "d")


def test_a_state_left_out_of_an_outcome_stays(app: Durable, driver: Driver, view: View) -> None:
    @app.machine(name="keeper")
    class Keeper(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            ctx.state["changed"] = "in memory only"
            if ctx.attempt == 0:
                return Retry()
            return Next(self.middle)

        @step
        def middle(self, ctx: Context) -> Any:
            ctx.state["changed"] = "in memory only"
            return Await("go", then=self.end, state=KEEP, timeout=0)

        @step
        def end(self, ctx: Context) -> Any:
            return ScheduleChildren([], then=self.after)

        @step
        def after(self, ctx: Context) -> Any:
            return Done(ctx.state)

    result = Keeper.delay(n=1)
    driver.drain()
    driver.time_out()
    driver.drain()
    assert driver.steps(result.id) == ["start", "start", "middle", "end", "after"]
    assert result.get(timeout=5) == {"n": 1}


def test_a_delayed_next_waits_and_is_never_early(app: Durable, driver: Driver, view: View) -> None:
    @app.machine(name="sleeper")
    class Sleeper(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.later, delay=ctx.state["delay"])

        @step
        def later(self, ctx: Context) -> Any:
            return Done(ctx.attempt)

    long, short = Sleeper.delay(delay=3600), Sleeper.delay(delay=0.2)
    driver.drain()
    assert [view.of(r.id, "status", "step", "version") for r in (long, short)] == [("scheduled", "later", 1)] * 2
    assert driver.drain() == []
    wait_until(lambda: driver.promote(), what="the promotion")
    (waited,) = view.of(short.id, "clock_timestamp() - created_at")
    assert waited.total_seconds() >= 0.2
    driver.drain()
    assert short.get(timeout=5) == 0
    assert long.status == "scheduled"


def test_the_step_to_start_with_can_be_chosen(app: Durable, driver: Driver) -> None:
    machine = walker(app)
    seen = {"seen": ["given"], "attempts": []}
    by_name = app.insert(machine, step="d", state=seen)
    by_method = app.insert("walker", step=machine.d, state=seen)  # type: ignore[attr-defined]
    driver.drain()
    assert driver.steps(by_name.id) == driver.steps(by_method.id) == ["d"]


def test_steps_may_be_coroutines(app: Durable, driver: Driver) -> None:
    @app.machine(name="asynchronous")
    class Asynchronous(Machine):
        @step(initial=True)
        async def start(self, ctx: Context) -> Any:
            await asyncio.sleep(0)
            return Next(self.end, {"n": ctx.state["n"] + 1})

        @step
        async def end(self, ctx: Context) -> Any:
            await asyncio.sleep(0)
            raise LookupError("not there")

        async def handle(self, error: BaseException, ctx: Context) -> Any:
            await asyncio.sleep(0)
            return Done([type(error).__name__, ctx.state["n"]])

    result = Asynchronous.delay(n=1)
    driver.drain()
    assert result.get(timeout=5) == ["LookupError", 2]


def test_every_step_gets_a_fresh_object_and_the_context_tells_who_it_is(app: Durable, driver: Driver) -> None:
    told: list[Any] = []

    @app.machine(name="told", queue="default", priority=3, version=7)
    class Told(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            self.leftover = True
            told.append((ctx.id, ctx.step, ctx.attempt, ctx.queue, ctx.priority, ctx.correlation_key, ctx.version))
            told.append((ctx.parent_id, ctx.app is app, ctx.awaited, ctx.all, list(ctx.children)))
            return Next(self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done(hasattr(self, "leftover"))

    result = app.insert(Told, correlation_key="k")
    driver.drain()
    assert told == [(result.id, "start", 0, "default", 3, "k", 7), (None, True, [], [], [])]
    assert result.get(timeout=5) is False


# Errors


def test_a_handler_that_retries_twice_and_then_gives_up(app: Durable, driver: Driver, view: View) -> None:
    attempts: list[int] = []

    def raising(self: Any, ctx: Any) -> Any:
        attempts.append(ctx.attempt)
        raise ValueError(f"attempt {ctx.attempt}")

    def handle(self: Any, error: BaseException, ctx: Any) -> Any:
        return Retry(ctx.state) if ctx.attempt < 2 else Stop(f"gave up: {error}")

    result = only(app, raising, handle=handle).delay(n=1)
    driver.step()
    status, attempt, error = view.of(result.id, "status", "attempt", "error")
    assert (status, attempt, error["message"]) == ("runnable", 1, "attempt 0")
    driver.drain()
    assert attempts == [0, 1, 2]
    status, attempt, error = view.of(result.id, "status", "attempt", "error")
    assert (status, attempt, error["message"]) == ("failed", 2, "gave up: attempt 2")
    assert result.result == "gave up: attempt 2"


def test_without_a_handler_an_exception_ends_the_instance_with_its_traceback(app: Durable, driver: Driver) -> None:
    def raising(self: Any, ctx: Any) -> Any:
        raise ZeroDivisionError("what a day")

    result = only(app, raising).delay()
    driver.drain()
    with pytest.raises(TaskFailed, match="what a day") as failure:
        result.get(timeout=5)
    assert failure.value.error_type == "ZeroDivisionError"
    assert "raising" in failure.value.traceback_text
    assert driver.steps(result.id) == ["one"]


def test_a_handler_that_raises_ends_the_instance_with_its_own_error(app: Durable, driver: Driver) -> None:
    def raising(self: Any, ctx: Any) -> Any:
        raise ValueError("first")

    def handle(self: Any, error: BaseException, ctx: Any) -> Any:
        raise KeyError("second") from error

    result = only(app, raising, handle=handle).delay()
    driver.drain()
    failure = result.error
    assert failure is not None
    assert (failure.error_type, failure.message) == ("KeyError", "'second'")
    assert "first" in failure.traceback_text


def test_a_handler_may_reroute_and_the_reason_stays_visible(app: Durable, driver: Driver, view: View) -> None:
    def outcome() -> Any:
        raise ValueError("bad luck")

    result = failing(app, outcome, lambda self, error, ctx: Next(self.rescue)).delay()
    driver.step()
    driver.step()
    step_name, attempt, error = view.of(result.id, "step", "attempt", "error")
    assert (step_name, attempt, error["message"]) == ("rescue", 0, "bad luck")
    driver.drain()
    assert result.get(timeout=5) == {"rescued": {"n": 1}}
    assert view.of(result.id, "error") == (None,)


async def _nothing() -> Any:
    return Done()


MALFORMED: dict[str, Callable[[], Any]] = {
    "a negative delay": lambda: Next("rescue", delay=-1),
    "a delay that is no number": lambda: Retry(delay="soon"),  # type: ignore[arg-type]
    "a delay that never ends": lambda: Retry(delay=float("inf")),
    "a timeout that is not a number": lambda: Await("go", then="rescue", timeout=float("nan")),
    "no names": lambda: Await([], then="rescue"),
    "names that are none": lambda: Await([""], then="rescue"),
    "a name with NUL": lambda: Await("a\0b", then="rescue"),
    "names that can't be iterated": lambda: Await(5, then="rescue"),  # type: ignore[arg-type]
    "too many names": lambda: Await([str(n) for n in range(101)], then="rescue"),
    "an unknown step": lambda: Next("rescu"),
    "an unknown step to wake into": lambda: Await("go", then="nowhere"),
    "a step that is no step": lambda: Next(print),
    "a handler for a step": lambda: Next("handle"),
    "None": lambda: None,
    "a plain value": lambda: {"n": 1},
    "an outcome's class": lambda: Done,
    "a coroutine of a step that is none": _nothing,
    "a state of another type": lambda: Next("rescue", [1]),
    "a state that can't be written": lambda: Next("rescue", {"n": object()}),
    "a state with NUL": lambda: Retry({"text": "a\0b"}),
    "a result that can't be written": lambda: Done(object()),
    "a result that is not a number": lambda: Done(float("nan")),
    "a result that is too large": lambda: Done("x" * 2**21),
}


def test_a_malformed_outcome_is_an_error_of_the_step(app: Durable, driver: Driver) -> None:
    errors: dict[str, list[str]] = {case: [] for case in MALFORMED}

    @app.machine(name="rescued")
    class Rescued(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return MALFORMED[ctx.state["case"]]()

        @step
        def rescue(self, ctx: Context) -> Any:
            return Done(ctx.state["case"])

        def handle(self, error: BaseException, ctx: Context) -> Any:
            errors[ctx.state["case"]].append(type(error).__name__)
            return Next(self.rescue)

    results = {case: Rescued.delay(case=case) for case in MALFORMED}
    driver.drain()
    assert {case: result.get(timeout=5) for case, result in results.items()} == {case: case for case in MALFORMED}
    assert {case: len(seen) for case, seen in errors.items()} == dict.fromkeys(MALFORMED, 1)
    assert {name for seen in errors.values() for name in seen} <= {
        "OutcomeError",
        "PayloadError",
        "PayloadTooLargeError",
        "TypeError",
        "ValidationError",
    }


def test_a_malformed_outcome_ends_the_instance_at_once_when_nobody_handles_it(app: Durable, driver: Driver) -> None:
    cases = list(MALFORMED)

    @app.machine(name="failing")
    class Failing(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.bad)

        @step
        def bad(self, ctx: Context) -> Any:
            return MALFORMED[ctx.state["case"]]()

        @step
        def rescue(self, ctx: Context) -> Any:
            return Done()

    results = {case: Failing.delay(case=case) for case in cases}
    driver.drain()
    assert {case: result.status for case, result in results.items()} == dict.fromkeys(cases, "failed")
    assert {case: driver.steps(result.id) for case, result in results.items()} == {c: ["start", "bad"] for c in cases}


def test_a_handler_that_returns_nonsense_ends_the_instance(app: Durable, driver: Driver) -> None:
    result = failing(app, lambda: None, lambda self, error, ctx: None).delay()
    driver.drain()
    failure = result.error
    assert failure is not None
    assert failure.error_type == OutcomeError.__name__
    assert "returned None" in failure.message


def test_a_malformed_outcome_of_one_leaves_its_neighbours_alone(app: Durable, driver: Driver) -> None:
    good = [walker(app).delay() for _ in range(5)]
    bad = failing(app, MALFORMED["a state with NUL"]).delay()
    driver.drain()
    assert [r.status for r in good] == ["done"] * 5
    assert {r.attempts for r in good} == {4}
    assert bad.status == "failed"


@pytest.mark.parametrize(
    ("reason", "message"),
    [("no longer", "no longer"), ({"code": 7}, "{'code': 7}"), (None, ""), (ValueError("v"), "v")],
)
@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_stop_and_cancel_end_at_once_with_their_reason(
    app: Durable, driver: Driver, how: str, reason: Any, message: str
) -> None:
    handled: list[Any] = []

    def body(self: Any, ctx: Any) -> Any:
        if how == "stop":
            return Stop(reason)
        raise Cancel(reason)

    def handle(self: Any, error: BaseException, ctx: Any) -> Any:
        handled.append(error)

    result = only(app, body, handle=handle).delay()
    driver.drain()
    failure = result.error
    assert failure is not None
    assert (result.status, failure.message, handled) == ("failed", message, [])
    assert result.result == (None if isinstance(reason, Exception) else reason)


def test_a_step_may_ask_for_another_attempt_by_raising(app: Durable, driver: Driver, view: View) -> None:
    def body(self: Any, ctx: Any) -> Any:
        if ctx.attempt == 0:
            raise ctx.retry(countdown=60)
        return Done(ctx.attempt)

    result = only(app, body).delay()
    driver.drain()
    assert view.of(result.id, "status", "attempt") == ("scheduled", 1)


def test_a_crash_runs_the_step_again_from_its_committed_state_and_asks_no_handler(
    app: Durable, drivers: Any, view: View
) -> None:
    machine = walker(app)
    result = machine.delay()
    first = drivers()
    first.step()
    claimed = first.claim()
    first.execute(claimed)
    assert first.die([(claimed.id, claimed.token)]).crashed == [result.id]
    assert view.of(result.id, "status", "step", "attempt", "crashes", "version") == ("runnable", "b", 0, 1, 1)
    second = drivers()
    second.drain()
    assert result.get(timeout=5)["seen"] == ["a", "b", "c", "d"]
    assert second.steps(result.id) == ["b", "c", "d"]
    assert view.of(result.id, "crashes") == (0,), "crashes count in one step"


# Versions


def test_two_versions_of_a_machine_run_side_by_side(app: Durable, driver: Driver) -> None:
    def define(version: int) -> type[Machine]:
        @app.machine(name="versioned", version=version)
        class Versioned(Machine):
            @step(initial=True)
            def start(self, ctx: Context) -> Any:
                return Next(self.end)

            @step
            def end(self, ctx: Context) -> Any:
                return Done([version, ctx.version])

        return Versioned

    old, new = define(1), define(2)
    started = old.delay()
    driver.step()
    results = [started, new.delay(), old.delay(), app.insert("versioned")]
    driver.drain()
    assert [r.get(timeout=5) for r in results] == [[1, 1], [2, 2], [1, 1], [2, 2]]


def test_an_unknown_version_is_handed_back_untouched(app: Durable, driver: Driver, view: View, connection: Any) -> None:
    result = walker(app).delay()
    connection.execute(f"UPDATE {app.schema}.instances SET machine_version = 9")
    assert driver.drain() == []
    status, attempt, crashes, reason = view.of(result.id, "status", "attempt", "crashes", "reason")
    assert (status, attempt, crashes) == ("runnable", 0, 0)
    assert "does not know walker version 9" in reason


def test_a_row_that_stands_at_a_step_that_is_gone_fails_and_says_so(
    app: Durable, driver: Driver, connection: Any
) -> None:
    result = walker(app).delay()
    connection.execute(f"UPDATE {app.schema}.instances SET step = 'old'")
    driver.drain()
    failure = result.error
    assert failure is not None
    assert "has no step 'old'" in failure.message


# Inline


def watched(driver: Driver, view: View, instance: int) -> list[tuple[Any, ...]]:
    """What is seen in the database after every commit of an instance, but claims."""
    seen = []
    while claimed := driver.claims(1):
        driver.flush(driver.execute(claimed[0]))
        status, *rest = view.of(instance, "status", "step", "version", "attempt", "state", "result", "error")
        seen.append(("live" if status in ("runnable", "executing") else status, *rest))
    return seen


def test_an_inline_chain_looks_the_same_from_outside_and_holds_one_claim(
    app: Durable, driver: Driver, view: View
) -> None:
    plain = walker(app, "plain").delay()
    plainly = watched(driver, view, plain.id)
    inline = walker(app, "inline", inline=True).delay()
    assert watched(driver, view, inline.id) == plainly
    assert len(plainly) == 4
    assert [view.of(r.id, "token", "version") for r in (plain, inline)] == [(4, 4), (1, 4)]


def test_an_inline_hop_is_committed_before_the_next_step_and_stays_claimed(
    app: Durable, driver: Driver, view: View
) -> None:
    result = walker(app, inline=True).delay()
    driver.step()
    columns = "status", "step", "version", "token", "worker_id", "state ->> 'seen'"
    assert view.of(result.id, *columns) == ("executing", "b", 1, 1, driver.worker, '["a"]')


def hopper(app: Durable, **hop: Any) -> type[Machine]:
    @app.machine(name="hopper", inline=True)
    class Hopper(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.middle, {"n": 1}, **hop)

        @step
        def middle(self, ctx: Context) -> Any:
            return Next(self.end, {"n": ctx.state["n"] + 1})

        @step
        def end(self, ctx: Context) -> Any:
            return Done([ctx.state["n"], len(ctx.awaited), len(ctx.all)])

    return Hopper


def test_one_hop_can_be_opted_out_and_a_delay_is_no_inline_hop(app: Durable, driver: Driver, view: View) -> None:
    result = hopper(app, inline=False).delay()
    driver.step()
    assert view.status(result.id) == "runnable"
    driver.drain()
    assert view.of(result.id, "token", "version") == (2, 3)
    assert result.get(timeout=5) == [2, 0, 0]


def test_a_plain_machine_may_opt_one_hop_in_and_a_delay_is_no_hop(app: Durable, driver: Driver, view: View) -> None:
    @app.machine(name="once")
    class Once(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.middle, inline=True)

        @step
        def middle(self, ctx: Context) -> Any:
            return Next(self.end, inline=True, delay=0.01)

        @step
        def end(self, ctx: Context) -> Any:
            return Done()

    result = Once.delay()
    driver.drain()
    assert view.of(result.id, "status", "token") == ("scheduled", 1)
    wait_until(lambda: driver.promote())
    driver.drain()
    assert view.of(result.id, "status", "token") == ("done", 2)


def test_a_worker_that_stops_between_two_hops_leaves_a_runnable_row(app: Durable, drivers: Any, view: View) -> None:
    result = hopper(app).delay()
    first = drivers()
    commit = first.execute(first.claim())
    first.stop_at = time.monotonic() + 10
    first.flush(commit)
    assert view.of(result.id, "status", "step", "version", "worker_id") == ("runnable", "middle", 1, None)
    assert len(first.engine.buffer) == 0, "nothing new begins there"
    second = drivers()
    first.engine._leave()
    second.drain()
    assert result.get(timeout=5)[0] == 2


def test_an_inline_hop_sees_the_inbox_but_nothing_awaited(app: Durable, driver: Driver) -> None:
    result = hopper(app).delay()
    claimed = driver.claim()
    result.signal("early", 1)
    driver.flush(driver.execute(claimed))
    driver.drain()
    assert result.get(timeout=5) == [2, 0, 1]


def test_an_inline_hop_of_a_lost_claim_runs_nothing(app: Durable, drivers: Any, view: View) -> None:
    result = hopper(app).delay()
    first = drivers()
    commit = first.execute(first.claim())
    first.die()
    assert first.flush(commit) == set()
    assert len(first.engine.buffer) == 0
    assert view.of(result.id, "status", "step", "version") == ("runnable", "start", 0)


def test_a_cancel_ends_an_inline_chain_at_its_next_commit(app: Durable, driver: Driver, view: View) -> None:
    result = hopper(app).delay()
    driver.step()
    assert result.cancel("enough")
    assert view.status(result.id) == "executing"
    driver.drain()
    assert view.of(result.id, "status", "version") == ("cancelled", 2)
    assert driver.steps(result.id) == ["start", "middle"]


def test_a_cancel_before_an_inline_hop_runs_no_further_step(app: Durable, driver: Driver, view: View) -> None:
    result = hopper(app).delay()
    commit = driver.execute(driver.claim())
    result.cancel()
    driver.flush(commit)
    assert view.status(result.id) == "cancelled"
    assert driver.claims() == []


def test_a_machine_that_cannot_be_made_fails_for_what_its_constructor_raises(
    app: Durable, driver: Driver, view: View
) -> None:
    @app.machine(name="unmade")
    class Unmade(Machine):
        def __init__(self) -> None:
            raise ConnectionError("no server there")

        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Done()

    result = app.insert(Unmade)
    driver.step()
    with pytest.raises(TaskFailed, match="ConnectionError: no server there"):
        result.get(timeout=5)


def test_a_step_that_asks_to_come_again_may_be_shown_a_signal_that_it_cannot_read(
    app: Durable, driver: Driver, view: View, connection: Any
) -> None:
    @app.machine(name="patient")
    class Patient(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("go", then=self.woken)

        @step
        def woken(self, ctx: Context) -> Any:
            if ctx.attempt == 0:
                raise ctx.retry(countdown=0)
            return Done(ctx.awaited[0].payload)

    result = app.insert(Patient)
    driver.step()
    result.signal("go", 5)
    change = f"UPDATE {app.schema}.signals SET payload_type = %s"
    connection.execute(change, ["yaml"])
    assert driver.step().kind == "retry"
    connection.execute(change, ["json"])
    driver.step()
    assert result.get(timeout=5) == 5
