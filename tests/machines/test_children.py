"""Children: spawned with the park, counted when they end, seen by their parent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from durable import Await, Child, Context, Done, Durable, Machine, Next, ScheduleChildren, Stop, TaskFailed, step
from durable.children import Children
from durable.errors import OutcomeError
from durable.instance import Claimed
from durable.storage import inspection
from durable.storage.claims import Commit
from tests.machines.driver import Driver, Drivers, View


@pytest.fixture
def kids(app: Durable) -> dict[str, Any]:
    """Things to have as children: tasks `double` and `fail`, machines `sleeper` (awaits "go") and `walker`."""

    @app.task(name="double")
    def double(n: int) -> int:
        return n * 2

    @app.task(name="fail", max_attempts=1)
    def fail(text: str = "bad") -> None:
        raise ValueError(text)

    @app.machine(name="sleeper")
    class Sleeper(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("go", then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done(ctx.awaited[0].payload)

    @app.machine(name="walker")
    class Walker(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.end, {"n": ctx.state["n"] + 1})

        @step
        def end(self, ctx: Context) -> Any:
            return Done({"n": ctx.state["n"], "parent": ctx.parent_id})

    return {"double": double, "fail": fail, "sleeper": Sleeper, "walker": Walker}


@pytest.fixture
def parent(app: Durable) -> Callable[..., type[Machine]]:
    """A machine that schedules what `rounds` make, one after the other, and ends with what it saw each time."""

    def define(*rounds: Callable[[], Any], name: str = "parent", handle: Any = None) -> type[Machine]:
        class Parent(Machine):
            @step(initial=True)
            def start(self, ctx: Context) -> Any:
                return ScheduleChildren(rounds[0](), then=self.join, state={"round": 1, "seen": [], "all": []})

            @step
            def join(self, ctx: Context) -> Any:
                number = ctx.state["round"]
                state = {
                    "round": number + 1,
                    "seen": [*ctx.state["seen"], told(ctx.children)],
                    "all": [*ctx.state["all"], len(ctx.children_all)],
                }
                if number < len(rounds):
                    return ScheduleChildren(rounds[number](), then=self.join, state=state)
                return Done(state)

        if handle is not None:
            Parent.handle = handle  # type: ignore[method-assign]
        return app.machine(Parent, name=name)  # type: ignore[no-any-return]

    return define


def told(children: Any) -> list[list[Any]]:
    return [[child.machine, child.status, child.result] for child in children]


def pending(view: View, instance: int) -> Any:
    return view.of(instance, "status", "children_pending")


def double(n: int) -> tuple[str, dict[str, Any]]:
    return "double", {"args": (n,)}


# Fan-out and join


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_parent_goes_on_once_when_the_last_child_has_ended(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any, count: int
) -> None:
    result = parent(lambda: [double(n) for n in range(count)]).delay()
    driver.step()
    if count:
        assert pending(view, result.id) == ("awaiting_children", count)
        assert driver.ready == {"default": count}
    else:
        assert pending(view, result.id) == ("runnable", 0)
        assert driver.ready == {"default": 1}
    for left in range(count, 0, -1):
        assert pending(view, result.id) == ("awaiting_children", left)
        driver.step()
    assert view.of(result.id, "status", "step", "attempt") == ("runnable", "join", 0)
    driver.drain()
    assert result.get(timeout=5)["seen"] == [[["double", "done", n * 2] for n in range(count)]]
    assert driver.steps(result.id) == ["start", "join"]


def test_children_that_are_all_duplicates_are_like_none(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any
) -> None:
    occupant = app.insert(kids["sleeper"], correlation_key="taken")
    driver.drain()
    keyed = ("double", {"args": (1,), "correlation_key": "taken"})
    result = parent(lambda: [keyed, keyed]).delay()
    driver.step()
    assert pending(view, result.id) == ("runnable", 0)
    driver.drain()
    assert result.get(timeout=5)["seen"] == [[]]
    assert occupant.status == "awaiting_signal"


def test_duplicates_among_children_are_dropped_and_not_counted(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any
) -> None:
    def children() -> list[Any]:
        return [("double", {"args": (n,), "correlation_key": f"k{n % 2}"}) for n in range(4)]

    result = parent(children).delay()
    driver.step()
    assert pending(view, result.id) == ("awaiting_children", 2)
    driver.drain()
    assert result.get(timeout=5)["seen"] == [[["double", "done", 0], ["double", "done", 2]]]


def test_failed_and_cancelled_children_count_and_are_seen_as_what_they_are(
    app: Durable, driver: Driver, kids: Any
) -> None:
    seen: list[Child] = []

    @app.machine(name="judge")
    class Judge(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([double(4), "fail", kids["sleeper"]], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            seen.extend(ctx.children)
            return Done()

    result = Judge.delay()
    driver.drain()
    done, failed, sleeping = result.children
    assert [child.status for child in (done, failed, sleeping)] == ["done", "failed", "awaiting_signal"]
    assert app.cancel(sleeping.id, "enough")
    driver.drain()
    assert result.status == "done"
    assert [(child.machine, child.status, child.result) for child in seen] == [
        ("double", "done", 8),
        ("fail", "failed", None),
        ("sleeper", "cancelled", None),
    ]
    assert seen[0].error is None
    assert seen[0].state == {"args": [4]}
    assert seen[1].error is not None
    assert seen[1].error["message"] == "bad"
    assert seen[2].error == {"type": "Cancelled", "message": "enough"}


def test_tasks_and_machines_mix_and_may_be_given_bare_by_name_or_with_options(
    app: Durable, driver: Driver, kids: Any, parent: Any
) -> None:
    def children() -> list[Any]:
        return [
            "sleeper",
            (kids["walker"], {"kwargs": {"n": 1}}),
            (kids["walker"], {"state": {"n": 5}, "step": "end"}),
            (kids["double"], {"args": (3,)}),
            (kids["double"], {"kwargs": {"n": 4}}),
            kids["sleeper"],
        ]

    result = parent(children).delay()
    driver.drain()
    for child in result.children:
        if child.machine == "sleeper":
            app.signal(child.id, "go", "woken")
    driver.drain()
    assert result.get(timeout=5)["seen"] == [
        [
            ["sleeper", "done", "woken"],
            ["walker", "done", {"n": 2, "parent": result.id}],
            ["walker", "done", {"n": 5, "parent": result.id}],
            ["double", "done", 6],
            ["double", "done", 8],
            ["sleeper", "done", "woken"],
        ]
    ]


def test_each_child_takes_the_options_of_an_insert(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any
) -> None:
    options = {
        "queue": "slow",
        "priority": 3,
        "schedule_in": 60,
        "expires": 3600,
        "correlation_key": "k",
        "max_attempts": 2,
    }
    result = parent(
        lambda: [("double", {"args": (1,), **options}), ("double", {"args": (2,), "queue": "slow"})]
    ).delay()
    driver.step()
    (first, second) = result.children
    columns = "queue", "priority", "status", "correlation_key", "parent_id", "expires_at IS NOT NULL"
    assert view.of(first.id, *columns) == ("slow", 3, "scheduled", "k", result.id, True)
    assert view.of(second.id, *columns) == ("slow", 0, "runnable", None, result.id, False)
    assert driver.ready == {"slow": 1}


def test_a_fan_out_may_nest(app: Durable, driver: Driver, view: View, kids: Any) -> None:
    @app.machine(name="tree")
    class Tree(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            depth = ctx.state["depth"]
            below = [double(n) if depth == 0 else (Tree, {"kwargs": {"depth": depth - 1}}) for n in range(3)]
            return ScheduleChildren(below, then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            assert len(ctx.children) == 3
            return Done(sum(child.result for child in ctx.children))

    result = Tree.delay(depth=2)
    driver.drain(4)
    assert result.get(timeout=5) == 9 * (0 + 2 + 4)
    assert view.rows("SELECT count(*), count(parent_id) FROM {schema}.history") == [(1 + 3 + 9 + 27, 39)]
    assert view.count("instances") == 0


def test_two_rounds_are_seen_apart_and_together(app: Durable, driver: Driver, kids: Any, parent: Any) -> None:
    result = parent(lambda: [double(1), double(2)], list, lambda: [double(3)]).delay()
    driver.drain()
    end = result.get(timeout=5)
    assert end["seen"] == [[["double", "done", 2], ["double", "done", 4]], [], [["double", "done", 6]]]
    assert end["all"] == [2, 2, 3]
    assert [child.result for child in result.children] == [2, 4, 6]


def test_the_children_of_the_round_stay_visible_in_later_steps(app: Durable, driver: Driver, kids: Any) -> None:
    @app.machine(name="later", inline=True)
    class Later(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([double(1)], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            return Next(self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done(told(ctx.children))

    result = Later.delay()
    driver.drain()
    assert result.get(timeout=5) == [["double", "done", 2]]


def test_more_children_than_a_page_are_read_page_by_page(
    app: Durable, driver: Driver, kids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    reads: list[int] = []
    read = app.read_children

    def counted(*arguments: Any) -> list[Any]:
        page = read(*arguments)
        reads.append(len(page))
        return page

    @app.machine(name="wide")
    class Wide(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([double(n) for n in range(1203)], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            monkeypatch.setattr(app, "read_children", counted)
            first = next(iter(ctx.children))
            seen["after one"] = list(reads)
            seen["results"] = [child.result for child in ctx.children]
            seen["streamed"] = list(reads)
            children = ctx.children
            seen["all"] = (len(children), children[0] == first, children[-1].result, len(children[10:20]))
            return Done()

    result = Wide.delay()
    driver.drain(500)
    assert result.status == "done"
    assert seen["after one"] == [500]
    assert seen["results"] == [n * 2 for n in range(1203)]
    assert seen["streamed"] == [500, 500, 703], "the second page is larger, for they are small"
    assert seen["all"] == (1203, True, 2404, 10)
    assert len(reads) == 5, "a sequence is read once"


@pytest.mark.parametrize(
    ("size", "limits"), [(10, [500, 10_000]), (4_000, [500, 1_000, 1_000]), (100_000, [500, 500, 500])]
)
def test_heavy_children_come_in_small_pages(size: int, limits: list[int]) -> None:
    asked: list[int] = []

    def read(after: int, limit: int) -> list[Any]:
        asked.append(limit)
        half = b"x" * (size // 2)
        return [
            (n, "kid", "done", "json", half, "json", half, None) for n in range(after + 1, min(after + limit, 1500) + 1)
        ]

    assert [child.id for child in Children(read, lambda *_: None)] == list(range(1, 1501))
    assert asked[: len(limits)] == limits


def test_ten_thousand_children_are_the_limit(app: Durable, driver: Driver, view: View, kids: Any, parent: Any) -> None:
    over = parent(lambda: [double(n) for n in range(10_001)], name="over").delay()
    full = parent(lambda: [double(n) for n in range(10_000)], name="full").delay()
    driver.step()
    failure = over.error
    assert failure is not None
    assert "at most 10,000 children, got 10,001" in failure.message
    assert view.count("instances") == 1
    driver.step()
    assert pending(view, full.id) == ("awaiting_children", 10_000)
    assert view.count("instances") == 10_001


# Bad children

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown name": (lambda: [double(1), "nothing"], "child 1: no task 'nothing'"),
    "no target": (lambda: [double(1), 7], "child 1: a target is"),
    "wrong arguments": (lambda: [double(1), ("double", {"args": (1, 2)})], "child 1: double()"),
    "unknown options": (lambda: [("double", {"args": (1,), "color": "red"})], "child 0"),
    "options that are none": (lambda: [("double", 5)], "child 0"),
    "a wrong queue": (lambda: [("double", {"args": (1,), "queue": "NO"})], "child 0: queue"),
    "what can't be written": (lambda: [("double", {"args": (object(),)})], "child 0: arguments"),
    "a class that is not registered": (lambda: [Machine], "child 0: Machine is not registered"),
    "no collection": (lambda: 5, "not iterable"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_child_is_an_error_of_the_step_and_nothing_is_inserted(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any, case: str
) -> None:
    children, message = BAD[case]
    errors: list[BaseException] = []

    def handle(self: Any, error: BaseException, ctx: Any) -> Any:
        errors.append(error)
        return Stop("handled")

    result = parent(children, handle=handle).delay()
    driver.drain()
    assert result.result == "handled"
    assert [isinstance(error, OutcomeError | TypeError) for error in errors] == [True]
    assert message in str(errors[0])
    assert view.rows("SELECT count(*) FROM {schema}.instance_view") == [(1,)]


# How the barrier is lowered


def test_siblings_that_end_in_one_flush_lower_the_barrier_once(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any
) -> None:
    results = [parent(lambda: [double(n) for n in range(3)], name=f"parent{n}").delay() for n in range(2)]
    driver.step()
    driver.step()
    claimed = driver.claims()
    assert len(claimed) == 6
    before = [view.rows("SELECT xmin::text FROM {schema}.instances WHERE id = %s", r.id) for r in results]
    driver.flush(*map(driver.execute, claimed))
    assert driver.ready == {"default": 2}
    assert [pending(view, r.id) for r in results] == [("runnable", 0)] * 2
    assert before != [view.rows("SELECT xmin::text FROM {schema}.instances WHERE id = %s", r.id) for r in results]
    driver.drain()
    assert [driver.steps(r.id) for r in results] == [["start", "join"]] * 2


@pytest.mark.parametrize("end", ["done", "failed", "key kept", "cancel requested"])
def test_every_kind_of_end_in_a_flush_counts(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any, end: str
) -> None:
    options: dict[str, Any] = {"args": (1,)}
    if end == "key kept":
        options |= {"correlation_key": "k", "correlation_scope": ["done"]}
    child = ("fail", {}) if end == "failed" else ("double", options)
    result = parent(lambda: [child, double(2)]).delay()
    driver.step()
    commits = [driver.execute(row) for row in driver.claims()]
    if end == "cancel requested":
        app.cancel(commits[0].claimed.id)
    driver.flush(commits[0])
    assert pending(view, result.id) == ("awaiting_children", 1)
    driver.flush(commits[1])
    assert pending(view, result.id) == ("runnable", 0)
    driver.drain()
    (seen,) = result.get(timeout=5)["seen"]
    assert [child[1] for child in seen] == [{"key kept": "done", "cancel requested": "cancelled"}.get(end, end), "done"]


def test_a_child_that_only_goes_on_or_retries_does_not_count(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any
) -> None:
    result = parent(lambda: [(kids["walker"], {"kwargs": {"n": 1}}), ("fail", {"max_attempts": 2})]).delay()
    driver.step()
    driver.flush(*map(driver.execute, driver.claims()))
    assert pending(view, result.id) == ("awaiting_children", 2)


def test_a_stale_end_does_not_count(app: Durable, drivers: Drivers, view: View, kids: Any, parent: Any) -> None:
    result = parent(lambda: [double(1), double(2)]).delay()
    first, second = drivers(), drivers()
    first.step()
    commits = [first.execute(row) for row in first.claims()]
    first.flush(commits[0])
    first.die([])
    assert first.flush(commits[1]) == set()
    assert pending(view, result.id) == ("awaiting_children", 1)
    second.drain()
    assert len(result.get(timeout=5)["seen"][0]) == 2


def test_a_child_lost_with_its_workers_counts(
    app: Durable, drivers: Drivers, view: View, kids: Any, parent: Any
) -> None:
    result = parent(lambda: [double(1)]).delay()
    drivers().step()
    for crash in range(1, 3):
        dying = drivers()
        claimed = dying.claim()
        reclaimed = dying.die([(claimed.id, claimed.token)], most=2)
        assert pending(view, result.id) == (("awaiting_children", 1) if crash == 1 else ("runnable", 0))
    assert reclaimed.by_queue == {"default": 1}, "the parent is runnable and wakes a worker"
    drivers().drain()
    (seen,) = result.get(timeout=5)["seen"]
    assert seen == [["double", "failed", None]]


def test_a_child_that_expires_counts(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any, connection: Any
) -> None:
    result = parent(lambda: [("double", {"args": (1,), "expires": 60})]).delay()
    driver.step()
    connection.execute(f"UPDATE {app.schema}.instances SET expires_at = now() WHERE parent_id IS NOT NULL")
    assert driver.drain() == []
    assert driver.drain() == [(result.id, "join", "end")]
    (seen,) = result.get(timeout=5)["seen"]
    assert seen == [["double", "cancelled", None]]


def test_a_child_released_after_a_cancel_was_asked_counts(
    app: Durable, drivers: Drivers, view: View, kids: Any, parent: Any
) -> None:
    result = parent(lambda: [double(1)]).delay()
    first = drivers()
    first.step()
    claimed = first.claim()
    app.cancel(claimed.id)
    first.engine._release([claimed])
    assert pending(view, result.id) == ("runnable", 0)


def test_a_child_that_is_purged_counts(app: Durable, driver: Driver, view: View, kids: Any, parent: Any) -> None:
    result = parent(lambda: [double(1), ("double", {"args": (2,), "queue": "other"})]).delay()
    driver.step()
    assert driver.run(inspection.purge("other")) == 1
    assert pending(view, result.id) == ("awaiting_children", 1)
    assert driver.run(inspection.purge("default")) == 1
    driver.drain()
    assert result.get(timeout=5)["seen"] == [[]]


# Cancelling families


def family(app: Durable, kids: Any) -> type[Machine]:
    @app.machine(name="family")
    class Family(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            depth = ctx.state["depth"]
            leaf: list[Any] = [double(1), kids["sleeper"], ("double", {"args": (2,), "queue": "slow"})]
            below = [(Family, {"kwargs": {"depth": depth - 1}})] * 2 if depth else leaf
            return ScheduleChildren(below, then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            return Done()

    return Family


def test_a_cascade_reaches_three_levels_and_what_executes_ends_with_its_step(
    app: Durable, drivers: Drivers, view: View, kids: Any
) -> None:
    machine = family(app, kids)
    driver, slow = drivers(), drivers("slow")
    result = machine.delay(depth=1)
    driver.drain()
    bystander = machine.delay(depth=0)
    driver.drain()
    running = slow.claim()
    commit = slow.execute(running)
    assert result.cancel("no more", cascade=True)
    statuses = "SELECT status, count(*) FROM {schema}.instance_view WHERE id <> ALL (%s) GROUP BY 1 ORDER BY 1"
    others = [bystander.id, *(child.id for child in bystander.children)]
    by_status = dict(view.rows(statuses, others))
    assert by_status == {"done": 2, "cancelled": 6, "executing": 1}
    slow.flush(commit)
    by_status = dict(view.rows(statuses, others))
    assert by_status == {"done": 2, "cancelled": 7}
    assert view.status(bystander.id) == "awaiting_children"
    reasons = view.rows("SELECT DISTINCT error FROM {schema}.instance_view WHERE status = 'cancelled'")
    assert reasons == [({"type": "Cancelled", "message": "no more"},)]


def test_without_a_cascade_the_children_run_on(app: Durable, driver: Driver, view: View, kids: Any) -> None:
    result = family(app, kids).delay(depth=0)
    driver.drain()
    assert result.cancel()
    children = list(result.children)
    assert [child.status for child in children] == ["done", "awaiting_signal", "runnable"]
    app.signal(children[1].id, "go", 1)
    driver.drain()
    assert app.result(children[1].id).get(timeout=5) == 1


def test_a_cascade_reaches_children_whose_parent_is_gone_already(
    app: Durable, driver: Driver, view: View, kids: Any
) -> None:
    result = family(app, kids).delay(depth=1)
    driver.drain()
    middle = result.children[0].id
    assert app.cancel(middle)
    assert view.rows("SELECT count(*) FROM {schema}.instances WHERE parent_id = %s", middle) == [(2,)]
    assert result.cancel(cascade=True)
    assert view.count("instances") == 0


def test_a_cascade_reaches_children_that_outlived_the_parent_it_is_asked_of(
    app: Durable, driver: Driver, view: View, kids: Any
) -> None:
    result = family(app, kids).delay(depth=0)
    driver.drain()
    assert result.cancel()
    assert not result.cancel(), "it alone is over"
    assert result.cancel("the rest too", cascade=True)
    assert [child.status for child in result.children] == ["done", "cancelled", "cancelled"]
    assert view.count("instances") == 0
    assert not result.cancel(cascade=True), "nothing of it is live"


def test_cancelling_a_child_lets_its_parent_go_on(app: Durable, driver: Driver, view: View, kids: Any) -> None:
    result = family(app, kids).delay(depth=0)
    driver.drain()
    for child in result.children:
        app.cancel(child.id)
    assert view.of(result.id, "status", "step") == ("runnable", "join")
    driver.drain()
    assert result.status == "done"


def test_a_cancelled_parent_schedules_no_children(
    app: Durable, driver: Driver, view: View, kids: Any, parent: Any
) -> None:
    result = parent(lambda: [double(1)]).delay()
    commit = driver.execute(driver.claim())
    result.cancel()
    driver.flush(commit)
    assert view.of(result.id, "status") == ("cancelled",)
    assert view.rows("SELECT count(*) FROM {schema}.instance_view") == [(1,)]


def test_a_result_of_a_parent_raises_when_it_fails_for_its_children(app: Durable, driver: Driver, kids: Any) -> None:
    @app.machine(name="strict")
    class Strict(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren(["fail"], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            (child,) = ctx.children
            return Stop(child.error["message"]) if child.error else Done()

    result = Strict.delay()
    driver.drain()
    with pytest.raises(TaskFailed, match="bad"):
        result.get(timeout=5)


def test_a_spawn_that_turns_out_stale_inserts_no_child(
    app: Durable, drivers: Drivers, view: View, kids: Any, parent: Any
) -> None:
    result = parent(lambda: [double(1)]).delay()
    first, second = drivers(), drivers()
    claimed: Claimed = first.claim()
    commit: Commit = first.execute(claimed)
    first.die([])
    assert first.flush(commit) == set()
    assert view.count("instances") == 1
    second.drain()
    assert len(result.get(timeout=5)["seen"][0]) == 1
