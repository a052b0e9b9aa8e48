"""pgqueuer, on either driver."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from benchmarks import stamps
from benchmarks.peers.base import PostgresPeer, paced

BATCH = 500


class _PgQueuer(PostgresPeer):
    """Jobs are deleted when they end; a log says that they did."""

    setting = f"batch {BATCH}, results not kept"
    FINISHED = (
        "SELECT count(*), extract(epoch FROM min(created)), extract(epoch FROM max(created))"
        " FROM pgqueuer_log WHERE status = 'successful'"
    )

    @abstractmethod
    def driver(self) -> AbstractAsyncContextManager[Any]:
        """Return a connected driver."""

    def prepare(self) -> None:
        from pgqueuer.queries import Queries

        async def act() -> None:
            async with self.driver() as driver:
                await Queries(driver).install()

        asyncio.run(act())

    def fill(self, count: int) -> None:
        from pgqueuer.queries import Queries

        async def act() -> None:
            async with self.driver() as driver:
                for at in range(0, count, 1000):
                    number = min(1000, count - at)
                    await Queries(driver).enqueue(["noop"] * number, [b"{}"] * number, [0] * number)

        asyncio.run(act())

    def pace(self, count: int, interval: float) -> None:
        from pgqueuer.queries import Queries

        async def act() -> None:
            async with self.driver() as driver:
                queries = Queries(driver)
                await paced(count, interval, lambda sent: queries.enqueue("stamp", b"%d" % sent))

        asyncio.run(act())

    def work(self, processes: int) -> None:
        from pgqueuer import PgQueuer

        async def act() -> None:
            async with self.driver() as driver:
                queuer = PgQueuer(driver)

                @queuer.entrypoint("noop")
                async def noop(job: Any) -> None: ...

                @queuer.entrypoint("stamp")
                async def stamp(job: Any) -> None:
                    stamps.stamp(int(job.payload))

                await queuer.run(batch_size=BATCH)

        asyncio.run(act())


class PgQueuerAsyncpg(_PgQueuer):
    """With asyncpg."""

    name = "pgqueuer (asyncpg)"
    distributions = ("pgqueuer", "asyncpg")

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[Any]:
        import asyncpg
        from pgqueuer.db import AsyncpgDriver
        from psycopg.conninfo import conninfo_to_dict

        given = conninfo_to_dict(self.dsn)
        names = {"dbname": "database"}
        connection = await asyncpg.connect(
            **{names.get(key, key): value for key, value in given.items() if key in ("host", "user", "dbname")},
            password=given.get("password"),
            port=int(given.get("port") or 5432),
        )
        try:
            yield AsyncpgDriver(connection)
        finally:
            await connection.close()


class PgQueuerPsycopg(_PgQueuer):
    """With psycopg."""

    name = "pgqueuer (psycopg)"
    distributions = ("pgqueuer", "psycopg")

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[Any]:
        import psycopg
        from pgqueuer.db import PsycopgDriver

        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            yield PsycopgDriver(connection)
