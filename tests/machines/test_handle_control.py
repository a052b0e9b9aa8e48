"""`handle` may steer by exception as a step does."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Cancel, Context, Durable, Machine, step
from tests.machines.driver import Driver, View


@pytest.mark.parametrize("how", ["retry", "cancel"])
def test_what_handle_raises_to_steer_is_no_failure_of_handle(
    app: Durable, driver: Driver, view: View, how: str
) -> None:
    @app.machine(name="m")
    class M(Machine):
        @step(initial=True)
        def go(self, ctx: Context[Any]) -> Any:
            raise RuntimeError("no")

        def handle(self, error: BaseException, ctx: Context[Any]) -> Any:
            if how == "retry":
                raise ctx.retry(countdown=100)
            raise Cancel("enough")

    result = M.delay()
    driver.step()
    status, attempt, error, reason = view.of(result.id, "status", "attempt", "error", "result")
    if how == "retry":
        assert (status, attempt, error["type"]) == ("scheduled", 1, "RuntimeError")
    else:
        assert (status, error["type"], reason) == ("failed", "Cancel", "enough")
