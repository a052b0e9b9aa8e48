"""A queue that loses one worker process after the other is seen by doctor and healthcheck."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import Ran
from tests.fix_db import wait_until

TASKS = """
    import os

    @app.task(name="dies")
    def dies(): os._exit(7)
"""


def test_a_crash_looping_queue_is_reported(
    app: Any, here: Path, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Any],
    durable: Callable[..., Ran],
) -> None:  # fmt: skip
    tasks_module(TASKS)
    worker = durable_worker("worker", "-c", "1", "-n", "w@test")
    dies = app.task(name="dies")(lambda: None)
    results = [dies.delay()]
    wait_until(lambda: results[0].ready(), 30)
    assert [row for row in durable("doctor", "--json").json["findings"] if row["finding"] == "crash loop"] == []
    results.append(dies.delay())
    wait_until(lambda: results[1].ready(), 30)
    assert {result.error.error_type for result in results} == {"WorkerLost"}
    (found,) = [row for row in durable("doctor", "--json").json["findings"] if row["finding"] == "crash loop"]
    assert "queue default lost 6 worker processes within" in found["cause"], worker.output()
    assert "exited with code 7" in found["cause"]
    wait_until(lambda: "lost 6 worker processes" in (durable("healthcheck", "--json").json["reason"] or ""))
