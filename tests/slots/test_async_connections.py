"""Who gets a step connection next, when steps that wait for one are cancelled."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from durable.runtime.async_connections import AsyncConnections


class Given:
    """Stands for StepConnections: counts what was begun."""

    def __init__(self) -> None:
        self.begun: list[Any] = []

    def begin(self, claimed: Any, _asynchronous: bool) -> Any:
        self.begun.append(claimed)
        return claimed


async def aside(function: Any, *args: Any) -> Any:
    return function(*args)


def test_a_step_that_was_cancelled_while_it_waited_is_passed_by() -> None:
    async def main() -> list[Any]:
        given = Given()
        connections = AsyncConnections(given, 1, aside)  # type: ignore[arg-type]
        await connections.begin("first")  # type: ignore[arg-type]
        gone, next_one = (asyncio.create_task(connections.begin(name)) for name in ("gone", "next"))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        connections.release()
        await asyncio.wait_for(next_one, 20)
        connections.release()
        await asyncio.wait_for(connections.begin("last"), 20)  # type: ignore[arg-type]
        return given.begun

    assert asyncio.run(main()) == ["first", "next", "last"]
