"""Polls an hour apart: each wake-up reaches an idle worker by notification alone; a lost one costs at most a poll."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.instance import NewInstance
from durable.storage import instances
from durable.storage.session import run
from durable.wakeups import INTERVAL, queue_channel
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.fix_rows import Session
from tests.interleaving import Held, delivering

HOURLY = {
    "DURABLE_POLL_INTERVAL": "3600",
    "DURABLE_RECONCILE_INTERVAL": "3600",
    "DURABLE_HEARTBEAT_INTERVAL": "5",
    "DURABLE_LEASE_TTL": "30",
}
TASKS = """
    from durable import Await, Done, Machine, ScheduleChildren, step

    @app.task(name="noop")
    def noop(n=0): return n

    @app.machine(name="waiter")
    class Waiter(Machine):
        @step(initial=True)
        def start(self, ctx): return Await("go", then=self.woken)
        @step
        def woken(self, ctx): return Done(ctx.awaited[0].payload)

    @app.machine(name="parent")
    class Parent(Machine):
        @step(initial=True)
        def start(self, ctx):
            return ScheduleChildren([(noop, {"args": (n,), "queue": "kids"}) for n in (1, 2, 3)], then=self.join)
        @step
        def join(self, ctx): return Done(sum(child.result for child in ctx.children))
"""


class Fleet:
    """Commands of one process per queue, each known to be idle, and the tasks as a producer sees them."""

    def __init__(
        self, app: Durable, folder: Path, durable_worker: Callable[..., Command], connection: psycopg.Connection[Any]
    ) -> None:
        self.app, self.connection = app, connection
        self._start = durable_worker
        namespace: dict[str, Any] = {"app": app, "__name__": "tasks"}
        body = (folder / "tasks.py").read_text().split("\n", 2)[2]
        exec(compile(body, "tasks.py", "exec", dont_inherit=True), namespace)
        self.noop: Any = namespace["noop"]
        self.machines: dict[str, Any] = {machine.name: machine.cls for machine in app.machines.values()}
        self.commands: dict[str, Command] = {}

    def start(self, *queues: str, **environment: str) -> None:
        """Start a command for each queue, let it run one task and fall idle."""
        for queue in queues:
            self.commands[queue] = self._start("worker", "-Q", f"{queue}:1", **{**HOURLY, **environment})
        for result in [self.noop.apply_async(queue=queue) for queue in queues]:
            result.get(timeout=30)
        busy = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND (application_name LIKE 'durable test worker%' OR application_name LIKE 'durable test agent%')"
            " AND (state <> 'idle' OR clock_timestamp() - state_change < interval '0.3 s')"
        )
        # Looks that follow a notification are over by then; heartbeats come every five seconds.
        wait_until(lambda: self.connection.execute(busy).fetchone() == (0,), what="idle commands")

    def insert_silently(self, queue: str) -> int:
        """A row that nobody is told of."""
        new = NewInstance("noop", self.app.codec.encode({}), queue=queue)
        return run(self.connection, self.app.sql, instances.insert(new), foreign=True)

    def status(self, instance: int) -> str:
        return self.app.result(instance).status

    def listener(self, queue: str) -> int:
        """The server process of the LISTEN connection of a command."""
        name = f"durable {self.app.name} agent {self.commands[queue].pid} listen"
        rows = self.connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s", [name]
        )
        ((pid,),) = rows.fetchall()
        return int(pid)


@pytest.fixture
def fleet(
    app: Durable,
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
) -> Fleet:
    return Fleet(app, tasks_module(TASKS), durable_worker, connection)


def test_inserts_signals_children_and_joins_reach_idle_workers_by_notification_alone(fleet: Fleet) -> None:
    """A row that nobody was told of stays where it is all the while: no poll had a part in it."""
    fleet.start("default", "kids", "silent")
    untold = fleet.insert_silently("silent")

    assert fleet.noop.delay(7).get(timeout=20) == 7
    waiter = fleet.machines["waiter"].delay()
    wait_until(lambda: waiter.status == "awaiting_signal", what="the park")
    waiter.signal("go", "payload")
    assert waiter.get(timeout=20) == "payload"
    assert fleet.machines["parent"].delay().get(timeout=20) == 6

    assert fleet.status(untold) == "runnable"
    # A look that begins when somebody listens again finds it.
    fleet.connection.execute("SELECT pg_terminate_backend(%s)", [fleet.listener("silent")])
    wait_until(lambda: fleet.status(untold) == "done", what="the row found by the renewed listener")


@pytest.mark.parametrize("way", ["ours", "the caller's connection"])
def test_a_target_that_a_claimer_passed_by_is_run_when_the_delivery_commits(
    fleet: Fleet, database: str, way: str
) -> None:
    """The worker looked while a signal's transaction held the row, found nothing and fell idle: the commit wakes it."""
    fleet.start("default")
    app, connection = fleet.app, fleet.connection
    instance = fleet.insert_silently("default")
    session = Session(database, app.schema)
    with closing(session.connection), psycopg.connect(database) as callers:
        if way == "ours":
            held = Held(session, delivering(instance)).until(None)
        else:
            app.signal(instance, "go", connection=callers)
        told = fleet.noop.delay()  # has the worker look; the target is in front of it
        assert told.get(timeout=20) == 0
        looks = f"SELECT token FROM {app.schema}.instances WHERE id = %s"
        assert connection.execute(looks, [instance]).fetchone() == (0,), "passed by"
        if way == "ours":
            # What Durable.signal does after its commit, for a delivery that answers so.
            ready = held.commit().ready
            assert ready == {"default": 1}
            for operation in app.wakeups.became_ready(ready):
                run(connection, app.sql, operation, foreign=True)
        else:
            callers.commit()
        wait_until(lambda: fleet.status(instance) == "done", what="the target")


def test_a_burst_of_inserts_gives_a_few_notifications_and_every_row_is_run(fleet: Fleet, database: str) -> None:
    fleet.start("default")
    with psycopg.connect(database, autocommit=True) as listener:
        listener.execute(f'LISTEN "{queue_channel(fleet.app.schema)}"')
        began = time.monotonic()
        # Ten at once: more rows a second than are worth a notification each, however slow the machine is.
        results = [
            result
            for first in range(0, 1000, 10)
            for result in fleet.app.insert_many([(fleet.noop, {"args": (n,)}) for n in range(first, first + 10)])
        ]
        took = time.monotonic() - began
        told = [n.payload for n in listener.notifies(timeout=0.2) if n.payload.startswith("default:")]
    assert 1 <= len(told) <= took / INTERVAL + 2
    assert [result.get(timeout=20) for result in results] == list(range(1000))


def test_a_lost_notification_costs_at_most_one_poll(fleet: Fleet) -> None:
    fleet.start("default", DURABLE_POLL_INTERVAL="1")
    for _ in range(3):
        untold = fleet.insert_silently("default")
        wait_until(lambda untold=untold: fleet.status(untold) == "done", 10, "the poll")


def test_an_agent_that_dies_takes_no_wake_up_with_it(fleet: Fleet) -> None:
    """Rows that come while nobody listens are found when its successor begins."""
    fleet.start("default")
    (agent,) = fleet.commands["default"].started("durable:agent")
    os.kill(agent, signal.SIGSTOP)
    untold = [fleet.noop.delay(n) for n in range(5)]
    os.kill(agent, signal.SIGKILL)
    assert [result.get(timeout=20) for result in untold] == list(range(5))
