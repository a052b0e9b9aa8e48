"""Periodic work with real beats: one killed in the middle, and none at all."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until

TASKS = """
    from durable import crontab, every

    @app.periodic(every(0.25), args=(7,), misfire="all")
    @app.task(name="tick")
    def tick(n): return n

    @app.periodic(crontab(hour=3, minute=0, tz="Europe/Berlin"), name="nightly")
    @app.task(name="report")
    def report(): return "reported"

    app.conf.beat_schedule = {"hourly": {"task": "report", "schedule": 3600}}
"""


def test_every_occurrence_is_inserted_once_by_two_beats_of_which_one_is_killed(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], connection: Any
) -> None:
    tasks_module(TASKS)
    beats = [durable_worker("beat"), durable_worker("beat")]
    stands = f"SELECT fired, next_at FROM {app.schema}.schedules WHERE name = 'tick'"

    def fired(least: int) -> Any:
        return wait_until(
            lambda: next((row for row in connection.execute(stands).fetchall() if row[0] >= least), None),
            what=f"{least} occurrences",
        )

    count, next_at = fired(3)
    first = next_at - count * timedelta(seconds=0.25)
    beats[0].process.send_signal(signal.SIGKILL)
    fired(count + 6)
    assert beats[1].stop() == 0
    count, next_at = connection.execute(stands).fetchone()
    assert next_at == first + count * timedelta(seconds=0.25)
    inserted = f"SELECT count(*), count(DISTINCT state) FROM {app.schema}.instances WHERE machine = 'tick'"
    assert connection.execute(inserted).fetchone() == (count, 1)
    names = connection.execute(f"SELECT name, tz FROM {app.schema}.schedules ORDER BY name").fetchall()
    assert names == [("hourly", "UTC"), ("nightly", "Europe/Berlin"), ("tick", "UTC")]


def test_beats_that_are_killed_as_soon_as_they_fire_neither_lose_nor_repeat_an_occurrence(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], connection: Any
) -> None:
    """The pauses between them are late, not missed."""
    tasks_module(TASKS)
    stands = f"SELECT fired, next_at FROM {app.schema}.schedules WHERE name = 'tick'"

    def fired(least: int) -> Any:
        return wait_until(
            lambda: next((row for row in connection.execute(stands).fetchall() if row[0] >= least), None),
            what=f"{least} occurrences",
        )

    count, first = 0, None
    for _ in range(4):
        beat = durable_worker("beat")
        count, next_at = fired(count + 1)
        first = first or next_at - count * timedelta(seconds=0.25)
        beat.process.kill()
        beat.process.wait(10)
        count, next_at = connection.execute(stands).fetchone()
    assert next_at == first + count * timedelta(seconds=0.25)
    inserted = f"SELECT count(*) FROM {app.schema}.instances WHERE machine = 'tick'"
    assert connection.execute(inserted).fetchone() == (count,)


def test_without_a_beat_the_agents_fire_after_a_while(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], connection: Any
) -> None:
    tasks_module(TASKS)
    worker = durable_worker("worker", "-c", "1", DURABLE_BEAT_GRACE="1")
    done = f"SELECT count(*) FROM {app.schema}.history WHERE machine = 'tick' AND status = 'done'"
    wait_until(lambda: connection.execute(done).fetchone()[0] >= 8, what="eight runs")
    assert "no beat has fired schedules for 1 s; start `durable beat`" in worker.output()
