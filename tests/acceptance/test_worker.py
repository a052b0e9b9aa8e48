"""`durable worker` and `durable beat` as processes: what users run, and what befalls it."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable, TaskFailed, config
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.fix_proxy import CountingProxy

TASKS = """
    import ctypes, os, signal, time
    from pathlib import Path

    @app.task(name="add")
    def add(a, b=1): return a + b

    @app.task(name="mark", queue="checkout")
    def mark(path, text):
        with open(path, "a") as file: file.write(text + "\\n")
        return text

    @app.task(name="wait_for")
    def wait_for(started, path):
        with open(started, "a") as file: file.write(f"{os.getpid()}\\n")
        while not Path(path).exists(): time.sleep(0.01)
        return os.getpid()

    @app.task(name="pid")
    def pid():
        time.sleep(0.002)
        return os.getppid()

    @app.task(name="die_once")
    def die_once(path):
        if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "survived"

    @app.task(name="die")
    def die(): os.kill(os.getpid(), signal.SIGKILL)

    @app.task(name="hold_gil")
    def hold_gil(path, seconds):
        with open(path, "a") as file: file.write("entered\\n")
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        return "held"

    @app.task(name="quit")
    def quit_(): raise SystemExit(3)
"""


@pytest.fixture
def tasks(app: Durable, tasks_module: Callable[[str], Path]) -> dict[str, Any]:
    """The tasks by name, as a producer sees them; tasks.py is written for the workers."""
    folder = tasks_module(TASKS)
    namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
    body = (folder / "tasks.py").read_text().split("\n", 2)[2]
    exec(compile(body, "tasks.py", "exec"), namespace)  # the same text, registered with this test's app
    return {task.name: task for task in app.tasks.values()}


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_tasks_of_two_queues_run_and_return(tasks: dict[str, Any], durable_worker: Callable[..., Command]) -> None:
    durable_worker("worker", "-Q", "default,checkout", "-c", "2")
    results = [tasks["add"].delay(n) for n in range(50)]
    marked = tasks["mark"].delay("/dev/null", "x")

    assert [result.get(timeout=20) for result in results] == [n + 1 for n in range(50)]
    assert marked.get(timeout=20) == "x"
    assert {result.attempts for result in results} == {1}


def test_a_killed_worker_process_costs_its_step_one_crash_and_nobody_else_anything(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    with app.batch():
        before = [tasks["add"].delay(n) for n in range(20)]
        dying = tasks["die_once"].delay(str(tmp_path / "once"))
        after = [tasks["add"].delay(n) for n in range(20)]
    worker = durable_worker("worker", "-c", "1")

    assert dying.get(timeout=20) == "survived"
    assert [result.get(timeout=20) for result in before + after] == [*range(1, 21), *range(1, 21)]
    rows = connection.execute(f"SELECT id, crashes, version FROM {app.schema}.history").fetchall()
    assert {row[0] for row in rows if row[1]} == {dying.id}
    assert {row[2] for row in rows} == {1}
    assert "SIGKILL" in worker.output()


def test_an_instance_that_kills_its_worker_each_time_fails_with_worker_lost(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], connection: psycopg.Connection[Any]
) -> None:
    with app.batch():
        poison = tasks["die"].delay()
        innocent = [tasks["add"].delay(n) for n in range(30)]
    durable_worker("worker", "-c", "2")

    with pytest.raises(TaskFailed, match="SIGKILL") as failure:
        poison.get(timeout=30)
    assert failure.value.error_type == "WorkerLost"
    assert [result.get(timeout=20) for result in innocent] == list(range(1, 31))
    crashed = connection.execute(f"SELECT id, crashes FROM {app.schema}.history WHERE crashes > 0").fetchall()
    assert crashed == [(poison.id, 3)]
    assert poison.attempts == 0


def test_a_system_exit_in_a_step_fails_the_instance_and_not_the_worker(
    tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    worker = durable_worker("worker", "-c", "1")
    before = worker.started("durable:default")
    result = tasks["quit"].delay()

    with pytest.raises(TaskFailed, match="SystemExit: 3"):
        result.get(timeout=20)
    assert tasks["add"].delay(1).get(timeout=20) == 2
    assert worker.children("durable:default") == before


def test_sigterm_lets_the_running_step_end_and_gives_the_rest_back_untouched(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    worker = durable_worker("worker", "-c", "1", "--prefetch", "10", "-l", "debug")
    running = tasks["wait_for"].delay(str(started), str(go))
    wait_until(lambda: started.exists())
    waiting = [tasks["add"].delay(n) for n in range(5)]
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "steps are let end" in worker.output())
    go.touch()

    assert worker.process.wait(15) == 0
    assert running.status == "done"
    assert [result.status for result in waiting] == ["runnable"] * 5
    rows = connection.execute(f"SELECT status, attempt, crashes FROM {app.schema}.instances").fetchall()
    assert rows == [("runnable", 0, 0)] * 5
    live = connection.execute(f"SELECT count(*) FROM {app.schema}.workers WHERE dead_at IS NULL").fetchone()
    assert live == (0,)


def test_a_second_signal_stops_at_once_and_the_cut_off_step_costs_nothing(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    started = tmp_path / "started"
    worker = durable_worker("worker", "-c", "1", DURABLE_DRAIN_TIMEOUT="60")
    tasks["wait_for"].delay(str(started), str(tmp_path / "never"))
    wait_until(lambda: started.exists())
    worker.process.send_signal(signal.SIGINT)
    wait_until(lambda: "drains" in worker.output())
    worker.process.send_signal(signal.SIGINT)

    assert worker.process.wait(15) == 0
    rows = connection.execute(
        f"SELECT status, attempt, crashes, version, token, reason FROM {app.schema}.instances"
    ).fetchall()
    assert rows == [("runnable", 0, 0, 0, 1, "its worker was shut down")]


def test_a_step_that_outlasts_the_drain_time_is_cut_off_and_runs_again_elsewhere(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    worker = durable_worker("worker", "-c", "1", "--drain-timeout", "0.2")
    result = tasks["wait_for"].delay(str(started), str(go))
    wait_until(lambda: started.exists())

    assert worker.stop() == 0
    go.touch()
    durable_worker("worker", "-c", "1")
    result.get(timeout=20)
    assert len(lines(started)) == 2
    assert result.attempts == 1


def test_user_code_that_holds_the_gil_longer_than_the_lease_keeps_it_and_what_is_buffered_behind_it(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    with app.batch():
        result = tasks["hold_gil"].delay(str(tmp_path / "entered"), 4.5)  # the lease is 3 s
        behind = [tasks["add"].delay(n) for n in range(5)]
    durable_worker("worker", "-c", "1", "--prefetch", "10")
    durable_worker("beat")
    wait_until(lambda: (tmp_path / "entered").exists())
    held = f"SELECT status::text, token, count(*) FROM {app.schema}.instances GROUP BY 1, 2"
    assert connection.execute(held).fetchall() == [("executing", 1, 6)]

    assert result.get(timeout=20) == "held"
    assert [waiting.get(timeout=20) for waiting in behind] == list(range(1, 6))
    assert lines(tmp_path / "entered") == ["entered"]
    rows = connection.execute(f"SELECT DISTINCT attempt, version, crashes FROM {app.schema}.history").fetchall()
    assert rows == [(0, 1, 0)]
    assert connection.execute(f"SELECT token FROM {app.schema}.history WHERE id = {result.id}").fetchall() == [(1,)]


def test_a_stopped_worker_process_is_killed_and_its_step_runs_elsewhere(
    tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    durable_worker("worker", "-c", "2")
    result = tasks["wait_for"].delay(str(started), str(go))
    (first,) = wait_until(lambda: lines(started))
    os.kill(int(first), signal.SIGSTOP)
    go.touch()

    assert result.get(timeout=20) != int(first)


def test_a_command_frozen_longer_than_its_lease_commits_nothing_afterwards(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    frozen = durable_worker("worker", "-c", "1")
    result = tasks["wait_for"].delay(str(started), str(go))
    wait_until(lambda: started.exists())
    family = [frozen.pid, *frozen.children("")]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    other = durable_worker("worker", "-c", "1")
    wait_until(lambda: len(lines(started)) == 2, what="the reaper and a second run")
    for pid in reversed(family):
        os.kill(pid, signal.SIGCONT)
    go.touch()

    assert result.get(timeout=20) in other.children("durable:default")
    wait_until(lambda: "lost its lease" in frozen.output() or "stale" in frozen.output())
    assert result.attempts == 1
    assert tasks["add"].delay(1).get(timeout=20) == 2
    wait_until(
        lambda: (
            connection.execute(
                f"SELECT count(*) = 2 FROM {app.schema}.workers"
                " WHERE dead_at IS NULL AND expires_at > clock_timestamp()"
            ).fetchone()
            == (True,)
        ),
        what="both commands with a live lease",
    )


def test_a_killed_command_takes_its_children_along_and_a_new_one_takes_the_rows_back_at_once(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    worker = durable_worker("worker", "-c", "2", DURABLE_LEASE_TTL="600")
    result = tasks["wait_for"].delay(str(started), str(go))
    wait_until(lambda: started.exists())
    children = worker.children("")
    worker.process.kill()
    worker.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}/cwd").exists() for pid in children), what="the children's end")
    go.touch()
    durable_worker("worker", "-c", "2", DURABLE_LEASE_TTL="600")

    result.get(timeout=20)
    assert len(lines(started)) == 2


def test_a_killed_agent_is_replaced_and_work_goes_on(
    tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    worker = durable_worker("worker", "-c", "2")
    (agent,) = worker.started("durable:agent")
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: set(worker.children("durable:agent")) - {agent})

    assert tasks["add"].delay(1).get(timeout=20) == 2


def test_two_commands_on_one_queue_share_the_work(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    workers = [durable_worker("worker", "-c", "1"), durable_worker("worker", "-c", "1")]
    for worker in workers:
        wait_until(lambda worker=worker: worker.children("durable:default"))
    wait_until(lambda: app.run(_live_workers()) == 2, what="two leases")
    with app.batch():
        results = [tasks["pid"].delay() for _ in range(400)]

    ran = [result.get(timeout=30) for result in results]
    assert {pid: ran.count(pid) > 40 for pid in set(ran)} == {worker.pid: True for worker in workers}


def _live_workers() -> Any:
    rows = yield "workers", {}
    return len([row for row in rows if row[1] == "worker"])


def _live_beats() -> Any:
    rows = yield "workers", {}
    return len([row for row in rows if row[1] == "beat"])


def test_nothing_waits_behind_a_long_step_while_another_process_idles(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    durable_worker("worker", "-c", "2")
    for _ in range(50):
        tasks["add"].delay(1)
    tasks["add"].delay(1).get(timeout=20)  # now steps are known to be short, so that buffers are deep
    with app.batch():
        slow = tasks["wait_for"].delay(str(started), str(go))
        quick = [tasks["add"].delay(n) for n in range(200)]

    assert [result.get(timeout=20) for result in quick] == list(range(1, 201))
    assert slow.status == "executing"
    go.touch()
    slow.get(timeout=20)


def test_a_task_that_a_worker_does_not_know_waits_for_one_that_does(
    app: Durable,
    tasks: dict[str, Any],
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    head = "\n".join((tmp_path / "tasks.py").read_text().splitlines()[:2])
    (old / "tasks.py").write_text(f'{head}\n@app.task(name="other")\ndef other(): return 1\n')
    durable_worker("worker", "-c", "2", folder=old)
    result = tasks["add"].delay(1)
    query = (
        f"SELECT reason, attempt, crashes FROM {app.schema}.instances WHERE id = {result.id} AND status = 'runnable'"
    )
    reason, attempt, crashes = wait_until(
        lambda: next((row for row in connection.execute(query).fetchall() if row[0]), None), what="a reason on the row"
    )
    assert "does not know add version 1" in reason
    assert (attempt, crashes) == (0, 0)
    durable_worker("worker", "-c", "1")

    assert result.get(timeout=20) == 2


def test_a_scheduled_instance_runs_with_a_beat_and_without_one(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    durable_worker("worker", "-c", "1")
    alone = tasks["add"].apply_async((1,), countdown=0.3)
    assert alone.get(timeout=20) == 2
    beat = durable_worker("beat")
    wait_until(lambda: app.run(_live_beats()) == 1, what="the beat's lease")
    assert tasks["add"].apply_async((2,), countdown=0.3).get(timeout=20) == 3
    assert beat.stop() == 0


def test_an_expired_instance_ends_cancelled_without_having_run(
    app: Durable,
    tasks: dict[str, Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    marks = tmp_path / "marks"
    result = tasks["mark"].apply_async((str(marks), "x"), expires=0.05)
    query = f"SELECT expires_at < clock_timestamp() FROM {app.schema}.instances"
    wait_until(lambda: connection.execute(query).fetchone() == (True,), what="its expiry")
    durable_worker("worker", "-Q", "checkout", "-c", "1")

    wait_until(result.ready)
    assert (result.status, result.attempts, lines(marks)) == ("cancelled", 0, [])


def test_terminated_backends_are_replaced_and_nothing_runs_twice(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], connection: psycopg.Connection[Any]
) -> None:
    durable_worker("worker", "-c", "2")
    with app.batch():
        results = [tasks["pid"].delay() for _ in range(500)]
    wait_until(lambda: results[20].ready())
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'durable test worker%%'"
    )

    for result in results:
        result.get(timeout=30)
    rows = connection.execute(f"SELECT DISTINCT status, version FROM {app.schema}.history").fetchall()
    assert rows == [("done", 1)]


def test_sighup_starts_afresh_with_the_new_code(
    tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    worker = durable_worker("worker", "-c", "1")
    assert tasks["add"].delay(1).get(timeout=20) == 2
    module = tmp_path / "tasks.py"
    module.write_text(module.read_text().replace("return a + b", "return a + b + 100"))
    before = worker.started("durable:default")
    worker.process.send_signal(signal.SIGHUP)
    wait_until(lambda: (now := worker.children("durable:default")) and not set(now) & set(before), what="new children")

    assert tasks["add"].delay(1).get(timeout=20) == 102


def test_a_command_has_one_connection_per_process_and_two_more(
    tasks: dict[str, Any], durable_worker: Callable[..., Command], connection: psycopg.Connection[Any]
) -> None:
    durable_worker("worker", "-Q", "default:3,checkout:1")
    query = (
        "SELECT count(*) FILTER (WHERE application_name LIKE 'durable test worker%%'),"
        " count(*) FILTER (WHERE application_name LIKE 'durable test agent%%')"
        " FROM pg_stat_activity WHERE datname = current_database()"
    )
    wait_until(lambda: connection.execute(query).fetchone() == (4, 2), what="4 + 2 connections")
    assert tasks["add"].delay(1).get(timeout=20) == 2
    assert tasks["mark"].delay("/dev/null", "x").get(timeout=20) == "x"
    assert connection.execute(query).fetchone() == (4, 2)


FASTER = 5


def test_an_idle_command_makes_fewer_than_two_queries_a_second(
    app: Durable, counting_proxy: CountingProxy, durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    """Counted on the way to the server: the command's own, all of them, and nothing else; its clocks go FASTER."""
    (tmp_path / "tasks.py").write_text(
        f"from durable import Durable\napp = Durable('test', dsn={counting_proxy.dsn!r}, schema={app.schema!r})\n"
        "@app.task(name='add')\ndef add(a, b=1): return a + b\n"
    )
    defaults = {
        "DURABLE_LEASE_TTL": "20",
        "DURABLE_HEARTBEAT_INTERVAL": f"{5 / FASTER}",
        "DURABLE_POLL_INTERVAL": f"{1 / FASTER}",
        "DURABLE_RECONCILE_INTERVAL": f"{15 / FASTER}",
    }
    worker = durable_worker("worker", "-c", "5", **defaults)
    assert app.task(name="add")(_never).delay(1).get(timeout=20) == 2
    wait_until(lambda: app.run(_live_workers()) == 5)
    before, began = counting_proxy.queries, time.monotonic()
    assert before > 5, "it does not go past the proxy"
    time.sleep(12)  # a count over a window, not a race
    counted, window = counting_proxy.queries - before, time.monotonic() - began
    assert 0 < counted < 2 * FASTER * window, worker.output()


def _never(a: int, b: int = 1) -> int:
    raise AssertionError("runs on workers only")


def test_a_worker_with_a_beat_runs_on_the_longest_times_that_may_be_set(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    """poll() counts milliseconds in 32 bits, which is 24.8 days; the agent that slept longer ended in an error."""
    longest = {
        f"DURABLE_{one.name.upper()}": "315360000"
        for one in dataclasses.fields(app.conf)
        if one.metadata["check"] in (config._seconds, config._seconds_or_zero, config._seconds_or_none)
    }
    longest |= {"DURABLE_HEARTBEAT_INTERVAL": "157679999", "DURABLE_SOFT_TIME_LIMIT": "315359999"}
    command = durable_worker("worker", "-c", "1", "-B", **longest)
    children = command.started(count=3)
    for n in range(5):
        assert tasks["add"].apply_async(args=(n,), countdown=0.05).get(timeout=20) == n + 1
    assert command.children() == children
    assert "CRITICAL" not in command.output()
    assert "a new one is forked" not in command.output()
