"""chain, group, chord, map, chunks: what they return, how they fail, and what they cost."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from durable import (
    Done,
    Durable,
    DurableError,
    Machine,
    ScheduleChildren,
    Signature,
    TaskFailed,
    chain,
    chord,
    group,
    signature,
    step,
)
from durable.errors import DefinitionError, PayloadError, UnknownTaskError, ValidationError
from durable.outcomes import Cancel
from tests.machines.driver import Driver, View


class Tasks:
    def __init__(self, app: Durable) -> None:
        self.app = app
        self.ran: list[Any] = []

        @app.task(name="add")
        def add(x: int, y: int) -> int:
            self.ran.append(("add", x, y))
            return x + y

        @app.task(name="mul")
        def mul(x: int, y: int) -> int:
            return x * y

        @app.task(name="total")
        def total(numbers: list[Any]) -> int:
            self.ran.append(("total", numbers))
            return sum(n for n in numbers if isinstance(n, int))

        @app.task(name="boom", max_attempts=1)
        def boom(*args: Any) -> None:
            raise ValueError(f"no {args}")

        @app.task(name="echo")
        def echo(*args: Any, **kwargs: Any) -> list[Any]:
            return [list(args), kwargs]

        self.add, self.mul, self.total, self.boom, self.echo = add, mul, total, boom, echo


@pytest.fixture
def tasks(app: Durable) -> Tasks:
    return Tasks(app)


def test_a_chain_hands_each_result_to_the_next(tasks: Tasks, driver: Driver) -> None:
    result = chain(tasks.add.s(2, 2), tasks.add.s(4), tasks.mul.s(8)).delay()
    driver.drain()
    assert result.get(timeout=1) == 64


def test_the_bar_makes_a_chain_and_partial_arguments_go_in_front_of_the_first(tasks: Tasks, driver: Driver) -> None:
    canvas = tasks.add.s(4) | tasks.mul.s(8)
    first, second = canvas.delay(2), canvas(1)
    driver.drain()
    assert (first.get(timeout=1), second.get(timeout=1)) == (48, 40)


def test_an_immutable_part_gets_its_own_arguments_only(tasks: Tasks, driver: Driver) -> None:
    result = (tasks.add.s(2, 2) | tasks.echo.si("own") | tasks.echo.s(key=1)).delay()
    driver.drain()
    assert result.get(timeout=1) == [[[["own"], {}]], {"key": 1}]


def test_a_group_returns_the_results_in_order(tasks: Tasks, driver: Driver) -> None:
    result = group(tasks.add.s(n, n) for n in range(20)).delay()
    driver.drain()
    assert result.get(timeout=1) == [2 * n for n in range(20)]


def test_arguments_given_to_a_group_reach_every_part(tasks: Tasks, driver: Driver) -> None:
    result = group(tasks.add.s(n) for n in range(3))(10)
    driver.drain()
    assert result.get(timeout=1) == [10, 11, 12]


@pytest.mark.parametrize("how", ["called", "two arguments", "bar", "header with bar"])
def test_a_chord_hands_the_list_to_its_body(tasks: Tasks, driver: Driver, how: str) -> None:
    header = [tasks.add.s(n, n) for n in range(5)]
    if how == "called":
        result = chord(header)(tasks.total.s())
    elif how == "two arguments":
        result = chord(header, tasks.total.s()).delay()
    elif how == "bar":
        result = (group(header) | tasks.total.s()).delay()
    else:
        result = (chord(header) | tasks.total.s())()
    driver.drain()
    assert result.get(timeout=1) == 20


def test_canvases_nest(tasks: Tasks, driver: Driver) -> None:
    inner = chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s())
    canvas = chain(
        group(tasks.add.s(1, 2) | tasks.mul.s(10), inner, group(tasks.add.s(0, 1), tasks.add.s(0, 2))),
        tasks.echo.s(),
        group(tasks.echo.s("left"), tasks.echo.s("right") | tasks.echo.si("end")),
    )
    result = canvas.delay()
    driver.drain()
    value = [[[30, 6, [1, 2]]], {}]
    assert result.get(timeout=1) == [[[value, "left"], {}], [["end"], {}]]


def test_an_empty_group_is_an_empty_list_and_goes_on(tasks: Tasks, driver: Driver) -> None:
    empty, chained = group([]), group([]) | tasks.total.s()
    results = [tasks.app.signature(empty).delay(), chained.delay()]
    driver.drain()
    assert [result.get(timeout=1) for result in results] == [[], 0]


def test_a_chain_is_one_instance_however_long(tasks: Tasks, driver: Driver, view: View) -> None:
    result = chain([tasks.add.s(0, 1), *[tasks.add.s(1) for _ in range(29)]]).delay()
    driver.drain()
    assert result.get(timeout=1) == 30
    assert view.rows("SELECT count(*) FROM {schema}.instance_view WHERE machine = 'durable.canvas'") == [(1,)]
    assert {child.machine for child in result.children} == {"add"}
    assert len(result.children) == 30


def test_a_chain_stops_at_the_first_failure_and_fails_with_that_error(tasks: Tasks, driver: Driver) -> None:
    result = chain(tasks.add.s(1, 1), tasks.boom.s(), tasks.add.s(5)).delay()
    driver.drain()
    with pytest.raises(TaskFailed) as caught:
        result.get(timeout=1)
    assert (caught.value.error_type, caught.value.message) == ("ValueError", "no (2,)")
    assert "raise ValueError" in caught.value.traceback_text
    assert tasks.ran == [("add", 1, 1)]


def test_a_cancelled_part_stops_its_chain(tasks: Tasks, driver: Driver) -> None:
    result = chain(tasks.add.s(1, 1).set(countdown=1000), tasks.add.s(5)).delay()
    driver.drain()
    (child,) = result.children
    assert tasks.app.cancel(child.id, "unwanted")
    driver.drain()
    with pytest.raises(TaskFailed, match="unwanted"):
        result.get(timeout=1)


def test_a_chord_whose_header_failed_ends_when_all_of_it_has_and_names_those(tasks: Tasks, driver: Driver) -> None:
    header = [tasks.boom.s(1), tasks.add.s(1, 1).set(countdown=1000), tasks.boom.s(2)]
    result = chord(header, tasks.total.s()).delay()
    driver.drain()
    assert result.status == "awaiting_children", "one of the header still waits"
    tasks.app.cancel(next(child.id for child in result.children if child.machine == "add"), "enough")
    driver.drain()
    with pytest.raises(TaskFailed) as caught:
        result.get(timeout=1)
    assert caught.value.error_type == "GroupFailed"
    assert "3 of 3 parts failed: 0 (boom, instance" in caught.value.message
    assert "ValueError: no (2,)" in caught.value.message
    assert "enough" in caught.value.message
    assert not tasks.ran, "the body did not run"


def test_on_error_pass_hands_failures_over_as_values(tasks: Tasks, driver: Driver) -> None:
    result = chord([tasks.add.s(1, 1), tasks.boom.s(7)], tasks.echo.s(), on_error="pass").delay()
    alone = group(tasks.boom.s(8), on_error="pass").delay()
    driver.drain()
    ((values,), _) = result.get(timeout=1)
    failed = next(child.id for child in result.children if child.machine == "boom")
    assert values == [2, {"failed": {"id": failed, "type": "ValueError", "message": "no (7,)"}}]
    assert alone.get(timeout=1)[0]["failed"]["message"] == "no (8,)"


def test_a_failure_inside_a_nested_canvas_reaches_the_top(tasks: Tasks, driver: Driver) -> None:
    result = chain(tasks.add.s(1, 1), group(tasks.add.s(1) | tasks.boom.s(), tasks.add.s(2))).delay()
    driver.drain()
    with pytest.raises(TaskFailed, match=r"1 of 2 parts failed: 0 \(durable.canvas.*no \(3,\)"):
        result.get(timeout=1)


def test_retries_of_a_part_are_the_parts_own(tasks: Tasks, driver: Driver) -> None:
    tries = []

    @tasks.app.task(name="flaky", backoff=lambda attempt: 0.0)
    def flaky(x: int) -> int:
        tries.append(x)
        if len(tries) < 3:
            raise OSError("again")
        return x * 2

    result = chain(tasks.add.s(1, 1), flaky.s(), tasks.add.s(1)).delay()
    driver.drain()
    assert (result.get(timeout=1), tries) == (5, [2, 2, 2])


def test_map_starmap_and_chunks(tasks: Tasks, driver: Driver) -> None:
    @tasks.app.task(name="context", bind=True)
    def context(ctx: Any, x: int) -> list[int]:
        return [ctx.attempt, x]

    @tasks.app.task(name="later")
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return -x

    results = [
        tasks.total.map([[1, 2], [3]]).delay(),
        tasks.add.starmap(zip(range(3), range(3), strict=True)).delay(),
        tasks.add.chunks(zip(range(5), range(5), strict=True), 2)(),
        tasks.add.chunks(zip(range(5), range(5), strict=True), 2).group().delay(),
        (tasks.add.chunks([(1, 1), (2, 2)], 1) | tasks.echo.s()).delay(),
        context.map([4]).delay(),
        later.map([1, 2]).delay(),
    ]
    driver.drain()
    assert [result.get(timeout=1) for result in results] == [
        [3, 3],
        [0, 2, 4],
        [[0, 2], [4, 6], [8]],
        [[0, 2], [4, 6], [8]],
        [[[[2], [4]]], {}],
        [[0, 4]],
        [-1, -2],
    ]
    assert len(results[2].children) == 3


def test_a_mapped_task_that_asks_for_an_outcome_of_its_own_fails(tasks: Tasks, driver: Driver) -> None:
    @tasks.app.task(name="outcome", max_attempts=1)
    def outcome(x: int) -> Any:
        return Done(x)

    result = outcome.map([1]).delay()
    driver.drain()
    with pytest.raises(TaskFailed, match="outcome returned Done"):
        result.get(timeout=1)


def test_signatures_survive_json_and_can_be_arguments(tasks: Tasks, driver: Driver) -> None:
    app = tasks.app
    canvas = chord([tasks.add.s(1, 1), tasks.add.s(2, 2) | tasks.mul.s(3)], tasks.total.s())
    copy = app.signature(json.loads(json.dumps(canvas)))
    assert copy == canvas

    @app.task(name="starts")
    def starts(what: dict[str, Any]) -> int:
        return app.signature(what).delay().id

    first, second = copy.delay(), starts.delay(canvas)
    driver.drain()
    driver.drain()
    assert first.get(timeout=1) == 14
    assert app.result(second.get(timeout=1)).get(timeout=1) == 14


def test_a_signature_by_name_is_bound_by_its_app_or_its_neighbours(tasks: Tasks, driver: Driver) -> None:
    loose = signature("add", args=(2, 2))
    with pytest.raises(DefinitionError, match=r"app\.signature"):
        loose.delay()
    results = [tasks.app.signature("add", args=(2, 2)).delay(), (loose | tasks.mul.s(2)).delay()]
    driver.drain()
    assert [result.get(timeout=1) for result in results] == [4, 8]


def test_options_of_a_signature_are_those_of_its_insert(tasks: Tasks, view: View) -> None:
    sig = tasks.add.s(1, 1).set(queue="slow", priority=7, expires=timedelta(hours=1))
    assert sig.clone(priority=8)["options"]["priority"] == 8
    eta = datetime.now(UTC) + timedelta(minutes=5)
    first = sig.apply_async(eta=eta)
    assert view.of(first.id, "queue", "priority", "status", "eligible_at") == ("slow", 7, "scheduled", eta)


def test_a_canvas_waits_where_its_first_task_does_unless_told(tasks: Tasks, view: View) -> None:
    @tasks.app.task(name="mail", queue="emails", priority=3)
    def mail() -> None: ...

    where = [
        chain(mail.s(), tasks.add.si(1, 1)).delay(),
        group(mail.s().set(queue="bulk"), tasks.add.s(1, 1)).delay(),
        chain(mail.s(), tasks.add.si(1, 1)).apply_async(queue="canvas", priority=1, countdown=60),
    ]
    assert [view.of(result.id, "queue", "priority", "status") for result in where] == [
        ("emails", 3, "runnable"),
        ("bulk", 3, "runnable"),
        ("canvas", 1, "scheduled"),
    ]


def test_an_expired_or_delayed_part_keeps_its_own_options_inside(tasks: Tasks, driver: Driver, view: View) -> None:
    result = chain(tasks.add.s(1, 1), tasks.add.s(1).set(queue="slow", countdown=60)).delay()
    driver.drain()
    last = max(child.id for child in result.children)
    assert view.of(last, "queue", "status") == ("slow", "scheduled")


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown task": (lambda t: chain(t.add.s(1, 1), signature("ad")), UnknownTaskError, "'add'"),
    "arguments that do not fit": (lambda t: chain(t.add.s(1, 1), t.add.s(1, 2)), TypeError, r"add\(\)"),
    "too few arguments": (lambda t: group(t.add.s(1)), TypeError, "missing"),
    "a payload that is none": (lambda t: chain(t.add.s(1, 1), t.add.s(object())), PayloadError, "arguments"),
    "no signature": (lambda t: chain(t.add.s(1, 1), t.add), ValidationError, "write task.s"),
    "an empty chain": (lambda t: chain(), ValidationError, "at least one"),
    "a link": (lambda t: t.add.s(1, 1).set(link=t.add.s(1)), ValidationError, "chain the signatures"),
    "an unknown option": (lambda t: t.add.s(1, 1).set(queu="x"), ValidationError, "'queue'"),
    "an unknown policy": (lambda t: group(t.add.s(1, 1), on_error="maybe"), ValidationError, "'fail' or 'pass'"),
    "a dict that is none": (lambda t: t.app.signature({"kind": "x"}), ValidationError, "is no signature"),
    "too many": (lambda t: group(t.add.s(1, 1) for _ in range(10_001)), ValidationError, r"use task\.chunks"),
    "chunks of nothing": (lambda t: t.add.chunks([], 0), ValidationError, "at least one"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_can_not_run_is_refused_before_anything_is_written(tasks: Tasks, view: View, what: str) -> None:
    make, error, text = BAD[what]
    with pytest.raises(error, match=text):
        make(tasks).delay()
    assert view.count("instances") == 0


@pytest.mark.parametrize("option", ["link", "link_error", "task_id", "routing_key", "shadow"])
def test_celery_s_options_of_a_call_are_refused_with_what_to_do(tasks: Tasks, view: View, option: str) -> None:
    given = {option: "x"}
    with pytest.raises(TypeError, match=f"no option '{option}'; "):
        tasks.add.apply_async((1, 1), **given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"no option '{option}'; "):
        tasks.app.insert(tasks.add, args=(1, 1), **given)
    with pytest.raises(ValidationError, match=f"no option '{option}'; "):
        tasks.add.s(1, 1).apply_async(**given)
    assert view.count("instances") == 0


def test_a_signature_called_runs_the_function_here(tasks: Tasks, view: View) -> None:
    assert tasks.add.s(2)(3) == 5
    assert view.count("instances") == 0


def test_the_async_twins(tasks: Tasks, driver: Driver) -> None:
    async def main() -> list[int]:
        one = await (tasks.add.s(2) | tasks.mul.s(3)).adelay(1)
        two = await tasks.add.s(1).aapply_async((1,), priority=2)
        await tasks.app.aclose()
        return [one.id, two.id]

    ids = asyncio.run(main())
    driver.drain()
    assert [tasks.app.result(id_).get(timeout=1) for id_ in ids] == [9, 2]


def test_a_canvas_can_be_inserted_batched_and_be_the_child_of_a_machine(tasks: Tasks, driver: Driver) -> None:
    app = tasks.app

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def start(self, ctx: Any) -> Any:
            return ScheduleChildren(
                [tasks.add.s(1, 1) | tasks.mul.s(5), (tasks.add.s(1), {"args": (1,), "priority": 3})], then=self.end
            )

        @step
        def end(self, ctx: Any) -> Any:
            return Done([child.result for child in ctx.children])

    canvas = tasks.add.s(1, 1) | tasks.mul.s(5)
    with app.batch():
        batched = canvas.delay()
    results = [Parent.delay(), app.insert(canvas, correlation_key="once"), batched]
    results += app.insert_many([(canvas, {}), (tasks.add.s(1), {"args": (2,)})])
    driver.drain()
    assert [result.get(timeout=1) for result in results] == [[10, 2], 10, 10, 10, 3]


def test_results_of_a_group_are_in_its_order_whatever_keys_its_parts_have(tasks: Tasks, driver: Driver) -> None:
    keys = [None, "b", None, "a", "c"]
    result = group(
        tasks.add.s(n, 0).set(**({"correlation_key": key} if key else {})) for n, key in enumerate(keys)
    ).delay()
    driver.drain()
    assert result.get(timeout=1) == [0, 1, 2, 3, 4]


def test_cancelling_a_canvas_with_cascade_ends_its_parts(tasks: Tasks, driver: Driver) -> None:
    result = group(tasks.add.s(1, 1).set(countdown=1000), tasks.add.s(1, 1) | tasks.add.s(1).set(countdown=9)).delay()
    driver.drain()
    assert result.cancel("enough", cascade=True)
    assert {child.status for child in result.children} == {"cancelled"}


def test_a_task_that_only_newer_workers_know_is_waited_for(tasks: Tasks, driver: Driver, view: View) -> None:
    @tasks.app.task(name="new")
    def new(x: int) -> int:
        return x

    result = chain(tasks.add.s(1, 1), new.s()).delay()
    known = tasks.app.definitions.pop(("new", 1))
    driver.drain()
    assert view.of(result.id, "status", "step") == ("scheduled", "joined")
    tasks.app.definitions["new", 1] = known
    view.rows("UPDATE {schema}.instances SET status = 'runnable' WHERE id = %s RETURNING id", result.id)
    driver.drain()
    assert result.get(timeout=1) == 2


def test_a_crash_between_any_two_steps_loses_and_repeats_nothing(tasks: Tasks, drivers: Any) -> None:
    result = chord([tasks.add.s(n, n) for n in range(3)], tasks.total.s()).delay()
    for _ in range(50):
        doomed = drivers()
        claimed = doomed.claims(1)
        if not claimed:
            break
        doomed.execute(claimed[0])
        doomed.die([(claimed[0].id, claimed[0].token)])
        drivers().step()
    assert result.get(timeout=1) == 6
    assert len(result.children) == 4


def test_cancel_in_a_part_fails_its_chain_with_its_reason(tasks: Tasks, driver: Driver) -> None:
    @tasks.app.task(name="gives_up")
    def gives_up() -> None:
        raise Cancel("not today")

    result = chain(gives_up.s(), tasks.add.si(1, 1)).delay()
    driver.drain()
    with pytest.raises(DurableError, match="not today"):
        result.get(timeout=1)


def test_what_a_signature_shows(tasks: Tasks) -> None:
    assert repr(tasks.add.s(1, y=2) | tasks.mul.s(3)) == "chain(add(1, y=2), mul(3))"
    assert isinstance(tasks.add.s(1), Signature)
