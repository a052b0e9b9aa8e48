"""An outcome that committed although its answer was lost: what goes on here, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from durable import Context, Done, Durable, Machine, Next, ScheduleChildren, step
from durable.runtime import flusher as flusher_module
from durable.storage import claims
from tests.machines.driver import Driver, Drivers, View


@pytest.fixture
def lose_the_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """The next flush commits and then loses its connection; what is given here happens before it is submitted again."""

    def lose(meanwhile: Callable[[], Any] = lambda: None) -> None:
        real = claims.flush

        def once(connection: Any, *args: Any) -> claims.Flushed:
            monkeypatch.setattr(flusher_module.claims, "flush", real)
            real(connection, *args)
            connection.close()
            meanwhile()
            raise psycopg.OperationalError("the answer was lost")

        monkeypatch.setattr(flusher_module.claims, "flush", once)

    return lose


def hopper(app: Durable) -> type[Machine]:
    @app.machine(name="hopper", inline=True)
    class Hopper(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done([signal.name for signal in ctx.all])

    return Hopper


def test_an_inline_hop_goes_on_and_sees_its_inbox(
    app: Durable, driver: Driver, view: View, lose_the_answer: Callable[..., None]
) -> None:
    result = hopper(app).delay()
    claimed = driver.claim()
    result.signal("early")
    lose_the_answer()
    assert driver.flush(driver.execute(claimed)) == {result.id}
    driver.drain()
    assert result.get(timeout=5) == ["early"]
    assert view.of(result.id, "version", "token") == (2, 1)


def test_an_inline_hop_that_a_cancel_overruled_runs_no_further_step(
    app: Durable, driver: Driver, view: View, lose_the_answer: Callable[..., None]
) -> None:
    result = hopper(app).delay()
    commit = driver.execute(driver.claim())
    result.cancel()
    lose_the_answer()
    driver.flush(commit)
    assert view.status(result.id) == "cancelled"
    assert len(driver.engine.buffer) == 0
    assert driver.engine._held == {}


@pytest.mark.parametrize("as_far_as", ["claimed", "finished"])
def test_an_inline_hop_whose_claim_was_lost_meanwhile_runs_nothing(
    app: Durable, drivers: Drivers, view: View, lose_the_answer: Callable[..., None], as_far_as: str
) -> None:
    result = hopper(app).delay()
    first, second = drivers(), drivers()
    commit = first.execute(first.claim())
    late: list[Any] = []

    def take_over() -> None:
        second.run(claims.release(first.worker, [(result.id, commit.claimed.token)]))
        late.append(second.claim())
        if as_far_as == "finished":
            second.flush(second.execute(late[0]))

    lose_the_answer(take_over)
    first.flush(commit)
    assert late[0].step == "end"
    assert len(first.engine.buffer) == 0
    assert first.engine._held == {}
    if as_far_as == "claimed":
        second.flush(second.execute(late[0]))
    assert view.of(result.id, "status", "version", "token") == ("done", 2, 2)


def test_children_are_scheduled_once(
    app: Durable, driver: Driver, view: View, lose_the_answer: Callable[..., None]
) -> None:
    @app.task(name="leaf")
    def leaf() -> int:
        return 1

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([leaf, leaf], then=self.join)

        @step
        def join(self, ctx: Context) -> Any:
            return Done(len(ctx.children))

    result = Parent.delay()
    commit = driver.execute(driver.claim())
    lose_the_answer()
    assert driver.flush(commit) == {result.id}
    assert view.count("instances") == 3
    leaves = [driver.execute(row) for row in driver.claims()]
    lose_the_answer()
    driver.flush(*leaves)
    driver.drain()
    assert result.get(timeout=5) == 2


def test_hop_whose_inbox_is_not_read_is_released(
    app: Durable, driver: Driver, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else this process would hold it for ever without running it."""
    result = hopper(app).delay()
    commit = driver.execute(driver.claim())
    result.signal("early")
    real = driver.engine._arrivals.with_inboxes

    def lost(rows: Any) -> Any:
        monkeypatch.setattr(driver.engine._arrivals, "with_inboxes", real)
        raise psycopg.OperationalError("the connection was lost")

    monkeypatch.setattr(driver.engine._arrivals, "with_inboxes", lost)
    with pytest.raises(psycopg.OperationalError):
        driver.flush(commit)
    driver.engine._release_strange()
    assert view.of(result.id, "status", "step") == ("runnable", "end")
