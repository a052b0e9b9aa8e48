"""Limits as real worker processes keep them; the mixed load is tests/acceptance/test_mixed_load.py.

Each step notes in an effects table, on a connection of its own, when it began and ended by the database's clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests import fix_db
from tests.acceptance.bounds import Grant, Inside, most_at_once, too_fast
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.test_docs import load

schema = fix_db.schema  # processes of its own for each test

BODY = """
import os, time
import psycopg
from durable import RateLimit
from durable.limit_rows import LimitRows

app.limit_rows = LimitRows({"mail": RateLimit(40, 1.0, burst=5), "slow": RateLimit(10, 1.0, burst=1),
                             "quota": RateLimit(1, 60 * 86400.0)}, {})
_connections = {}

def effects():
    if os.getpid() not in _connections:
        _connections[os.getpid()] = psycopg.connect(app.dsn(), autocommit=True)
    return _connections[os.getpid()]

def during(what, seconds):
    (row,) = effects().execute("INSERT INTO effects (what, began) VALUES (%s, clock_timestamp()) RETURNING id", [what])
    time.sleep(seconds)
    effects().execute("UPDATE effects SET ended = clock_timestamp() WHERE id = %s", row)

@app.task
def work(what, seconds=0.005):
    during(what, seconds)
"""

Effect = tuple[str, datetime, datetime | None]


@pytest.fixture
def tasks(tasks_module: Callable[[str], Path], connection: Any, schema: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tasks_module(BODY)
    source = (folder / "tasks.py").read_text()
    (folder / "tasks.py").write_text(
        source.replace("INTO effects", f"INTO {schema}_effects").replace("UPDATE effects", f"UPDATE {schema}_effects")
    )
    connection.execute(
        f"CREATE TABLE {schema}_effects (id serial PRIMARY KEY, what text, began timestamptz, ended timestamptz)"
    )
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    module = load(folder / "tasks.py")
    module.app.migrate()
    yield module
    module.app.close()
    del sys.modules["tasks"]
    connection.execute(f"DROP TABLE {schema}_effects")


def read(connection: Any, schema: str, like: str) -> dict[str, list[Effect]]:
    found: dict[str, list[Effect]] = {}
    for row in connection.execute(
        f"SELECT what, began, ended FROM {schema}_effects WHERE what LIKE %s ORDER BY began", [like]
    ):
        found.setdefault(row[0], []).append(row)
    return found


def test_ten_a_second_with_a_burst_of_one_is_really_ten_a_second(
    tasks: Any, connection: Any, schema: str, durable_worker: Callable[..., Command]
) -> None:
    durable_worker("worker", "-c", "2")
    results = [tasks.work.apply_async(args=("slow", 0.0), rate_limit="slow") for _ in range(30)]
    for result in results:
        result.get(30)
    (effects,) = read(connection, schema, "slow").values()
    # A step begins when its process gets to it: on a busy machine a while after it got its token.
    assert too_fast([Grant(began - timedelta(seconds=1), began) for _, began, _ in effects], 10.0, 1) == []
    took = effects[-1][1] - effects[0][1]
    assert timedelta(seconds=2.0) <= took <= timedelta(seconds=12.0), "three seconds are due"


def test_a_parked_row_starts_at_once_when_its_key_comes_free_in_workers_that_poll_once_an_hour(
    tasks: Any, connection: Any, schema: str, durable_worker: Callable[..., Command]
) -> None:
    hourly = {"DURABLE_POLL_INTERVAL": "3600", "DURABLE_REAPER_INTERVAL": "3600", "DURABLE_RECONCILE_INTERVAL": "3600"}
    for _ in range(2):
        durable_worker("worker", "-c", "1", **hourly)
    results = [tasks.work.apply_async(args=("acct:1", 0.2), concurrency_key="acct:1") for _ in range(6)]
    for result in results:
        result.get(30)
    (effects,) = read(connection, schema, "acct:%").values()
    assert most_at_once(Inside(*effect[1:]) for effect in effects) == 1
    gaps = [later[1] - earlier[2] for earlier, later in pairwise(effects) if earlier[2]]
    assert sorted(gaps)[len(gaps) // 2] < timedelta(seconds=5), "they poll once an hour"


def test_a_row_with_a_rate_limit_gets_its_turn_while_its_worker_is_never_idle(
    tasks: Any, connection: Any, schema: str, durable_worker: Callable[..., Command]
) -> None:
    app, work = tasks.app, tasks.work
    plain = [(work, {"args": ("plain", 0.0), "priority": 5}) for _ in range(3000)]
    app.insert_many([*plain, (work, {"args": ("keyed", 0.0), "concurrency_key": "acct:1"})])
    durable_worker("worker", "-c", "1")
    wait_until(lambda: read(connection, schema, "plain"), what="the first of many")
    result = work.apply_async(args=("mail", 0.0), rate_limit="mail")
    result.get(30)
    left = connection.execute(f"SELECT count(*) FROM {schema}.instances WHERE status = 'runnable'").fetchone()
    assert left[0] > 500


def test_workers_sleep_though_the_next_token_comes_in_two_months(
    tasks: Any, connection: Any, schema: str, durable_worker: Callable[..., Command]
) -> None:
    """poll() counts milliseconds in 32 bits, which is 24.8 days: whoever slept until the token ended in an error."""
    command = durable_worker("worker", "-c", "1", DURABLE_RECONCILE_INTERVAL="0.02")
    work = tasks.work
    first, second = (work.apply_async(args=("quota", 0.0), rate_limit="quota") for _ in range(2))
    first.get(30)
    parked = f"SELECT FROM {schema}.instances WHERE lane = 'rate quota'"
    wait_until(lambda: connection.execute(parked).fetchone() is not None, what="the second waits for a token")
    children = command.started(count=2)
    for _ in range(5):
        work.apply_async(args=("plain", 0.0), countdown=0.1).get(30)
    assert command.children() == children
    assert "CRITICAL" not in command.output()
    assert second.status == "runnable"
