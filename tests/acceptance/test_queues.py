"""Queues that are steered while workers serve them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.storage import control
from tests.fix_app import Command
from tests.fix_db import wait_until

TASKS = """
    import os, time
    from pathlib import Path
    from durable import Machine, Next, Done, step

    @app.task(name="mark")
    def mark(path, text):
        with open(path, "a") as file: file.write(f"{text}\\n")

    @app.task(name="wait_for")
    def wait_for(path, go):
        with open(path, "a") as file: file.write(f"{os.getpid()}\\n")
        while not Path(go).exists(): time.sleep(0.01)
        return os.getpid()

    @app.machine(name="hops")
    class Hops(Machine):
        @step(initial=True)
        def hop(self, ctx):
            time.sleep(0.002)
            with open(ctx.state["path"], "a") as file: file.write("hop\\n")
            return Next(self.hop, inline=True) if not Path(ctx.state["go"]).exists() else Done()
"""


@pytest.fixture
def tasks(app: Durable, tasks_module: Callable[[str], Path]) -> dict[str, Any]:
    """The tasks and machines by name; tasks.py is written for the workers."""
    folder = tasks_module(TASKS)
    namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
    body = (folder / "tasks.py").read_text().split("\n", 2)[2]
    exec(compile(body, "tasks.py", "exec", dont_inherit=True), namespace)  # registered with this test's app too
    return namespace


@pytest.fixture
def statuses(connection: psycopg.Connection[Any], schema: str) -> Callable[[], dict[str, int]]:
    """How many live instances there are of each status."""

    def count() -> dict[str, int]:
        return dict(
            connection.execute(f"SELECT status::text, count(*) FROM {schema}.instances GROUP BY status").fetchall()
        )

    return count


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


SLOW_CLOCKS = {"DURABLE_POLL_INTERVAL": "30", "DURABLE_HEARTBEAT_INTERVAL": "30", "DURABLE_LEASE_TTL": "90"}
"""What happens within the test happens by notification."""


def test_what_runs_in_a_paused_queue_ends_nothing_else_begins_and_a_resume_wakes_idle_workers(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], statuses: Any, tmp_path: Path
) -> None:
    began, go, done = (tmp_path / name for name in ("began", "go", "done"))
    durable_worker("worker", "-c", "1", **SLOW_CLOCKS)
    running = tasks["wait_for"].delay(str(began), str(go))
    wait_until(lambda: lines(began), what="the step")
    assert app.pause("default", "a test")
    waiting = [tasks["mark"].delay(str(done), str(n)) for n in range(20)]
    go.touch()
    assert running.get(timeout=20) > 0
    wait_until(lambda: statuses() == {"runnable": 20}, what="the others to wait")
    time.sleep(0.3)  # what must not happen gets some time
    assert (lines(done), statuses()) == ([], {"runnable": 20})

    assert app.resume("default")
    for result in waiting:
        result.get(timeout=20)
    assert sorted(map(int, lines(done))) == list(range(20))


def test_a_pause_stops_a_stream_and_a_chain_of_inline_hops_and_loses_nothing(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], statuses: Any, tmp_path: Path
) -> None:
    """A chain that goes on inline claims nothing for its next hop, nor do rows in a buffer for their step."""
    hops, go, done = (tmp_path / name for name in ("hops", "go", "done"))
    durable_worker("worker", "-c", "2", **SLOW_CLOCKS)
    chain = app.insert("hops", state={"path": str(hops), "go": str(go)})
    wait_until(lambda: len(lines(hops)) > 5, what="some hops")
    results = app.insert_many(("mark", {"args": (str(done), str(n))}) for n in range(20_000))
    wait_until(lambda: lines(done), what="the first of the stream")
    app.pause("default")
    wait_until(lambda: "executing" not in statuses(), what="everything to be given back")
    before = (len(lines(hops)), len(lines(done)))
    time.sleep(0.3)  # what must not happen gets some time
    assert (len(lines(hops)), len(lines(done))) == before
    assert before[1] < 20_000, "it was paused in the middle"

    go.touch()
    app.resume("default")
    chain.get(timeout=30)
    results[-1].get(timeout=60)
    wait_until(lambda: not statuses(), 60, "the rest")
    assert sorted(map(int, lines(done))) == list(range(20_000))


def test_a_command_ends_in_order_while_its_queue_is_paused_and_one_that_starts_then_claims_nothing(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], statuses: Any, tmp_path: Path
) -> None:
    began, go, done = (tmp_path / name for name in ("began", "go", "done"))
    first = durable_worker("worker", "-c", "1", **SLOW_CLOCKS, DURABLE_DRAIN_TIMEOUT="0.2")
    running = tasks["wait_for"].delay(str(began), str(go))
    wait_until(lambda: lines(began), what="the step")
    app.pause("default")
    assert first.stop() == 0
    assert statuses() == {"runnable": 1}
    second = durable_worker("worker", "-c", "1", **SLOW_CLOCKS)
    tasks["mark"].delay(str(done), "x")
    wait_until(lambda: "is paused" in second.output(), what="the order")
    assert statuses() == {"runnable": 2}
    go.touch()
    app.resume("default")
    running.get(timeout=20)
    wait_until(lambda: lines(done) == ["x"], what="the rest")


def test_idle_children_of_a_paused_queue_are_not_woken_for_what_waits_there(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], schema: str, tmp_path: Path
) -> None:
    """A child that is woken asks the database: its statement's time says that it was."""
    worker = durable_worker("worker", "-c", "2", DURABLE_POLL_INTERVAL="0.05")
    app.pause("default")
    wait_until(lambda: "is paused" in worker.output(), what="the order")
    done = tmp_path / "done"
    tasks["mark"].delay(str(done), "x")
    with psycopg.connect(app.dsn(), autocommit=True) as connection:

        def last() -> list[Any]:
            return connection.execute(
                "SELECT pid, query_start FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name LIKE 'durable test worker default%' AND state = 'idle'"
                " ORDER BY pid"
            ).fetchall()

        wait_until(lambda: len(last()) == 2, what="both children connected")
        time.sleep(0.3)  # whatever they were at ends
        before = last()
        time.sleep(1.0)  # twenty probes
        assert last() == before
    app.resume("default")
    wait_until(lambda: lines(done) == ["x"], what="the task")


