"""Ten worker commands that are started and stopped at once."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.surroundings.load import SCHEMA
from tests.surroundings.server import OwnServer

COMMANDS, JOBS = 10, 3000
TASKS = """
import os, time
from durable import Durable
app = Durable("around", dsn={dsn!r}, schema={schema!r})

@app.task(name="who")
def who(n, nap):
    time.sleep(nap)
    with open("effects", "a") as file: file.write(f"{{n}}\\n")
    return os.getppid()
"""


def _never(n: int, nap: float) -> int:
    raise AssertionError("runs on workers only")


def test_ten_commands_at_once_share_all_jobs_and_the_budget_of_connections_and_end_in_order(
    own_server: Callable[..., OwnServer], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    server = own_server()
    (tmp_path / "tasks.py").write_text(TASKS.format(dsn=server.dsn, schema=SCHEMA))
    app = Durable("around", dsn=server.dsn, schema=SCHEMA)
    who = app.task(name="who")(_never)
    workers = [durable_worker("worker", "-c", "1", "-n", f"w{n}", wait=False) for n in range(COMMANDS)]
    leases = f"SELECT count(*) FROM {SCHEMA}.workers WHERE kind = 'worker' AND dead_at IS NULL"
    wait_until(lambda: server.run(leases) == [(COMMANDS,)], 60, "ten leases")
    connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^durable around (worker|agent)'"
    live = f"SELECT count(*) FROM {SCHEMA}.instances"

    with app.batch():
        results = [who.delay(n, 0.005) for n in range(JOBS)]
    most = 0
    while server.run(live) != [(0,)]:
        most = max(most, server.run(connections)[0][0])
    shares = Counter(result.get(timeout=30) for result in results)
    assert shares.total() == JOBS
    assert shares.keys() == {worker.pid for worker in workers}
    assert sorted(map(int, (tmp_path / "effects").read_text().split())) == list(range(JOBS))
    # docs/operations.md: one per worker process, two per command.
    assert 2 * COMMANDS <= most <= 3 * COMMANDS

    with app.batch():
        results = [who.delay(n, 0.02) for n in range(JOBS, 2 * JOBS)]
    finished = f"SELECT count(*) > {JOBS + JOBS // 10} FROM {SCHEMA}.history"
    wait_until(lambda: server.run(finished) == [(True,)], what="work in full swing")
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
    assert [worker.process.wait(30) for worker in workers] == [0] * COMMANDS
    left = server.run(f"SELECT status, count(*) FROM {SCHEMA}.instances GROUP BY 1")
    assert [status for status, _ in left] == ["runnable"], "stopped in mid-load, nothing is executing"
    rows = server.run(
        f"SELECT count(*), count(DISTINCT id), min(version), max(version), max(crashes) FROM {SCHEMA}.history"
    )
    assert rows == [(2 * JOBS - left[0][1], 2 * JOBS - left[0][1], 1, 1, 0)]
    effects = Counter((tmp_path / "effects").read_text().split())
    assert set(effects.values()) == {1}
    assert effects.total() == rows[0][0]
    app.close()
