"""What an async step leaves on the loop of its process, or does to it, does not reach the next step."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from durable.runtime import coroutines
from durable.runtime.coroutines import CoroutineRunner

variable: contextvars.ContextVar[str | None] = contextvars.ContextVar("variable", default=None)


@pytest.fixture
def runner() -> Iterator[CoroutineRunner]:
    runner = CoroutineRunner()
    yield runner
    runner.close()


async def fine() -> int:
    await asyncio.sleep(0)
    return 1


async def exit_in_gather() -> None:
    async def part() -> None:
        sys.exit(5)

    await asyncio.gather(part())


async def exit_in_callback() -> None:
    asyncio.get_running_loop().call_soon(sys.exit, 3)
    await asyncio.sleep(0.01)


async def exit_later() -> None:
    asyncio.get_running_loop().call_later(0.005, sys.exit, 3)


async def stop() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)


async def cancel_everything() -> None:
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(0.01)


@pytest.mark.parametrize("step", [exit_in_gather, exit_in_callback, exit_later, stop, cancel_everything])
def test_the_next_step_has_a_sound_loop(runner: CoroutineRunner, step: Callable[[], Awaitable[None]]) -> None:
    try:
        runner.run(step())
    except (SystemExit, asyncio.CancelledError):
        assert step in (exit_in_gather, cancel_everything), "it is the step's own"
    else:
        assert step not in (exit_in_gather, cancel_everything)

    async def longer() -> int:
        await asyncio.sleep(0.02)
        return 1

    assert runner.run(longer()) == 1


def test_a_closed_loop_is_replaced(runner: CoroutineRunner) -> None:
    async def own() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    runner.run(own()).close()
    assert runner.run(fine()) == 1


def test_the_loop_is_current_only_within(runner: CoroutineRunner) -> None:
    runner.run(fine())
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    assert asyncio.run(fine()) == 1
    assert runner.run(fine()) == 1


def test_tasks_left_running_are_cancelled(runner: CoroutineRunner, caplog: pytest.LogCaptureFixture) -> None:
    left: list[asyncio.Task[Any]] = []

    async def step() -> None:
        left.append(asyncio.create_task(asyncio.sleep(600), name="leftover"))
        await asyncio.sleep(0)

    runner.run(step())
    assert left[0].cancelled()
    assert "left 1 asyncio tasks running; they are cancelled: leftover" in caplog.text


def test_a_task_of_a_clean_context_is_kept(runner: CoroutineRunner) -> None:
    kept: list[asyncio.Task[Any]] = []

    async def step() -> None:
        kept.append(asyncio.create_task(asyncio.sleep(600), context=contextvars.Context()))

    runner.run(step())
    assert not kept[0].done()


def test_tasks_that_go_on_lose_their_loop(runner: CoroutineRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coroutines, "PATIENCE", 0.01)
    loops: list[asyncio.AbstractEventLoop] = []
    let_go = False

    async def stubborn() -> None:
        while not let_go:
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                continue

    async def step() -> None:
        loops.append(asyncio.get_running_loop())
        loops.append(asyncio.create_task(stubborn()))  # type: ignore[arg-type]  # kept, as a module would
        await asyncio.sleep(0)

    runner.run(step())
    assert loops[0].is_closed()
    assert runner.run(fine()) == 1
    loops[1]._log_destroy_pending = False  # type: ignore[attr-defined]  # it can't end any more


def test_variables_of_a_coroutine_come_out(runner: CoroutineRunner) -> None:
    async def sets() -> None:
        variable.set("set")

    async def reads() -> str | None:
        return variable.get()

    def handled_after() -> tuple[str | None, str | None]:
        runner.run(sets())
        return variable.get(), runner.run(reads())

    assert contextvars.copy_context().run(handled_after) == ("set", "set")
    assert (variable.get(), runner.run(reads())) == (None, None)
