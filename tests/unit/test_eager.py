"""task_always_eager: a run here and now, with what a worker would have made of it, and no database at all."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime
from typing import Any

import pytest

from durable import AsyncResult, Durable, Machine, NoTargetError, Retry, TaskFailed, chain, chord, group, step
from durable.errors import PayloadError, ValidationError
from durable.outcomes import Cancel, Done, Next, Stop


def make(**settings: Any) -> Durable:
    return Durable("eager", dsn="postgresql://nobody@127.0.0.1:1/none", task_always_eager=True, **settings)


@pytest.fixture
def app() -> Durable:
    return make(max_attempts=3)


def test_a_call_runs_at_once_and_returns_a_finished_result(app: Durable) -> None:
    ran = []

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        ran.append(x)
        return x + y

    result = add.delay(2, y=3)
    assert ran == [2]
    assert isinstance(result, AsyncResult)
    assert result.id < 0
    assert (result.status, result.ready(), result.successful(), result.failed()) == ("done", True, True, False)
    assert (result.get(timeout=0), result.result, result.error, result.attempts) == (5, 5, None, 1)
    assert (list(result.children), result.cancel(), result.retry()) == ([], False, False)
    with pytest.raises(NoTargetError):
        result.signal("x")
    assert add.apply_async((1, 1), countdown=100, priority=3, correlation_key="k").get() == 2
    assert app.insert("add", args=(1, 2)).get() == 3
    assert [r.get() for r in app.insert_many([(add, {"args": (1, 1)}), (add, {"args": (2, 2)})])] == [2, 4]
    with app.batch():
        assert add.delay(1, 2).get() == 3


def test_arguments_and_results_go_through_the_serializer(app: Durable) -> None:
    seen: list[Any] = []

    @app.task(name="keep")
    def keep(value: Any) -> Any:
        seen.append(value)
        return (1, 2, date(2030, 1, 1))

    assert keep.delay((1, datetime(2030, 1, 1, tzinfo=UTC))).get() == [1, 2, date(2030, 1, 1)]
    assert seen == [[1, datetime(2030, 1, 1, tzinfo=UTC)]]
    with pytest.raises(PayloadError):
        keep.delay(object())
    result = app.task(name="bad")(lambda: object()).delay()
    with pytest.raises(TaskFailed, match="PayloadError"):
        result.get()


def test_attempts_follow_one_another(app: Durable) -> None:
    tries = []

    @app.task(name="flaky", bind=True)
    def flaky(self: Any) -> int:
        tries.append(self.request.retries)
        if len(tries) == 1:
            raise OSError("again")
        if len(tries) == 2 and not self.cancel_requested:
            self.retry(countdown=1000)
        return 7

    result = flaky.delay()
    assert (result.get(), tries, result.attempts) == (7, [0, 1, 2], 3)


@pytest.mark.parametrize(
    ("make_outcome", "text", "attempts"),
    [
        (lambda: 1 / 0, "ZeroDivisionError", 3),
        (lambda: (_ for _ in ()).throw(Cancel("enough")), "enough", 1),
        (lambda: Stop("reason"), "reason", 1),
        (lambda: Stop(ValueError("why")), "ValueError: why", 1),
        (lambda: Retry(), "another attempt", 3),
        (lambda: Next("x"), "a task has one step", 1),
    ],
)
def test_failures_are_kept_as_failures(app: Durable, make_outcome: Any, text: str, attempts: int) -> None:
    result = app.task(name="task")(make_outcome).delay()
    assert (result.status, result.attempts) == ("failed", attempts)
    with pytest.raises(TaskFailed, match=text):
        result.get()


def test_propagating_raises_the_original_from_delay() -> None:
    app = make(task_eager_propagates=True, max_attempts=1)

    @app.task(name="boom")
    def boom() -> None:
        raise ValueError("original")

    with pytest.raises(ValueError, match="original"):
        boom.delay()
    with pytest.raises(ValueError, match="original"):
        (boom.s() | boom.si()).delay()


def test_canvases_run_too(app: Durable) -> None:
    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="total", ignore_result=True)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task(name="boom", max_attempts=1)
    def boom() -> None:
        raise ValueError("no")

    assert chain(add.s(1, 1), add.s(2), group(add.s(1), add.s(2) | add.s(3))).delay().get() == [5, 9]
    whole = chord([add.s(n, n) for n in range(3)])(total.s())
    assert whole.get() == 6
    assert [child.result for child in whole.children] == [0, 2, 4, 6]
    assert add.chunks([(1, 1), (2, 2), (3, 3)], 2)().get() == [[2, 4], [6]]
    assert group(boom.s(), on_error="pass").delay().get()[0]["failed"]["type"] == "ValueError"
    with pytest.raises(TaskFailed, match="1 of 1 parts failed"):
        group(boom.s()).delay().get()
    with pytest.raises(TaskFailed, match="ValueError: no"):
        (boom.s() | add.si(1, 1)).delay().get()


def test_coroutine_functions_run_with_and_without_a_running_loop(app: Durable) -> None:
    @app.task(name="later")
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return -x

    assert later.delay(1).get() == -1

    async def main() -> int:
        result = await later.adelay(2)
        assert await result.astatus() == "done"
        return await result.aget()

    assert asyncio.run(main()) == -2


def test_a_task_that_starts_another_does_so_at_once(app: Durable) -> None:
    @app.task(name="inner")
    def inner() -> int:
        return 5

    outer = app.task(name="outer")(lambda: inner.delay().id < 0)
    assert outer.delay().get() is True


def test_machines_and_connections_are_refused_with_what_to_do(app: Durable) -> None:
    @app.machine(name="Checkout")
    class Checkout(Machine):
        @step
        def start(self, ctx: Any) -> Any:
            return Done(1)

    with pytest.raises(ValidationError, match=r"durable\.testing\.drain"):
        Checkout.delay()

    @app.task(name="writes", bind=True, max_attempts=1)
    def writes(ctx: Any) -> None:
        ctx.connection.execute("SELECT 1")

    with pytest.raises(TaskFailed, match="needs a database"):
        writes.delay().get()
