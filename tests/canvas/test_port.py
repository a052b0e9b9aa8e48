"""A Celery tutorial's tasks file, ported by changing its imports and its app line and nothing else."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from durable import TaskFailed
from tests.fix_app import Command
from tests.fix_db import wait_until

TUTORIAL = """\
from celery import Celery, Task, chain, chord, group
from celery.schedules import crontab
from celery.signals import task_success
from celery.utils.log import get_task_logger

app = Celery("tasks", broker="pyamqp://guest@localhost//", backend="redis://localhost")

logger = get_task_logger(__name__)

app.conf.beat_schedule = {
    "add-every-fifth-of-a-second": {"task": "tasks.add", "schedule": 0.2, "args": (16, 16)},
    "add-every-monday-morning": {
        "task": "tasks.add",
        "schedule": crontab(hour=7, minute=30, day_of_week=1),
        "args": (16, 16),
        "options": {"queue": "mondays"},
    },
}


@app.task
def add(x, y):
    logger.info("adding %s + %s", x, y)
    return x + y


@app.task
def mul(x, y):
    return x * y


@app.task
def xsum(numbers):
    return sum(numbers)


class Flaky(Exception):
    pass


@app.task(bind=True, max_retries=3, default_retry_delay=0.05)
def fetch(self, url):
    try:
        if self.request.retries < 2:
            raise Flaky(url)
        return f"{url} after {self.request.retries} retries"
    except Flaky as exc:
        raise self.retry(exc=exc)


@app.task(bind=True, autoretry_for=(Flaky,), retry_backoff=0.01, retry_backoff_max=1, retry_jitter=True, max_retries=2)
def hopeless(self):
    raise Flaky("never")


class Recording(Task):
    def on_success(self, retval, task_id, args, kwargs):
        with open(args[0], "a") as notes:
            notes.write(f"on_success {retval}\\n")

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        with open(args[0], "a") as notes:
            notes.write(f"on_failure {exc}\\n")


@app.task(base=Recording, ignore_result=True, acks_late=True, max_retries=0)
def record(path, fail=False):
    if fail:
        raise ValueError("told to")
    return "recorded"


@task_success.connect(sender=record)
def note_success(sender=None, result=None, **kwargs):
    logger.info("%s returned %s", sender.name, result)


def workflow():
    return (add.s(2, 2) | add.s(4) | mul.s(8)).apply_async()


def fan_out():
    return chord(group(add.s(i, i) for i in range(10)), xsum.s())()


def nested():
    return chain(add.s(4, 4), group(mul.s(2), mul.s(3)), xsum.s())()
"""

CHANGES = {
    "from celery import Celery, Task, chain, chord, group": "from durable import Durable, Task, chain, chord, group",
    "from celery.schedules import crontab": "from durable import crontab",
    "from celery.signals import task_success": "from durable.celery_signals import task_success",
    "from celery.utils.log import get_task_logger": "from logging import getLogger as get_task_logger",
}


@pytest.fixture
def tutorial(tmp_path: Path, database: str, schema: str) -> Iterator[ModuleType]:
    lines = [CHANGES.get(line, line) for line in TUTORIAL.splitlines()]
    app_line = next(index for index, line in enumerate(lines) if line.startswith("app = Celery("))
    lines[app_line] = f'app = Durable("tasks", dsn={database!r}, schema={schema!r})'
    changed = [line for line in difflib.ndiff(TUTORIAL.splitlines(), lines) if line.startswith("+ ")]
    assert len(changed) == 5, "four imports and the app"
    path = tmp_path / "tasks.py"
    path.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("tasks", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["tasks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.app.migrate()
    yield module
    from_here = [entry for entry in module.task_success.receivers if entry[2] is module.note_success]
    for uid, sender, _ in from_here:
        module.task_success.disconnect(uid, sender=sender)
    module.app.close()
    del sys.modules["tasks"]


def test_the_tutorial_runs_as_it_did(tutorial: Any, durable_worker: Callable[..., Command], tmp_path: Path) -> None:
    durable_worker("worker", "-c", "2", "-B", "-l", "info", PYTHONDONTWRITEBYTECODE="1")
    added = tutorial.add.delay(4, 4)
    assert added.get(timeout=20) == 8
    assert (added.state, added.ready(), added.successful()) == ("SUCCESS", True, True)
    assert tutorial.add.apply_async((2, 2), countdown=0.1).get(timeout=20) == 4
    assert tutorial.add(1, 1) == 2

    assert tutorial.fetch.delay("http://example").get(timeout=20) == "http://example after 2 retries"
    hopeless = tutorial.hopeless.delay()
    with pytest.raises(TaskFailed, match="Flaky: never"):
        hopeless.get(timeout=20)
    assert (hopeless.attempts, hopeless.state) == (3, "FAILURE")

    assert tutorial.workflow().get(timeout=20) == 64
    assert tutorial.fan_out().get(timeout=20) == 90
    assert tutorial.nested().get(timeout=20) == 40
    assert tutorial.chord([tutorial.add.s(i, i) for i in range(5)])(tutorial.xsum.s()).get(timeout=20) == 20
    assert (~tutorial.xsum.map([[1, 2], [3, 4]])) == [3, 7]
    assert tutorial.add.chunks(zip(range(4), range(4), strict=True), 2)().get(timeout=20) == [[0, 2], [4, 6]]

    notes = tmp_path / "notes"
    recorded = tutorial.record.delay(str(notes))
    assert recorded.get(timeout=20) is None, "ignore_result"
    failed = tutorial.record.delay(str(notes), fail=True)
    wait_until(failed.ready, what="the failure")
    assert notes.read_text() == "on_success recorded\non_failure told to\n"


def test_the_tutorials_schedule_is_kept(tutorial: Any, durable_worker: Callable[..., Command], connection: Any) -> None:
    fast, monday = tutorial.app.schedules()
    assert (fast.schedule.seconds, monday.schedule.text, monday.new.queue) == (0.2, "30 7 * * 1", "mondays")
    durable_worker("worker", "-c", "1", "-B", PYTHONDONTWRITEBYTECODE="1")
    done = f"SELECT count(*) FROM {tutorial.app.schema}.instance_view WHERE machine = 'tasks.add' AND result = '32'"
    wait_until(lambda: connection.execute(done).fetchone()[0] >= 3, what="three runs")
