"""What befalls a worker process between a committed claim and the step, and between a step and its commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until

HOURS = {
    "DURABLE_LEASE_TTL": "3600",
    "DURABLE_RECONCILE_INTERVAL": "3600",
    "DURABLE_POLL_INTERVAL": "3600",
}
"""Nothing that runs on a clock helps."""
TASKS = """
    from pathlib import Path
    import time

    @app.task(name="noop")
    def noop(): return "ran"

    @app.task(name="wait_for")
    def wait_for(path):
        while not Path(path).exists(): time.sleep(0.01)
"""


@pytest.mark.parametrize("fault", ["terminate", "cancel"])
def test_a_failure_right_after_a_committed_claim_gives_the_whole_batch_back_at_once(
    app: Durable,
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    database: str,
    fault: str,
) -> None:
    """The claim commits, then reading the inboxes fails: a lock on their table is the hold point."""
    tasks_module(TASKS)
    noop = app.task(name="noop")(_never)
    with app.batch():
        results = [noop.delay() for _ in range(8)]
    for result in results:
        result.signal("early")
    with psycopg.connect(database) as keeper:
        keeper.execute(f"LOCK TABLE {app.schema}.signals IN ACCESS EXCLUSIVE MODE")
        durable_worker("worker", "-c", "1", "--prefetch", "20", **HOURS)
        blocked = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND application_name LIKE 'durable test worker%'"
        )
        ((pid,),) = wait_until(lambda: connection.execute(blocked).fetchall(), what="a worker at the locked table")  # type: ignore[attr-defined]
        claimed = connection.execute(f"SELECT status::text, token FROM {app.schema}.instances").fetchall()
        assert claimed == [("executing", 1)] * 8
        connection.execute(f"SELECT pg_{fault}_backend(%s)", [pid])
        wait_until(lambda: (pid,) not in connection.execute(blocked).fetchall(), what="the fault")
    assert [result.get(timeout=20) for result in results] == ["ran"] * 8
    rows = connection.execute(f"SELECT DISTINCT token, version, attempt, crashes FROM {app.schema}.history").fetchall()
    assert rows == [(2, 1, 0, 0)]


def test_an_outcome_is_not_kept_waiting_by_the_long_step_behind_it(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    """Far fewer than a batch: it is the delay that commits it."""
    tasks_module(TASKS)
    noop, wait_for = app.task(name="noop")(_never), app.task(name="wait_for")(_never)
    with app.batch():
        quick = noop.delay()
        slow = wait_for.delay(str(tmp_path / "go"))
    durable_worker("worker", "-c", "1", "--prefetch", "20", **HOURS)
    assert quick.get(timeout=20) == "ran"
    wait_until(lambda: slow.status == "executing", what="the long step")
    (tmp_path / "go").touch()
    slow.get(timeout=20)


def _never(*args: Any) -> Any:
    raise AssertionError("runs on workers only")