def set_concurrency(app: Durable, count: int | None, queue: str = "default") -> None:
    """As `durable queues set` does."""
    app.run(control.set_concurrency(queue, count))
    for wakeup in app.wakeups.orders():
        app.run(wakeup)


def test_a_queues_processes_become_more_and_fewer_while_it_runs_and_no_step_is_cut_off(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], statuses: Any, tmp_path: Path
) -> None:
    began, go = tmp_path / "began", tmp_path / "go"
    worker = durable_worker("worker", "-c", "1", "-Q", "default,other", **SLOW_CLOCKS, DURABLE_DRAIN_TIMEOUT="0.1")
    set_concurrency(app, 3)
    results = [tasks["wait_for"].delay(str(began), str(go)) for _ in range(3)]
    wait_until(lambda: len(set(lines(began))) == 3, what="three at once")
    worker.started("durable:default", 3)
    worker.started("durable:other")

    set_concurrency(app, 1)
    wait_until(lambda: "a concurrency of 1 instead of 3" in worker.output(), what="the order")
    time.sleep(0.5)  # longer than a drain may take
    assert len(worker.children("durable:default")) == 3
    go.touch()
    assert {result.get(timeout=20) for result in results} == set(map(int, lines(began)))
    wait_until(lambda: len(worker.children("durable:default")) == 1, what="two to end")
    set_concurrency(app, None)
    assert tasks["wait_for"].delay(str(began), str(go)).get(timeout=20)
    assert worker.stop() == 0


def test_a_number_that_is_set_holds_for_commands_that_start_later_beyond_their_spare_places_too(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command]
) -> None:
    set_concurrency(app, 20)
    worker = durable_worker("worker", "-c", "1")
    wait_until(lambda: len(worker.children("durable:default")) == 20, what="twenty processes")
    set_concurrency(app, None)
    wait_until(lambda: len(worker.children("durable:default")) == 1, what="one again")
    assert worker.stop() == 0


def test_autoscale_adds_processes_while_work_waits_and_not_while_it_does_not(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    began, go = tmp_path / "began", tmp_path / "go"
    worker = durable_worker("worker", "--autoscale", "1,3")
    wait_until(lambda: len(worker.children("durable:default")) == 1, what="the fewest")
    results = [tasks["wait_for"].delay(str(began), str(go)) for _ in range(5)]
    wait_until(lambda: len(set(lines(began))) == 3, what="the most at once")
    worker.started("durable:default", 3)
    go.touch()
    for result in results:
        result.get(timeout=20)
    wait_until(lambda: "a concurrency of 2 instead of 3" in worker.output(), 30, what="one fewer when all are idle")


def test_a_child_that_dies_at_once_is_not_replaced_faster_for_spare_places(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command]
) -> None:
    tasks_module("""
        import os, threading, time
        from durable.runtime import child
        child.soft_limit.install = lambda: os._exit(9)
    """)
    worker = durable_worker("worker", "-c", "1", wait=False)
    wait_until(lambda: worker.output().count("exited with code 9") >= 3, what="three deaths")
    counted = worker.output().count("exited with code 9")
    time.sleep(1.0)  # the pauses grow: 0.2, 0.4, 0.8 s
    assert worker.output().count("exited with code 9") <= counted + 3


def ask(app: Durable, what: str) -> list[tuple[str, int]]:
    """As `durable workers stop` and `reload` do."""
    asked = app.run(control.ask("me", what))
    for wakeup in app.wakeups.orders():
        app.run(wakeup)
    return asked


def test_a_command_that_is_asked_reloads_once_and_then_stops(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    worker = durable_worker("worker", "-c", "1", "-n", "me", **SLOW_CLOCKS)
    done = tmp_path / "done"
    tasks["mark"].delay(str(done), "before").get(timeout=20)
    first = worker.started("durable:default")
    assert ask(app, "reload") == [(os.uname().nodename, worker.pid)]
    wait_until(lambda: "starts afresh" in worker.output(), what="the reload")
    tasks["mark"].delay(str(done), "after").get(timeout=20)
    assert worker.started("durable:default") != first
    assert ask(app, "stop") == [(os.uname().nodename, worker.pid)]
    assert worker.process.wait(20) == 0
    assert worker.output().count("starts afresh") == 1
    assert lines(done) == ["before", "after"]


def test_asking_twice_to_stop_cuts_no_step_off(
    app: Durable, tasks: dict[str, Any], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    began, go = tmp_path / "began", tmp_path / "go"
    worker = durable_worker("worker", "-c", "1", "-n", "me", **SLOW_CLOCKS)
    result = tasks["wait_for"].delay(str(began), str(go))
    wait_until(lambda: lines(began), what="the step")
    ask(app, "reload")
    wait_until(lambda: "asked to reload" in worker.output(), what="the first")
    ask(app, "stop")
    wait_until(lambda: "asked to stop" in worker.output(), what="the second")
    go.touch()
    assert worker.process.wait(20) == 0
    assert (result.status, len(lines(began))) == ("done", 1)
    assert "starts afresh" not in worker.output()
