"""procrastinate: async worker, psycopg."""

from __future__ import annotations

import asyncio

from benchmarks import stamps
from benchmarks.peers.base import PostgresPeer, paced


class Procrastinate(PostgresPeer):
    """Jobs are rows that stay, with an event per change of status."""

    name = "procrastinate"
    setting = "async tasks, concurrency 100, defer_async in batches, jobs kept"
    distributions = ("procrastinate",)
    share = 0.03
    FINISHED = (
        "SELECT count(*), extract(epoch FROM min(at)), extract(epoch FROM max(at))"
        " FROM procrastinate_events WHERE type = 'succeeded'"
    )

    def __init__(self) -> None:
        import procrastinate

        self.app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=self.dsn))

        @self.app.task(name="noop")
        async def noop() -> None: ...

        @self.app.task(name="stamp")
        async def stamp(sent: int) -> None:
            stamps.stamp(sent)

        self.noop, self.stamp = noop, stamp

    def prepare(self) -> None:
        async def act() -> None:
            async with self.app.open_async():
                await self.app.schema_manager.apply_schema_async()

        asyncio.run(act())

    def fill(self, count: int) -> None:
        async def act() -> None:
            async with self.app.open_async():
                for at in range(0, count, 1000):
                    await self.noop.batch_defer_async(*[{}] * min(1000, count - at))

        asyncio.run(act())

    def pace(self, count: int, interval: float) -> None:
        async def act() -> None:
            async with self.app.open_async():
                await paced(count, interval, lambda sent: self.stamp.defer_async(sent=sent))

        asyncio.run(act())

    def work(self, processes: int) -> None:
        async def act() -> None:
            async with self.app.open_async():
                await self.app.run_worker_async(concurrency=100)

        asyncio.run(act())
