"""Steps that run too long, and worker processes that have done their share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import Durable, TaskFailed
from tests.fix_app import Command
from tests.fix_db import wait_until

TASKS = """
    import asyncio, hashlib, os, time
    from durable import Done, Machine, SoftTimeLimitExceeded, Stop, step

    @app.task(name="patient", soft_time_limit=0.2)
    def patient():
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded as limit:
            return f"cleaned up after {limit.seconds}"

    @app.task(name="patient_async", soft_time_limit=0.2, max_attempts=1)
    async def patient_async():
        await asyncio.sleep(60)

    @app.machine(name="m", soft_time_limit=0.2)
    class M(Machine):
        @step
        def go(self, ctx):
            time.sleep(60)

        def handle(self, error, ctx):
            return Stop(type(error).__name__)

    @app.task(name="stubborn", time_limit=0.4)
    def stubborn():
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # in C, for minutes

    @app.task(name="quick")
    def quick(n): return os.getpid()

    @app.task(name="hungry")
    def hungry():
        hungry.kept = bytearray(150_000_000)
        return os.getpid()
"""


@pytest.fixture
def tasks(app: Durable, tasks_module: Callable[[str], Path]) -> dict[str, Any]:
    """The tasks by name, as a producer knows them."""
    tasks_module(TASKS)
    names = ("patient", "patient_async", "stubborn", "quick", "hungry")
    return {name: app.task(name=name)(lambda *args: None) for name in names}


def test_a_soft_limit_is_raised_inside_the_step(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    durable_worker("worker", "-c", "1")
    assert tasks["patient"].delay().get(timeout=20) == "cleaned up after 0.2"
    with pytest.raises(TaskFailed, match="SoftTimeLimitExceeded"):
        tasks["patient_async"].delay().get(timeout=20)


def test_a_step_beyond_its_hard_limit_is_killed_and_its_neighbours_are_not(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], connection: Any
) -> None:
    durable_worker("worker", "-c", "2", DURABLE_MAX_CRASHES="1")
    stubborn = tasks["stubborn"].delay()
    others = [tasks["quick"].delay(n) for n in range(300)]
    with pytest.raises(TaskFailed, match=r"WorkerLost: .*SIGKILL.*its step ran longer than its time_limit of 0\.4 s"):
        stubborn.get(timeout=20)
    assert all(other.get(timeout=20) for other in others)
    crashed = f"SELECT DISTINCT machine FROM {app.schema}.history WHERE crashes > 0"
    assert connection.execute(crashed).fetchall() == [("stubborn",)]


def test_a_worker_process_is_replaced_after_so_many_steps(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], connection: Any
) -> None:
    worker = durable_worker("worker", "-c", "1", "--max-tasks-per-child", "5")
    began = time.monotonic()
    pids = [tasks["quick"].delay(n).get(timeout=20) for n in range(23)]
    assert {pids.count(pid) for pid in set(pids[:20])} == {5}
    assert time.monotonic() - began < 20
    assert "exited with code 0" in worker.output()
    assert connection.execute(f"SELECT max(crashes), max(version) FROM {app.schema}.history").fetchone() == (0, 1)


def test_a_worker_process_that_has_grown_too_large_is_replaced(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    durable_worker("worker", "-c", "1", "--max-memory-per-child", "140MB")
    first = tasks["quick"].delay(0).get(timeout=20)
    assert tasks["quick"].delay(0).get(timeout=20) == first
    assert tasks["hungry"].delay().get(timeout=20) == first
    wait_until(lambda: tasks["quick"].delay(0).get(timeout=20) != first, what="a fresh process")
