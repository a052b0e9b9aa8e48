"""Oban for Python."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg_pool

from benchmarks import stamps
from benchmarks.peers.base import PostgresPeer, paced

LIMIT = 100


class Oban(PostgresPeer):
    """Jobs are rows that stay."""

    name = "oban"
    setting = f"queue limit {LIMIT}, enqueue_many, pool of 10, jobs kept (open source: no bulk acknowledgement)"
    distributions = ("oban",)
    share = 0.1
    FINISHED = (
        "SELECT count(*), extract(epoch FROM min(completed_at AT TIME ZONE 'UTC')),"
        " extract(epoch FROM max(completed_at AT TIME ZONE 'UTC')) FROM oban_jobs WHERE state = 'completed'"
    )

    def __init__(self) -> None:
        import oban

        @oban.job(queue="default")
        async def noop() -> None: ...

        @oban.job(queue="default")
        async def stamp(sent: int) -> None:
            stamps.stamp(sent)

        self.noop, self.stamp = noop, stamp

    def _pool(self) -> Any:
        return psycopg_pool.AsyncConnectionPool(self.dsn, min_size=1, max_size=10, open=False)

    def prepare(self) -> None:
        import oban.schema

        async def act() -> None:
            async with self._pool() as pool:
                await oban.schema.install(pool)

        asyncio.run(act())

    def fill(self, count: int) -> None:
        import oban

        async def act() -> None:
            async with self._pool() as pool:
                client = oban.Oban(pool=pool)
                for at in range(0, count, 1000):
                    await client.enqueue_many([self.noop.new() for _ in range(min(1000, count - at))])

        asyncio.run(act())

    def pace(self, count: int, interval: float) -> None:
        import oban

        async def act() -> None:
            async with self._pool() as pool:
                client = oban.Oban(pool=pool)
                await paced(count, interval, lambda sent: client.enqueue(self.stamp.new(sent)))

        asyncio.run(act())

    def work(self, processes: int) -> None:
        import oban

        async def act() -> None:
            async with self._pool() as pool, oban.Oban(pool=pool, queues={"default": LIMIT}):
                await asyncio.Event().wait()

        asyncio.run(act())
