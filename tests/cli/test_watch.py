"""`durable status --watch`: a live page on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.storage import control, inspection
from tests.cli.conftest import Ran
from tests.fix_db import wait_until
from tests.fix_rows import Rows, done
from tests.storage.test_plans import statement


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    rows = Rows(database, schema)
    yield rows
    rows.close()


def watch(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "durable_cli", "status", "--watch", *arguments], cwd=folder, text=True, **options
    )


def test_one_document_a_line_with_the_rate_since_the_line_before(shop: Path, rows: Rows) -> None:
    worker = rows.worker()
    rows.flush(worker, *(done(row) for row in rows.claimed(worker, 3)))
    rows.run(control.pause("checkout", "a test"))
    with watch(shop, "0.5", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        rows.flush(worker, *(done(row) for row in rows.claimed(worker, 200)))
        rows.insert()
        finished = 0.0
        before = first
        for _ in range(60):
            page = json.loads(process.stdout.readline())
            (queue,) = [state for state in page["queues"] if state["queue"] == "default"]
            finished += queue["rate"] * _seconds(before["at"], page["at"])
            before = page
            if finished >= 200 and queue["runnable"] == 1:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert 200 <= round(finished) <= 203, "each is counted once; the first three may have been half a second before"
    states = {state["queue"]: state for state in first["queues"]}
    assert (states["checkout"]["pause_reason"], states["checkout"]["rate"]) == ("a test", None)
    assert {"at", "queues", "workers", "beats", "recent_failures"} == set(page)
    assert queue["runnable"] == 1
    assert len(page["workers"]) == 1


def _seconds(since: str, until: str) -> float:
    return (datetime.fromisoformat(until) - datetime.fromisoformat(since)).total_seconds()


def test_a_terminal_gets_a_page_that_is_drawn_anew_until_ctrl_c(shop: Path, rows: Rows) -> None:
    rows.insert(2)
    leader, follower = pty.openpty()
    try:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        process = watch(shop, "0.1", stdin=follower, stdout=follower, stderr=follower, env=environment)
        shown = b""

        def drawn() -> bool:
            nonlocal shown
            shown += os.read(leader, 65536)
            return shown.count(b"RUNNABLE") >= 2 and shown.count(b"default") >= 2

        wait_until(drawn, what="two pages")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        os.close(leader)
        os.close(follower)
    assert b"{" not in shown


@pytest.mark.parametrize("wrong", ["0", "4000", "soon"])
def test_a_wrong_interval_is_refused(durable: Callable[..., Ran], shop: Path, wrong: str) -> None:
    ran = durable("status", "--watch", wrong)
    assert (ran.code, "--watch" in ran.err) == (2, True)


def test_what_finished_is_counted_by_queue_and_kept_rows_with_it(rows: Rows) -> None:
    worker = rows.worker()
    before = rows.run(inspection.history_end())
    plain = rows.claimed(worker, 3, queue="a")
    (kept,) = rows.claimed(worker, 1, queue="b", correlation_key="k", correlation_scope=("done",))
    rows.flush(worker, *(done(row) for row in plain), done(kept._replace(keeps_key=True)))
    rows.fetch("SELECT pg_sleep(0.6)")
    after = rows.run(inspection.history_end())
    assert rows.run(inspection.finished_between(before, after)) == {"a": 3, "b": 1}
    assert rows.run(inspection.finished_between(after, after)) == {}
    assert after.block >= 1


def test_only_the_end_of_a_long_history_is_read(rows: Rows) -> None:
    """On an ordinary session, as the command line has it."""
    rows.fetch(
        "INSERT INTO {schema}.history (id, finished_at, eligible_at, created_at, status, token, version, attempt,"
        " machine_version, priority, crashes, cancel_requested, queue, machine, step, state_type, state)"
        " SELECT n, clock_timestamp(), now(), now(), 'done', 1, 1, 0, 1, 0, 0, false, 'q', 'task', 'run', 'json', '{}'"
        " FROM generate_series(1, 100000) AS n"
    )
    end = rows.run(inspection.history_end())
    rows.fetch("ANALYZE {schema}.history")
    name, parameters = statement(inspection.finished_between(end, end._replace(at=end.at + timedelta(seconds=2))))
    with psycopg.connect(rows.dsn) as connection:
        explained = connection.execute(f"EXPLAIN {rows.sql[name]}".encode(), parameters).fetchall()
    scans = [line for (line,) in explained if f"on history_{end.day}" in line]
    assert end.block > inspection.BLOCKS_BEFORE, "else there is nothing to leave out"
    assert [line.split("->")[1].split(" on ")[0].strip() for line in scans] == ["Tid Range Scan"]
