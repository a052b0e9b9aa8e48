"""Chancy: its async executor."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import stamps
from benchmarks.peers.base import PostgresPeer, paced

CONCURRENCY = 200


async def noop() -> None:
    """Do nothing."""


async def stamp(*, sent: int) -> None:
    """Say when it starts."""
    stamps.stamp(sent)


class Chancy(PostgresPeer):
    """Jobs are rows that stay."""

    name = "chancy"
    setting = f"async executor, concurrency {CONCURRENCY}, polled each 20 ms, jobs kept"
    distributions = ("chancy",)
    share = 0.1
    FINISHED = (
        "SELECT count(*), extract(epoch FROM min(completed_at)), extract(epoch FROM max(completed_at))"
        " FROM chancy_jobs WHERE state = 'succeeded'"
    )

    def _app(self) -> Any:
        import chancy

        return chancy.Chancy(self.dsn)

    def prepare(self) -> None:
        import chancy

        async def act() -> None:
            async with self._app() as app:
                await app.migrate()
                await app.declare(
                    chancy.Queue(
                        "default", concurrency=CONCURRENCY, executor=chancy.Chancy.Executor.Async, polling_interval=0.02
                    )
                )

        asyncio.run(act())

    def fill(self, count: int) -> None:
        import chancy

        async def act() -> None:
            async with self._app() as app:
                job = chancy.Job.from_func(noop, queue="default")
                async for _ in app.push_many([job] * count, batch_size=1000):
                    pass

        asyncio.run(act())

    def pace(self, count: int, interval: float) -> None:
        import chancy

        async def act() -> None:
            async with self._app() as app:

                async def send(sent: int) -> None:
                    await app.push(chancy.Job.from_func(stamp, queue="default", kwargs={"sent": sent}))

                await paced(count, interval, send)

        asyncio.run(act())

    def work(self, processes: int) -> None:
        import chancy

        async def act() -> None:
            async with self._app() as app, chancy.Worker(app) as worker:
                await worker.wait_for_shutdown()

        asyncio.run(act())
