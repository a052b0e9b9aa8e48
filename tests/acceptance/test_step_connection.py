"""Steps that write on `ctx.connection` while their processes are killed: each write is there exactly once."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from durable import Context, Done, Durable, Machine, step
from tests.fix_app import Command
from tests.fix_db import wait_until

COUNT = 400
TASKS = """
    import os, time
    from durable import Done, Machine, Next, step

    @app.machine(name="ledger")
    class Ledger(Machine):
        def note(self, ctx):
            ctx.connection.execute("INSERT INTO effects VALUES (%s, %s)", [ctx.id, ctx.step])
            time.sleep(0.001)

        @step(initial=True)
        def debit(self, ctx):
            self.note(ctx)
            return Next(self.credit, inline=ctx.id % 2 == 0)

        @step
        def credit(self, ctx):
            self.note(ctx)
            return Next(self.close)

        @step
        async def close(self, ctx):
            await ctx.connection.execute("INSERT INTO effects VALUES (%s, %s)", [ctx.id, ctx.step])
            return Done()
"""


def test_writes_happen_exactly_once_through_a_storm_of_kills(
    app: Durable, connection: Any, durable_worker: Callable[..., Command], tasks_module: Callable[[str], Path]
) -> None:
    effects = f"{app.schema}.effects"
    connection.execute(f"CREATE TABLE {effects} (id bigint, step text)")

    @app.machine(name="ledger")
    class Ledger(Machine):
        @step(initial=True)
        def debit(self, ctx: Context[Any]) -> Done: ...

    folder = tasks_module(TASKS.replace("effects", effects))
    worker = durable_worker("worker", "-c", "3", folder=folder, DURABLE_MAX_CRASHES="1000")
    dice = random.Random(5)
    with app.batch():
        results = [Ledger.delay() for _ in range(COUNT)]
    sessions = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                  AND application_name SIMILAR TO 'durable test (worker|step|agent)%'"""

    def finished() -> int:
        return int(connection.execute(f'SELECT count(*) FROM "{app.schema}".history').fetchone()[0])

    for part in range(1, 8):
        wait_until(lambda part=part: finished() >= part * COUNT // 8, what=f"{part}/8 finished")  # type: ignore[misc]
        # One per worker process, one more for its steps, two of the command; those of the killed linger for a moment.
        wait_until(lambda: connection.execute(sessions).fetchone()[0] <= 3 * 2 + 2, what="the connection budget")
        os.kill(dice.choice(wait_until(lambda: worker.children("durable:default"))), signal.SIGKILL)
    assert [result.get(30) for result in results] == [None] * COUNT
    counts = connection.execute(f"SELECT step, count(*), count(DISTINCT id) FROM {effects} GROUP BY step ORDER BY 1")
    assert counts.fetchall() == [(name, COUNT, COUNT) for name in ("close", "credit", "debit")]
    ends = connection.execute(f'SELECT DISTINCT status::text, version FROM "{app.schema}".history').fetchall()
    assert ends == [("done", 3)]
