"""Time limits and cancels among many slots: what befalls one step never befalls its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable, TaskCancelled, TaskFailed
from tests.fix_db import wait_until
from tests.slots.conftest import POOLS, START, lines


@pytest.mark.parametrize("pool", POOLS)
def test_a_soft_limit_is_raised_in_its_own_step(
    tasks: dict[str, Any], durable_worker: START, tmp_path: Path, pool: str
) -> None:
    durable_worker("worker", "-P", pool, "-c", "5")
    started, go = tmp_path / "started", tmp_path / "go"
    neighbours = [tasks[name].delay(str(started), str(go)) for name in ("wait", "await")]
    wait_until(lambda: len(lines(started)) == 2)
    assert tasks["soft"].delay().get(timeout=20).startswith("0.2 durable-slot-")
    assert tasks["asoft"].delay().get(timeout=20) == "0.2 MainThread"
    go.touch()
    assert len({neighbour.get(timeout=20) for neighbour in neighbours}) == 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_hard_limit_is_a_crash_of_its_step_and_its_neighbours_go_on(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: START,
    tmp_path: Path,
    pool: str,
    connection: psycopg.Connection[Any],
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "6", DURABLE_MAX_CRASHES="1")
    started, go = tmp_path / "started", tmp_path / "go"
    neighbours = [tasks[name].delay(str(started), str(go)) for name in ("wait", "await")]
    wait_until(lambda: len(lines(started)) == 2)
    for name in ("slow", "aslow"):
        with pytest.raises(
            TaskFailed, match=r"WorkerLost: its step ran longer than its time_limit of 0\.4 s in worker"
        ):
            tasks[name].delay().get(timeout=20)
    assert [tasks["add"].delay(n).get(timeout=20) for n in range(3)] == [1, 2, 3]
    go.touch()
    pids = {neighbour.get(timeout=20) for neighbour in neighbours}
    assert pids <= set(worker.children("durable:default"))
    crashed = connection.execute(f"SELECT machine FROM {app.schema}.history WHERE crashes > 0 ORDER BY 1").fetchall()
    assert crashed == [("aslow",), ("slow",)]


@pytest.mark.parametrize(("pool", "name"), [("threads", "stuck"), ("asyncio", "stuck"), ("asyncio", "astuck")])
def test_a_step_that_goes_on_after_its_limit_holds_its_slot_and_its_outcome_is_stale(
    app: Durable, tasks: dict[str, Any], durable_worker: START, tmp_path: Path, pool: str, name: str
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "2", DURABLE_MAX_CRASHES="1")
    started, go = tmp_path / "started", tmp_path / "go"
    stuck = tasks[name].delay(str(started), str(go))
    with pytest.raises(TaskFailed, match="WorkerLost"):
        stuck.get(timeout=20)
    waits, waiting = tmp_path / "waits", tmp_path / "waiting"
    first, second = (tasks["await"].delay(str(waits), str(waiting)) for _ in range(2))
    wait_until(lambda: len(lines(waits)) == 1)  # the other slot
    assert "late" not in lines(started)
    go.touch()
    wait_until(lambda: len(lines(waits)) == 2)
    waiting.touch()
    assert first.get(timeout=20) == second.get(timeout=20)
    assert lines(started)[-1] == "late"
    wait_until(lambda: "outcomes were stale" in worker.output())
    assert stuck.status == "failed"


@pytest.mark.parametrize(("pool", "name"), [("asyncio", "block"), ("threads", "block"), ("threads", "hold_gil")])
def test_a_process_that_a_step_blocks_altogether_is_replaced_at_no_cost_to_the_others(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: START,
    tmp_path: Path,
    pool: str,
    name: str,
    connection: psycopg.Connection[Any],
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "4")
    started, go = tmp_path / "started", tmp_path / "go"
    neighbour = tasks["await"].delay(str(started), str(go))
    wait_until(lambda: lines(started))
    (before,) = worker.started("durable:default")
    blocking = tasks[name].delay(str(tmp_path / "blocked"))
    wait_until((tmp_path / "blocked").exists)
    go.touch()
    assert blocking.get(timeout=40) in ("moved", "let go")
    assert neighbour.get(timeout=20)
    wait_until(lambda: before not in worker.children("durable:default"), what="its end")
    crashes = dict(connection.execute(f"SELECT machine, crashes FROM {app.schema}.history").fetchall())
    assert crashes == {name: 1, "await": 0}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ["wait", "await"])
def test_a_cancel_that_terminates_reaches_that_step_alone(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: START,
    tmp_path: Path,
    pool: str,
    name: str,
    connection: psycopg.Connection[Any],
) -> None:
    worker = durable_worker("worker", "-P", pool, "-c", "4")
    started, go = tmp_path / "started", tmp_path / "go"
    neighbour = tasks["await"].delay(str(started), str(go))
    doomed = tasks[name].delay(str(started), str(go))
    wait_until(lambda: len(lines(started)) == 2)
    assert doomed.cancel("enough", terminate=True)
    with pytest.raises(TaskCancelled, match="enough"):
        doomed.get(timeout=20)
    go.touch()
    assert neighbour.get(timeout=20) in worker.children("durable:default")
    assert connection.execute(f"SELECT max(crashes) FROM {app.schema}.history").fetchone() == (0,)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ["cancelled", "acancelled"])
def test_a_step_may_look_whether_it_is_still_wanted(
    tasks: dict[str, Any], durable_worker: START, tmp_path: Path, pool: str, name: str
) -> None:
    durable_worker("worker", "-P", pool, "-c", "4")
    started = tmp_path / "started"
    running = [tasks[name].delay(str(started)) for _ in range(2)]
    wait_until(lambda: len(lines(started)) == 2)
    running[0].cancel("enough")
    with pytest.raises(TaskCancelled, match="enough"):
        running[0].get(timeout=20)
    assert running[1].status == "executing"
    running[1].cancel("enough")
    with pytest.raises(TaskCancelled):
        running[1].get(timeout=20)
