"""Every event, where it happens in the parts of a real worker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from durable import Await, Context, Done, Durable, Machine, Next, Retry, ScheduleChildren, Stop, step, telemetry
from durable.config import Config
from durable.runtime.agent import Agent, Death
from durable.runtime.beat import Beat
from durable.runtime.gc import collect
from durable.runtime.reaper import reap
from durable.runtime.shared import SharedSeats
from durable.storage import maintenance
from tests.fix_db import wait_until
from tests.machines.driver import Driver, Drivers
from tests.telemetry.conftest import Heard

SPEC = {
    "step.stop": (("duration",), ("id", "fsm", "step", "kind")),
    "pick.stop": (("count", "demand"), ("queue", "worker")),
    "scheduler.saturation": (("in_flight", "buffer", "concurrency", "prefetch", "flush_lag"), ("queue",)),
    "scheduler.drain": (("released", "in_flight"), ("queue",)),
    "scheduler.reclaimed": (("count",), ("queue",)),
    "concurrency.contended": (("count",), ("id", "fsm", "concurrency_key")),
    "concurrency.throttled": (("wanted", "admitted"), ("key", "queue")),
    "outcome.stale": (("count",), ("id", "fsm", "step", "kind")),
    "reaper.reaped": (("count",), ("ids",)),
    "signal.unread": (("count",), ("id", "fsm", "step", "rerun")),
    "await.timeout": (("count",), ()),
    "gc.swept": (("count", "buckets", "gates"), ()),
    "rate_limit.throttled": (("wanted", "granted"), ("key", "queue")),
    "rate_limit.contended": (("count",), ("queue",)),
    "rate_limit.unknown": (("count",), ("key", "name", "fsm", "step")),
}
"""The table of the specification, in its order."""


def test_the_events_are_those_of_the_specification() -> None:
    assert [(name, event[:2]) for name, event in telemetry.EVENTS.items()] == list(SPEC.items())


def define(app: Durable) -> Any:
    """A machine that takes every kind of outcome on its way; its child is a task."""

    @app.task(name="child")
    def child() -> None:
        time.sleep(0.02)

    @app.machine(name="Tour")
    class Tour(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Retry() if not ctx.attempt else Next(self.park)

        @step
        def park(self, ctx: Context) -> Any:
            return Await("go", then=self.fork, timeout=0.01)

        @step
        def fork(self, ctx: Context) -> Any:
            return ScheduleChildren([child], then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Stop("enough") if ctx.children[0].status != "done" else Done()

    return Tour


def test_each_step_tells_its_duration_and_what_came_of_it(app: Durable, driver: Driver, heard: Heard) -> None:
    tour = define(app).delay()
    driver.drain()
    wait_until(driver.time_out)
    driver.drain()

    steps = [(about["fsm"], about["step"], about["kind"]) for _, about in heard.of("step.stop")]
    assert steps == [
        ("Tour", "start", "retry"),
        ("Tour", "start", "next"),
        ("Tour", "park", "await"),
        ("Tour", "fork", "schedule_childs"),
        ("child", "run", "done"),
        ("Tour", "end", "done"),
    ]
    (duration,) = (measured["duration"] for measured, about in heard.of("step.stop") if about["fsm"] == "child")
    assert 0.02 <= duration < 2
    assert {about["id"] for _, about in heard.of("step.stop") if about["fsm"] == "Tour"} == {tour.id}


def test_a_step_that_fails_for_good_is_a_stop(app: Durable, driver: Driver, heard: Heard) -> None:
    @app.task(name="fails", max_attempts=1)
    def fails() -> None:
        raise ValueError

    fails.delay()
    driver.drain()
    assert [about["kind"] for _, about in heard.of("step.stop")] == ["stop"]


def test_a_claim_tells_what_it_wanted_and_what_it_got(app: Durable, driver: Driver, heard: Heard) -> None:
    @app.task(name="work")
    def work() -> None: ...

    app.insert_many([(work, {})] * 3)
    driver.claims(10)
    driver.claims(10)
    about = {"queue": "default", "worker": driver.worker}
    assert heard.of("pick.stop") == [
        ({"count": 3, "demand": 10}, about),
        ({"count": 0, "demand": 10}, about),
        ({"count": 0, "demand": 1}, about),  # a row with a crash behind it
    ]


def test_an_outcome_that_comes_too_late_is_stale(
    app: Durable, drivers: Drivers, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task(name="work")
    def work() -> None: ...

    instance = work.delay()
    late = drivers()
    commit = late.execute(late.claim())
    late.die()
    assert not late.flush(commit)
    about = {"id": instance.id, "fsm": "work", "step": "run", "kind": "done"}
    assert heard.of("outcome.stale") == [({"count": 1}, about)]

    late.engine.outbox.hand_over(commit)
    late.engine._start_over()
    assert heard.of("outcome.stale") == [({"count": 1}, about)] * 2


def test_a_worker_tells_how_full_it_is_at_most_once_a_second_and_when_it_comes_to_rest(
    app: Durable, driver: Driver, heard: Heard
) -> None:
    @app.task(name="work")
    def work() -> None: ...

    saturation = driver.engine._saturation
    app.insert_many([(work, {})] * 2)
    driver.engine.buffer.put(driver.claims(2))
    driver.engine.slot.running = True
    saturation.report()
    saturation.report()
    ((measured, about),) = heard.of("scheduler.saturation")
    assert about == {"queue": "default"}
    assert measured == {"in_flight": 1, "buffer": 2, "concurrency": 1, "prefetch": 1, "flush_lag": 0.0}

    driver.engine.slot.running = False
    driver.engine.buffer.take_back()
    assert saturation.due > time.monotonic()
    wait_until(lambda: saturation.due <= time.monotonic())
    saturation.report()
    saturation.report()
    assert [measured["in_flight"] for measured, _ in heard.of("scheduler.saturation")] == [1, 0]
    assert saturation.due == float("inf"), "nothing wakes a worker that is at rest"


def test_a_worker_to_whom_nobody_listens_is_not_woken_for_it(driver: Driver) -> None:
    driver.engine.slot.running = True
    assert driver.engine._saturation.due == float("inf")


def test_a_worker_that_drains_tells_what_it_gave_back(app: Durable, driver: Driver, heard: Heard) -> None:
    @app.task(name="work")
    def work() -> None: ...

    app.insert_many([(work, {})] * 3)
    driver.engine.buffer.put(driver.claims(3))
    driver.stop_at = time.monotonic() + 5
    driver.engine.slot.ended = True
    driver.engine._drain()
    assert heard.of("scheduler.drain") == [({"released": 3, "in_flight": 0}, {"queue": "default"})]


def test_claims_of_which_nobody_knew_are_reclaimed(app: Durable, driver: Driver, heard: Heard) -> None:
    @app.task(name="work")
    def work() -> None: ...

    app.insert_many([(work, {})] * 2)
    driver.claims(2)
    driver.engine._held.clear()
    driver.engine._reconcile.failed()
    driver.engine._reconcile_if_due()
    assert heard.of("scheduler.reclaimed") == [({"count": 2}, {"queue": "default"})]


def test_an_agent_reclaims_what_its_dead_children_held_and_ends_what_is_overdue(
    app: Durable, drivers: Drivers, heard: Heard
) -> None:
    tour = define(app)
    parked = tour.delay()
    drivers().drain()
    app.insert("child")
    app.insert("child", queue="other")
    dead, other = drivers(), drivers("other")
    dead.claims()
    other.claims()
    wait_until(lambda: app.run(maintenance.next_due()) < 0)

    agent = Agent(app, "test", ["default"], SharedSeats(1), [], 0)
    agent._deaths = [Death(dead.worker, [], "killed"), Death(other.worker, [], "killed")]
    agent._hand_back()
    agent._probe()
    agent._link.drop()
    assert heard.of("scheduler.reclaimed") == [
        ({"count": 1}, {"queue": "default"}),
        ({"count": 1}, {"queue": "other"}),
    ]
    assert heard.of("await.timeout") == [({"count": 1}, {})]
    assert parked.status == "runnable"


def test_a_beat_ends_parks_that_are_overdue(app: Durable, driver: Driver, heard: Heard) -> None:
    define(app).delay()
    driver.drain()
    wait_until(lambda: app.run(maintenance.next_due()) < 0)
    beat = Beat(app, "test")
    beat._promote()
    beat._link.drop()
    assert heard.of("await.timeout") == [({"count": 1}, {})]


def test_the_reaper_tells_which_rows_it_took_back(app: Durable, driver: Driver, heard: Heard, connection: Any) -> None:
    @app.task(name="work")
    def work() -> None: ...

    ids = sorted(result.id for result in app.insert_many([(work, {})] * 2))
    driver.claims()
    connection.execute(f"UPDATE {app.schema}.workers SET dead_at = now()")
    link = driver.engine._link
    assert link.connected_since is not None
    reap(link, Config(reaper_grace=0), app.wakeups, link.connected_since)
    reap(link, Config(reaper_grace=0), app.wakeups, link.connected_since)
    ((measured, about),) = heard.of("reaper.reaped")
    assert measured == {"count": 2}
    assert sorted(about["ids"]) == ids


def test_a_collection_tells_what_it_removed(app: Durable, driver: Driver, heard: Heard, connection: Any) -> None:
    @app.task(name="work")
    def work() -> None: ...

    app.insert(work, correlation_key="k", correlation_scope=("done",))
    driver.drain()
    connection.execute(f"UPDATE {app.schema}.instances SET finished_at = now() - interval '2 days'")
    collect(driver.engine._link, app.conf)
    assert heard.of("gc.swept") == [({"count": 1, "buckets": 0, "gates": 0}, {})]


def test_handlers_attached_by_the_import_of_the_app_are_in_every_process(
    tasks_module: Any, durable_worker: Any, tmp_path: Path
) -> None:
    tasks_module("""
        import os, pathlib
        from durable import telemetry
        log = pathlib.Path(__file__).with_name("events.txt")

        def write(event, measurements, metadata):
            with log.open("a") as file:
                print(os.getpid(), event, dict(measurements), dict(metadata), file=file)

        def failing(event, measurements, metadata):
            raise RuntimeError("no")

        telemetry.attach("step.stop", failing)
        for event in telemetry.EVENTS:
            telemetry.attach(event, write)
        telemetry.on_process_start(lambda role: write("start", {}, {"role": role}))
        telemetry.on_process_stop(lambda role: write("stop", {}, {"role": role}))

        @app.task
        def work():
            pass

        if __name__ != "__main__":
            app.migrate()
            app.close()
    """)
    log = tmp_path / "events.txt"

    def events(text: str) -> list[str]:
        return [line for line in log.read_text().splitlines() if text in line] if log.exists() else []

    worker = durable_worker("worker", "-c", "2", "-B")
    wait_until(lambda: len(events("start")) == 4)
    called = durable_worker("call", "tasks.work", wait=False)
    called.process.wait(20)
    wait_until(lambda: events("step.stop"))
    wait_until(lambda: events("gc.swept"))
    worker.stop()
    assert [len(events(f"stop {{}} {{'role': '{role}'}}")) for role in telemetry.ROLES] == [2, 1, 1]
    assert len(events("scheduler.drain")) == 2
    assert "a handler of step.stop failed; it is detached" in worker.output()
