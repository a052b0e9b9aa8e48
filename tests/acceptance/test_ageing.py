"""A low priority under a constant stream of a better one, by real processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from durable.storage import ageing
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.test_docs import load

BODY = """
import pathlib, time
stop = pathlib.Path(__file__).with_name("stop")

@app.task
def stream():
    # There is always one waiting: each sees to the next before it ends.
    if not stop.exists():
        stream.delay()
        time.sleep(0.002)

@app.task
def low():
    return "had its turn"
"""


@pytest.fixture
def tasks(tasks_module: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    tasks = load(tasks_module(BODY) / "tasks.py")
    tasks.app.migrate()
    yield tasks
    tasks.app.close()
    del sys.modules["tasks"]


def test_a_low_row_waits_as_long_as_better_ones_come_and_has_its_turn_once_priorities_age(
    tasks: Any, tmp_path: Path, connection: Any, durable_worker: Callable[..., Command]
) -> None:
    app = tasks.app

    def done() -> int:
        return int(connection.execute(f"SELECT count(*) FROM {app.schema}.history").fetchone()[0])

    app.insert_many([(tasks.stream, {})] * 20)
    wanted = tasks.low.apply_async(priority=9)
    durable_worker("worker", "-c", "1")
    wait_until(lambda: done() >= 200, 60)
    assert wanted.status == "runnable"
    app.run(ageing.set_ageing("default", 1.0))
    assert wanted.get(timeout=60) == "had its turn"
    assert not (tmp_path / "stop").exists(), "the stream never ended"
    (tmp_path / "stop").touch()
