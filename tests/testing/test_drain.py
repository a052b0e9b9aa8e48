"""drain runs what is runnable in the test's own process, by the production statements."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Await, Cancel, Context, Done, Durable, Machine, Next, Retry, ScheduleChildren, Stop, step
from durable.errors import DrainError, DurableError, TaskFailed, UnknownTaskError, ValidationError
from durable.testing import drain
from tests.machines.driver import View


@pytest.fixture
def checkout(app: Durable) -> Any:
    @app.machine(name="checkout")
    class Checkout(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.reserve, {"at": ["start"]})

        @step
        def reserve(self, ctx: Context) -> Any:
            return Next(self.pay, {"at": [*ctx.state["at"], "reserve"]})

        @step
        def pay(self, ctx: Context) -> Any:
            return Await("paid", then=self.ship, timeout=3600)

        @step
        def ship(self, ctx: Context) -> Any:
            return Done([signal.payload for signal in ctx.awaited])

    return Checkout


def test_it_runs_until_nothing_is_runnable_and_tallies_the_outcomes(app: Durable, checkout: Any) -> None:
    result = checkout.delay()
    assert drain(app) == {"steps": 3, "next": 2, "await": 1}
    assert result.status == "awaiting_signal"
    result.signal("paid", 5)
    assert drain(app) == {"steps": 1, "done": 1}
    assert result.get(timeout=5) == [5]
    assert drain(app) == {"steps": 0}


def test_the_outcomes_have_one_word_each(app: Durable) -> None:
    @app.task(name="leaf")
    def leaf(n: int) -> int:
        if n == 1:
            raise Cancel("no")
        return n

    @app.machine(name="tree")
    class Tree(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            if not ctx.attempt:
                return Retry(delay=0)
            return ScheduleChildren([(leaf, {"args": (n,)}) for n in range(3)], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            app.cancel(ctx.id)
            return Done([child.status for child in ctx.children])

    result = Tree.delay()
    assert drain(app) == {"steps": 6, "retry": 1, "schedule_children": 1, "done": 2, "failed": 1, "cancelled": 1}
    assert result.status == "cancelled"


def test_inline_machines_run_on_their_claim(app: Durable, view: View) -> None:
    @app.machine(name="counter", inline=True)
    class Counter(Machine):
        @step(initial=True)
        def count(self, ctx: Context) -> Any:
            n = ctx.state.get("n", 0) + 1
            return Next(self.count, {"n": n}) if n < 5 else Done(n)

    result = Counter.delay()
    result.signal("seen")
    assert drain(app) == {"steps": 5, "next": 4, "done": 1}
    assert view.of(result.id, "token", "version") == (1, 5)


def test_scheduled_rows_are_run_as_if_their_time_had_come_in_their_order(app: Durable) -> None:
    ran = []

    @app.task(name="note")
    def note(text: str) -> None:
        ran.append(text)

    for countdown, text in ((7200, "late"), (60, "soon"), (0, "now")):
        note.apply_async(args=(text,), countdown=countdown)
    assert drain(app, with_scheduled=False) == {"steps": 1, "done": 1}
    assert ran == ["now"]
    assert drain(app) == {"steps": 2, "done": 2}
    assert ran == ["now", "soon", "late"]


def test_what_is_due_by_the_clock_runs_without_being_asked_for(app: Durable, view: View) -> None:
    @app.task(name="note")
    def note() -> None: ...

    result = note.apply_async(countdown=3600)
    view.rows("UPDATE {schema}.instances SET eligible_at = clock_timestamp() - interval '1 s' RETURNING id")
    assert drain(app, with_scheduled=False) == {"steps": 1, "done": 1}
    assert result.status == "done"


def test_failures_are_retried_to_their_end(app: Durable) -> None:
    @app.task(name="flaky", max_attempts=4)
    def flaky() -> None:
        raise OSError("again")

    result = flaky.delay()
    assert drain(app) == {"steps": 4, "retry": 3, "failed": 1}
    with pytest.raises(TaskFailed, match="OSError: again"):
        result.get(timeout=5)


def test_a_steps_own_exception_can_be_had_after_its_outcome_was_committed(app: Durable) -> None:
    error = OSError("mine")

    @app.task(name="flaky", max_attempts=2)
    def flaky() -> None:
        raise error

    result = flaky.delay()
    with pytest.raises(OSError, match="mine") as raised:
        drain(app, raise_errors=True)
    assert raised.value is error
    assert (result.status, result.attempts) == ("scheduled", 1)
    assert drain(app) == {"steps": 1, "failed": 1}


def test_a_failure_of_the_test_itself_ends_the_drain_and_costs_the_step_nothing(app: Durable, view: View) -> None:
    @app.task(name="checked")
    def checked() -> None:
        pytest.fail("wrong")

    result = checked.delay()
    with pytest.raises(pytest.fail.Exception, match="wrong"):
        drain(app)
    assert view.of(result.id, "status", "attempt", "version") == ("runnable", 0, 0)


def test_only_the_queue_asked_for_is_drained(app: Durable) -> None:
    @app.task(name="mail", queue="emails")
    def mail() -> None: ...

    @app.task(name="other")
    def other() -> None: ...

    mails, others = mail.delay(), other.delay()
    mail.apply_async(countdown=60)
    assert drain(app, "emails") == {"steps": 2, "done": 2}
    assert (mails.status, others.status) == ("done", "runnable")
    assert drain(app) == {"steps": 1, "done": 1}
    with pytest.raises(ValidationError):
        drain(app, "a:b")


def test_the_best_row_of_all_queues_comes_first(app: Durable) -> None:
    ran = []

    @app.task(name="note", bind=True)
    def note(ctx: Context) -> None:
        ran.append(ctx.priority)

    for priority, queue in ((5, "a"), (1, "b"), (3, "c")):
        note.apply_async(priority=priority, queue=queue)
    drain(app)
    assert ran == [1, 3, 5]


def test_a_machine_that_does_not_come_to_rest_is_an_error_with_the_tally(app: Durable, view: View) -> None:
    @app.machine(name="endless")
    class Endless(Machine):
        @step
        def again(self, ctx: Context) -> Any:
            return Next(self.again, delay=60)

    result = Endless.delay()
    with pytest.raises(DrainError, match=r"max_steps=7.*endless.*'again'") as raised:
        drain(app, max_steps=7)
    assert raised.value.tally == {"steps": 7, "next": 7}
    assert view.of(result.id, "status", "version") == ("runnable", 7)


def test_rows_of_unknown_tasks_are_left_alone_and_named_after_the_rest_is_done(app: Durable, view: View) -> None:
    other = Durable("other", dsn=app.database.dsn(), schema=app.schema)

    @other.task(name="theirs")
    def theirs() -> None: ...

    @app.task(name="ours")
    def ours() -> None: ...

    strange = theirs.delay()
    result = ours.delay()
    with pytest.raises(UnknownTaskError, match="theirs:1"):
        drain(app)
    assert result.status == "done"
    assert view.of(strange.id, "status", "attempt", "crashes") == ("runnable", 0, 0)
    other.close()


def test_expired_rows_end_without_a_step(app: Durable) -> None:
    @app.task(name="note")
    def note() -> None: ...

    result = note.apply_async(expires=0.001)
    assert drain(app) == {"steps": 0}
    assert result.status == "cancelled"


def test_rows_with_a_crash_behind_them_run_too(app: Durable, view: View) -> None:
    @app.task(name="note")
    def note() -> None: ...

    result = note.delay()
    view.rows("UPDATE {schema}.instances SET crashes = 1 RETURNING id")
    assert drain(app) == {"steps": 1, "done": 1}
    assert result.status == "done"


def test_nothing_is_held_afterwards_and_the_lease_is_dead(app: Durable, view: View, checkout: Any) -> None:
    checkout.delay()
    drain(app)
    assert view.rows("SELECT count(*) FROM {schema}.instances WHERE status = 'executing'") == [(0,)]
    assert view.rows("SELECT count(*) FROM {schema}.workers WHERE dead_at IS NULL") == [(0,)]


def test_async_tasks_run_and_may_use_the_app(app: Durable) -> None:
    @app.task(name="second")
    async def second(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    @app.task(name="first")
    async def first() -> int:
        return (await second.adelay(1)).id

    result = first.delay()
    assert drain(app) == {"steps": 2, "done": 2}
    assert app.result(result.get(timeout=5)).get(timeout=5) == 2


def test_it_can_be_called_where_an_event_loop_runs(app: Durable) -> None:
    @app.task(name="first")
    async def first() -> int:
        await asyncio.sleep(0)
        return 3

    async def test() -> Any:
        result = await first.adelay()
        tally = drain(app)
        value = await result.aget(timeout=5)
        await app.aclose()
        return tally, value

    assert asyncio.run(test()) == ({"steps": 1, "done": 1}, 3)


def test_an_outcome_that_the_database_refuses_fails_its_instance(app: Durable) -> None:
    @app.machine(name="wrong")
    class Wrong(Machine):
        @step
        def bad(self, ctx: Context) -> Any:
            return Await("go", then=self.bad, timeout=1e300)

        def handle(self, error: BaseException, ctx: Context) -> Any:
            return Stop(error)

    result = Wrong.delay()
    assert drain(app) == {"steps": 1, "failed": 1}
    assert result.failed()


def test_a_step_cannot_drain(app: Durable) -> None:
    @app.task(name="nested", max_attempts=1)
    def nested() -> None:
        drain(app)

    nested.delay()
    with pytest.raises(DurableError, match="step can't drain"):
        drain(app, raise_errors=True)
