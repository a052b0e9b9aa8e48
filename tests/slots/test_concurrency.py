"""`durable worker -P threads` and `-P asyncio`: many steps at once in one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable, TaskFailed
from tests.fix_db import wait_until
from tests.slots.conftest import POOLS, START, WAITS, lines


def test_as_many_threads_run_at_once_as_were_asked_for(
    tasks: dict[str, Any], durable_worker: START, tmp_path: Path
) -> None:
    worker = durable_worker("worker", "-P", "threads", "-c", "20")
    results = [tasks["meet"].delay(str(tmp_path / "met"), 20) for _ in range(20)]
    pids = {result.get(timeout=20) for result in results}
    assert len(pids) == 1
    assert pids == set(worker.children("durable:default"))


def test_thousands_of_coroutines_run_at_once_in_one_process(
    app: Durable, tasks: dict[str, Any], durable_worker: START
) -> None:
    durable_worker("worker", "-P", "asyncio", "-c", "2000")
    with app.batch():
        results = [tasks["ameet"].delay(2000) for _ in range(2000)]
    assert len({result.get(timeout=60) for result in results}) == 1


@pytest.mark.parametrize("pool", POOLS)
def test_plain_and_async_steps_run_in_both(
    app: Durable, tasks: dict[str, Any], durable_worker: START, pool: str
) -> None:
    durable_worker("worker", "-P", pool, "-c", "5")
    with app.batch():
        plain = [tasks["add"].delay(n) for n in range(200)]
        coroutines = [tasks["aadd"].delay(n) for n in range(200)]
    assert [result.get(timeout=20) for result in plain + coroutines] == [*range(1, 201), *range(1, 201)]


@pytest.mark.parametrize("pool", POOLS)
def test_a_machine_goes_through_plain_and_async_steps(
    app: Durable, tasks: dict[str, Any], durable_worker: START, pool: str
) -> None:
    durable_worker("worker", "-P", pool, "-c", "5")
    from durable import Await, Done, Machine, step

    @app.machine(name="m", inline=True)
    class M(Machine):
        @step(initial=True)
        def first(self, ctx: Any) -> Any:
            return Await("go", then=self.second)

        @step
        def second(self, ctx: Any) -> Any:
            return Done()

    results = [app.insert(M, state={}) for _ in range(20)]
    for result in results:
        app.signal(result.id, "go", "over")
    assert [result.get(timeout=20) for result in results] == [{"a": 1, "b": 2, "error": "over"}] * 20


@pytest.mark.parametrize("pool", POOLS)
def test_a_key_and_a_gate_hold_within_one_process(
    app: Durable, tasks: dict[str, Any], durable_worker: START, pool: str, connection: psycopg.Connection[Any]
) -> None:
    durable_worker("worker", "-P", pool, "-c", "10")
    task = tasks["alone" if pool == "threads" else "aalone"]
    with app.batch():
        results = [task.apply_async(concurrency_key="k") for _ in range(10)]
    assert {result.get(timeout=30) for result in results} == {1}


@pytest.mark.parametrize("pool", POOLS)
def test_several_queues_have_a_process_each(
    app: Durable, tasks: dict[str, Any], durable_worker: START, tmp_path: Path, pool: str
) -> None:
    worker = durable_worker("worker", "-P", pool, "-Q", "default:3,emails:5")
    name = WAITS[pool]
    started, go = tmp_path / "started", tmp_path / "go"
    results = [tasks[name].apply_async((str(started), str(go)), queue="default") for _ in range(6)]
    results += [tasks[name].apply_async((str(started), str(go)), queue="emails") for _ in range(8)]
    wait_until(lambda: len(lines(started)) == 8)
    assert sorted(lines(started).count(pid) for pid in set(lines(started))) == [3, 5]
    go.touch()
    pids = [result.get(timeout=20) for result in results]
    assert set(pids) == {pid for queue in ("default", "emails") for pid in worker.children(f"durable:{queue}")}


@pytest.mark.parametrize("pool", POOLS)
def test_a_killed_process_loses_nothing_and_its_steps_run_again_alone(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: START,
    tmp_path: Path,
    connection: psycopg.Connection[Any],
    pool: str,
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "6")
    started, go = tmp_path / "started", tmp_path / "go"
    name = WAITS[pool]
    results = [tasks[name].delay(str(started), str(go)) for _ in range(6)]
    later = [tasks["add"].delay(n) for n in range(20)]
    wait_until(lambda: len(lines(started)) == 6)
    go.touch()
    os.kill(int(lines(started)[0]), signal.SIGKILL)
    assert all(result.get(timeout=30) for result in results)
    assert [result.get(timeout=20) for result in later] == list(range(1, 21))
    crashed = connection.execute(f"SELECT max(crashes) FROM {app.schema}.history WHERE machine = 'add'").fetchone()
    assert crashed == (0,)
    assert worker.process.poll() is None


@pytest.mark.parametrize("pool", POOLS)
def test_sigterm_lets_running_steps_end_and_gives_the_rest_back(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: START,
    tmp_path: Path,
    connection: psycopg.Connection[Any],
    pool: str,
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "4", "--prefetch", "10", "-l", "debug")
    started, go = tmp_path / "started", tmp_path / "go"
    name = WAITS[pool]
    results = [tasks[name].delay(str(started), str(go)) for _ in range(4)]
    wait_until(lambda: len(lines(started)) == 4)
    waiting = [tasks["add"].delay(n) for n in range(5)]
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "steps are let end" in worker.output())
    go.touch()
    assert worker.process.wait(20) == 0  # a second signal would end it at once
    assert [result.status for result in results] == ["done"] * 4
    assert [result.status for result in waiting] == ["runnable"] * 5
    left = connection.execute(f"SELECT sum(crashes), sum(attempt) FROM {app.schema}.instances").fetchone()
    assert left == (0, 0)


@pytest.mark.parametrize("pool", POOLS)
def test_a_step_that_does_not_end_in_time_is_given_back_at_no_cost(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: START,
    tmp_path: Path,
    connection: psycopg.Connection[Any],
    pool: str,
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "4", "--drain-timeout", "0.3")
    started = tmp_path / "started"
    name = WAITS[pool]
    results = [tasks[name].delay(str(started), str(tmp_path / "never")) for _ in range(4)]
    wait_until(lambda: len(lines(started)) == 4)
    assert worker.stop() == 0
    assert [result.status for result in results] == ["runnable"] * 4
    left = connection.execute(f"SELECT sum(crashes), sum(attempt) FROM {app.schema}.instances").fetchone()
    assert left == (0, 0)


def test_plain_steps_that_wait_for_a_thread_do_not_begin_during_a_drain(
    app: Durable, tasks: dict[str, Any], durable_worker: START, tmp_path: Path, connection: psycopg.Connection[Any]
) -> None:
    worker = durable_worker("worker", "-P", "asyncio", "-c", "200", "-l", "debug")
    started, go = tmp_path / "started", tmp_path / "go"
    with app.batch():
        results = [tasks["wait"].delay(str(started), str(go)) for _ in range(200)]
    held = f"SELECT count(*) FROM {app.schema}.instances WHERE status = 'executing'"
    wait_until(lambda: connection.execute(held).fetchone() == (200,) and len(lines(started)) >= 8)
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "steps are let end" in worker.output())
    go.touch()
    assert worker.process.wait(20) == 0  # a second signal would end it at once
    statuses = [result.status for result in results]
    assert statuses.count("done") == len(lines(started)) < 200
    assert statuses.count("runnable") == 200 - len(lines(started))


@pytest.mark.parametrize("pool", POOLS)
def test_a_machine_that_cannot_be_made_is_no_trouble_to_its_neighbours(
    app: Durable, tasks: dict[str, Any], durable_worker: START, pool: str
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "5")
    children = worker.started(count=2)
    from durable import Done, Machine, step

    @app.machine(name="unmade")
    class Unmade(Machine):
        @step(initial=True)
        def start(self, ctx: Any) -> Any:
            return Done()

    for _ in range(3):
        result = app.insert(Unmade)
        with pytest.raises(TaskFailed, match="ConnectionError: no server there"):
            result.get(timeout=20)
    assert tasks["add"].delay(1).get(timeout=20) == 2
    assert worker.children() == children
