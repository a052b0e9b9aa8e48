"""`ctx.retry` in a machine's step follows the rules of tasks: limit, cause and backoff."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Context, Done, Durable, Machine, Stop, step
from durable.testing import drain
from tests.machines.driver import Driver, View


def machine(app: Durable, is_async: bool, handled: list[BaseException] | None = None, **asked: Any) -> Any:
    """Register a machine whose one step always asks for another attempt, as `asked` says."""

    class Base(Machine):
        def handle(self, error: BaseException, ctx: Context[Any]) -> Any:
            if handled is None:
                return Stop(error)
            handled.append(error)
            return Done("handled")

    if is_async:

        class Tries(Base):
            @step
            async def go(self, ctx: Context[Any]) -> Any:
                raise ctx.retry(**asked)

    else:

        class Tries(Base):  # type: ignore[no-redef]
            @step
            def go(self, ctx: Context[Any]) -> Any:
                raise ctx.retry(**asked)

    return app.machine(name="tries")(Tries)


BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
def test_max_retries_ends_a_machine_failed(app: Durable, is_async: bool) -> None:
    result = machine(app, is_async, max_retries=2, exc=OSError("gone"), countdown=0).delay()
    tally = drain(app)
    assert tally == {"steps": 3, "retry": 2, "failed": 1}
    assert (result.status, result.attempts) == ("failed", 3)
    assert (result.error.error_type, result.error.message) == ("OSError", "gone")


@BOTH
def test_handle_gets_the_cause_after_the_last_retry(app: Durable, is_async: bool) -> None:
    handled: list[BaseException] = []
    cause = OSError("gone")
    result = machine(app, is_async, handled, max_retries=1, exc=cause, countdown=0).delay()
    drain(app)
    assert (handled, result.get(timeout=1)) == ([cause], "handled")


@BOTH
def test_a_bare_retry_waits_for_the_backoff(app: Durable, driver: Driver, view: View, is_async: bool) -> None:
    result = machine(app, is_async).delay()
    commit = driver.step()
    assert 0.75 <= (commit.delay or 0.0) <= 1
    assert view.of(result.id, "status", "attempt") == ("scheduled", 1)


def test_a_bare_retry_ends_at_the_default_limit(app: Durable) -> None:
    app.conf.max_attempts = 3
    result = machine(app, False).delay()
    assert drain(app) == {"steps": 3, "retry": 2, "failed": 1}
    assert result.error.error_type == "RetryRequested"


def test_a_call_limits_the_retries_of_a_machine(app: Durable) -> None:
    app.insert(machine(app, False, countdown=0), max_attempts=2)
    assert drain(app) == {"steps": 2, "retry": 1, "failed": 1}


def test_the_cause_shows_while_the_retry_waits(app: Durable, driver: Driver, view: View) -> None:
    @app.machine(name="inner")
    class Inner(Machine):
        @step
        def go(self, ctx: Context[Any]) -> Any:
            try:
                raise KeyError("inner")
            except KeyError:
                raise ctx.retry(countdown=9)  # noqa: B904 - what it was raised in is the cause

    result = Inner.delay()
    driver.step()
    status, error = view.of(result.id, "status", "error")
    assert (status, error["type"]) == ("scheduled", "KeyError")


def test_a_retry_of_handle_keeps_to_its_limit(app: Durable) -> None:
    @app.machine(name="again")
    class Again(Machine):
        @step
        def go(self, ctx: Context[Any]) -> Any:
            raise RuntimeError("no")

        def handle(self, error: BaseException, ctx: Context[Any]) -> Any:
            raise ctx.retry(max_retries=2)

    result = Again.delay()
    assert drain(app) == {"steps": 3, "retry": 2, "failed": 1}
    assert result.error.error_type == "RuntimeError"
