"""What asks the database has a twin for coroutines; those without it warn once when they are called on a loop."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import Any

import psycopg
import pytest

from durable import Await, Context, Done, Durable, Machine, ScheduleChildren, context, step
from durable.eager import EagerResult
from durable.result import AsyncResult
from tests.machines.driver import Driver


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_warned", set())


@pytest.fixture
def parent(app: Durable) -> type[Machine]:
    """A machine whose last step is a coroutine and tells what it sees of its children, by `how`."""

    @app.task(name="double")
    def double(n: int) -> int:
        return 2 * n

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([(double, {"args": (n,)}) for n in (1, 2)], then=self.again)

        @step
        def again(self, ctx: Context) -> Any:
            return ScheduleChildren([(double, {"args": (3,)})], then=self.end)

        @step
        async def end(self, ctx: Context) -> Any:
            if ctx.state["how"] == "sync":
                latest, every, asked = list(ctx.children), list(ctx.children_all), ctx.cancel_requested
            else:
                latest, every, asked = (
                    await ctx.achildren(), await ctx.achildren_all(), await ctx.acancel_requested()
                )  # fmt: skip
            await app.aclose()
            return Done([[child.result for child in latest], [child.result for child in every], asked])

    return Parent


@pytest.mark.parametrize("how", ["sync", "async"])
def test_twins_of_context_see_the_same(
    app: Durable, driver: Driver, parent: Any, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    results = [parent.delay(how=how) for _ in range(2)]
    driver.drain()
    assert [result.get(timeout=5) for result in results] == [[[6], [2, 4, 6], False]] * 2
    warned = [record.getMessage() for record in caplog.records if "running event loop" in record.getMessage()]
    names = ["ctx.children", "ctx.children_all", "ctx.cancel_requested"] if how == "sync" else []
    assert [line.split()[0] for line in warned] == names, "once per process and name"
    for line, twin in zip(warned, ("achildren()", "achildren_all()", "acancel_requested()"), strict=False):
        assert f"`await ctx.{twin}`" in line


def test_twin_leaves_the_loop_running(app: Durable, driver: Driver, database: str) -> None:
    @app.machine(name="looker")
    class Looker(Machine):
        @step
        async def look(self, ctx: Context) -> Any:
            await ctx.achildren()  # its connection is there
            with psycopg.connect(database) as locker:
                locker.execute(f"LOCK TABLE {app.schema}.instances IN ACCESS EXCLUSIVE MODE")
                asking = [asyncio.create_task(ctx.acancel_requested()), asyncio.create_task(ctx.achildren())]
                done, _ = await asyncio.wait(asking, timeout=0.3)
                assert not done, "they wait for the lock, the loop does not"
                locker.rollback()
                answers = await asyncio.gather(*asking)
            await app.aclose()
            return Done(answers)

    result = Looker.delay()
    driver.drain()
    assert result.get(timeout=5) == [False, []]


def test_twins_of_results_see_the_same(app: Durable, driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    @app.machine(name="family")
    class Family(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([Family], then=self.park) if not ctx.parent_id else Done(7)

        @step
        def park(self, ctx: Context) -> Any:
            return Await("go", then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            raise ValueError("no")

    result = Family.delay()
    driver.drain()
    reads = ("status", "state", "ready", "successful", "failed", "attempts", "result", "error", "unread", "children")

    async def look() -> tuple[list[Any], list[Any]]:
        awaited = [await getattr(result, f"a{name}")() for name in reads]
        handle = app.result(result.id)
        read = [getattr(handle, name) for name in reads]
        await app.aclose()
        return [plain(value) for value in awaited], [plain(value() if callable(value) else value) for value in read]

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Exception) else list(value) if hasattr(value, "_everything") else value

    async def send() -> bool:
        try:
            return await result.asignal("go", 1)
        finally:
            await app.aclose()

    awaited, read = asyncio.run(look())
    assert awaited == read
    assert (awaited[0], [child.result for child in awaited[-1]]) == ("awaiting_signal", [7])
    assert asyncio.run(send()) is True
    driver.drain()
    awaited, read = asyncio.run(look())
    assert awaited == read
    assert (awaited[0], awaited[7]) == ("failed", f"instance {result.id} failed: ValueError: no")
    warned = [record.getMessage() for record in caplog.records if "running event loop" in record.getMessage()]
    assert len(warned) == len({line.split()[0] for line in warned}) > 5
    assert all("result.a" in line for line in warned)


def test_no_warning_without_a_loop(app: Durable, driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert app.result(1).status == "not_found"
    assert caplog.records == []


@pytest.mark.parametrize("kind", [AsyncResult, Context, EagerResult])
def test_every_look_has_a_twin(kind: type[Any]) -> None:
    looks = "children children_all cancel_requested"
    if kind is not Context:
        looks = "status state ready successful failed attempts result error get cancel retry signal children unread"
    for name in looks.split():
        assert hasattr(kind, name)
        assert inspect.iscoroutinefunction(getattr(kind, f"a{name}")), name
