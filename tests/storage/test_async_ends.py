"""Programs whose event loop ends without `await app.aclose()`: they end at once, say nothing, and leave nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time

import psycopg
import pytest

from durable import Durable
from durable.errors import DatabaseUnavailableError
from tests.fix_db import wait_until

HEAD = """
import asyncio, logging, sys, time
from durable import Durable
logging.getLogger("asyncio").addFilter(lambda record: "took" not in record.getMessage())  # a slow machine's callbacks
app = Durable("ends", dsn=sys.argv[1], schema=sys.argv[2], pool_size=2)

@app.task(name="task")
def task(n): ...
"""

PROGRAMS = {
    "one call": """
        async def main():
            await task.adelay(1)

        asyncio.run(main())
    """,
    "many at once": """
        async def main():
            await asyncio.gather(*[task.adelay(n) for n in range(50)])

        asyncio.run(main())
    """,
    "calls that are cut off": """
        async def main():
            await task.adelay(2)
            others = [asyncio.create_task(task.adelay(n)) for n in range(20)]
            await asyncio.sleep(0)

        asyncio.run(main())
    """,
    "one loop after another": """
        async def main():
            await task.adelay(1)

        for _ in range(5):
            asyncio.run(main())
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_loop_that_ends_without_aclose_ends_at_once_and_silently(app: Durable, database: str, name: str) -> None:
    script = HEAD + textwrap.dedent(PROGRAMS[name]) + "\nprint(time.time())\n"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script, database, app.schema],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 3


def backends(app: Durable, connection: psycopg.Connection[tuple[int]]) -> int:
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()",
        (f"durable {app.name}",),
    ).fetchone()
    assert row is not None
    return row[0]


def test_loops_that_have_ended_keep_no_connections(
    app: Durable, database: str, connection: psycopg.Connection[tuple[int]]
) -> None:
    app = Durable("many-loops", dsn=database, schema=app.schema)

    @app.task(name="task")
    def task() -> None: ...

    for _ in range(4):
        asyncio.run(_delay(task))
    wait_until(lambda: backends(app, connection) <= 1, what="the ended loops' connections closing")


async def _delay(task: object) -> None:
    await task.adelay()  # type: ignore[attr-defined]


def test_calls_one_after_another_share_one_connection_and_many_at_once_no_more_than_pool_size(
    app: Durable, database: str, connection: psycopg.Connection[tuple[int]]
) -> None:
    app = Durable("shared", dsn=database, schema=app.schema, pool_size=3)

    @app.task(name="task")
    def task() -> None: ...

    async def main() -> tuple[int, int]:
        for _ in range(5):
            await task.adelay()
        alone = backends(app, connection)
        await asyncio.gather(*[task.adelay() for _ in range(30)])
        crowd = backends(app, connection)
        await app.aclose()
        return alone, crowd

    assert asyncio.run(main()) == (1, 3)
    wait_until(lambda: backends(app, connection) == 0, what="the connections closing")


def test_a_connection_that_died_while_idle_is_replaced_unseen(
    app: Durable, database: str, connection: psycopg.Connection[tuple[int]]
) -> None:
    app = Durable("replaced", dsn=database, schema=app.schema)

    @app.task(name="task")
    def task() -> None: ...

    async def main() -> None:
        await task.adelay()
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'durable replaced'"
        )
        wait_until(lambda: backends(app, connection) == 0, what="the backend's end")
        assert await (await task.adelay()).astatus() == "runnable"
        await app.aclose()

    asyncio.run(main())


def test_a_call_that_is_cancelled_leaves_the_pool_whole(app: Durable, database: str) -> None:
    app = Durable("cancelled", dsn=database, schema=app.schema, pool_size=1)

    @app.task(name="task")
    def task() -> None: ...

    async def main() -> None:
        await task.adelay()
        for turns in range(6):
            cut = asyncio.create_task(task.adelay())
            for _ in range(turns):
                await asyncio.sleep(0)
            cut.cancel()
            await asyncio.gather(cut, return_exceptions=True)
        assert await (await task.adelay()).astatus() == "runnable"
        await app.aclose()

    asyncio.run(main())


def test_nothing_free_within_the_timeout_says_which_settings_to_look_at(app: Durable, database: str) -> None:
    app = Durable("full", dsn=database, schema=app.schema, pool_size=1, connect_timeout=0.3)

    @app.task(name="task")
    def task() -> None: ...

    async def main() -> None:
        async with app._pool.aconnection():
            with pytest.raises(DatabaseUnavailableError, match="pool_size = 1"):
                await task.adelay()
        await task.adelay()
        await app.aclose()

    asyncio.run(main())
