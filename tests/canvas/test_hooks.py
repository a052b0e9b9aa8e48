"""Methods of base classes and Celery's signals: when they are called, with what, and what their errors do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from durable import Durable, Retry, Stop, Task, celery_signals
from durable.celery_signals import Hook
from durable.errors import DefinitionError
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.machines.driver import Driver, View

TASK_HOOKS = ["task_prerun", "task_postrun", "task_success", "task_failure", "task_retry"]


class Noting(Task[..., Any]):
    """Notes what it is told."""

    seen: list[tuple[Any, ...]]

    def before_start(self, *values: Any) -> None:
        self.seen.append(("before_start", *values))

    def on_success(self, *values: Any) -> None:
        self.seen.append(("on_success", *values))

    def on_failure(self, *values: Any) -> None:
        self.seen.append(("on_failure", *values))

    def on_retry(self, *values: Any) -> None:
        self.seen.append(("on_retry", *values))

    def after_return(self, *values: Any) -> None:
        self.seen.append(("after_return", *values))


@pytest.fixture
def seen() -> list[tuple[Any, ...]]:
    Noting.seen = []
    return Noting.seen


def test_a_base_class_is_told_of_success(app: Durable, driver: Driver, seen: list[Any]) -> None:
    @app.task(name="add", base=Noting)
    def add(x: int, y: int) -> int:
        return x + y

    result = add.delay(1, y=2)
    driver.drain()
    assert result.get(timeout=1) == 3
    assert seen == [
        ("before_start", result.id, [1], {"y": 2}),
        ("on_success", 3, result.id, [1], {"y": 2}),
        ("after_return", "SUCCESS", 3, result.id, [1], {"y": 2}, None),
    ]


def test_a_base_class_is_told_of_each_retry_and_the_failure(app: Durable, driver: Driver, seen: list[Any]) -> None:
    @app.task(name="fail", base=Noting, max_retries=1, default_retry_delay=0)
    async def fail() -> None:
        raise ValueError("no")

    result = fail.delay()
    driver.drain()
    assert result.failed()
    assert [entry[0] for entry in seen] == [
        "before_start",
        "on_retry",
        "after_return",
        "before_start",
        "on_failure",
        "after_return",
    ]
    _, error, task_id, args, kwargs, info = seen[4]
    assert (repr(error), task_id, args, kwargs) == ("ValueError('no')", result.id, [], {})
    assert "raise ValueError" in str(info)
    assert info.exception is error
    assert seen[5][1:3] == ("FAILURE", error)


@pytest.mark.parametrize(("returned", "state"), [(Retry(delay=100), "RETRY"), (Stop("enough"), "FAILURE")])
def test_a_returned_outcome_counts_too(
    app: Durable, driver: Driver, seen: list[Any], returned: Any, state: str
) -> None:
    app.task(name="returns", base=Noting)(lambda: returned).delay()
    driver.drain()
    assert seen[-1][:2] == ("after_return", state)


def test_errors_in_them_are_logged_and_change_nothing(
    app: Durable, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Noting):
        def before_start(self, *values: Any) -> None:
            raise RuntimeError("first")

        def on_success(self, *values: Any) -> None:
            raise RuntimeError("second")

    Noting.seen = []
    result = app.task(name="works", base=Broken)(lambda: 7).delay()
    with caplog.at_level(logging.ERROR):
        driver.drain()
    assert result.get(timeout=1) == 7
    assert [record.getMessage() for record in caplog.records] == [
        "before_start of works failed",
        "on_success of works failed",
    ]


def test_a_task_without_listeners_has_no_hooks(app: Durable) -> None:
    @app.task(name="bare")
    def bare() -> None: ...

    assert not bare.has_hooks
    assert not celery_signals.connected_task_hooks


@pytest.fixture
def heard() -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Listen to a signal; disconnected at the end."""
    connected: list[tuple[Hook, Any, Any]] = []

    def listen(name: str, **options: Any) -> list[dict[str, Any]]:
        hook: Hook = getattr(celery_signals, name)
        values: list[dict[str, Any]] = []

        @hook.connect(**options)
        def receive(**given: Any) -> None:
            values.append(given)

        connected.append((hook, receive, options.get("sender")))
        return values

    yield listen
    for hook, receive, sender in connected:
        assert hook.disconnect(receive, sender=sender)
    assert not celery_signals.connected_task_hooks


def test_the_signals_of_a_run_carry_what_celery_s_do(
    app: Durable, driver: Driver, heard: Callable[..., list[dict[str, Any]]]
) -> None:
    tries: list[int] = []

    @app.task(name="second", bind=True, default_retry_delay=0)
    def second(self: Any, x: int) -> int:
        tries.append(self.request.retries)
        if not self.request.retries:
            self.retry(exc=OSError("again"))
        return x

    values = {name: heard(name) for name in TASK_HOOKS}
    result = second.delay(5)
    driver.drain()
    assert tries == [0, 1]
    task = app.tasks["second", 1]
    first, last = values["task_postrun"]
    assert (last["sender"], last["task"], last["task_id"]) == (task, task, result.id)
    assert (last["args"], last["kwargs"], last["retval"], last["state"]) == ([5], {}, 5, "SUCCESS")
    assert (repr(first["retval"]), first["state"]) == ("OSError('again')", "RETRY")
    assert [entry["task_id"] for entry in values["task_prerun"]] == [result.id, result.id]
    (retry,) = values["task_retry"]
    assert (retry["request"].id, retry["request"].retries, repr(retry["reason"])) == (result.id, 0, "OSError('again')")
    (success,) = values["task_success"]
    assert (success["result"], success["sender"].name) == (5, "second")
    assert not values["task_failure"]


def test_a_failure_is_signalled_once_with_its_traceback(
    app: Durable, driver: Driver, heard: Callable[..., list[dict[str, Any]]]
) -> None:
    @app.task(name="fail", max_retries=0)
    def fail(x: int) -> None:
        raise ValueError("no")

    values = heard("task_failure", sender="fail")
    others = heard("task_failure", sender="somebody else")
    fail.delay(x=1)
    driver.drain()
    (value,) = values
    assert (repr(value["exception"]), value["kwargs"]) == ("ValueError('no')", {"x": 1})
    assert value["traceback"] is not None
    assert "raise ValueError" in value["einfo"].traceback
    assert not others


def test_a_failing_receiver_is_logged_and_the_others_are_called(
    app: Durable, driver: Driver, heard: Callable[..., list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("receiver")

    celery_signals.task_prerun.connect(broken)
    values = heard("task_prerun")
    result = app.task(name="works")(lambda: 1).delay()
    driver.drain()
    celery_signals.task_prerun.disconnect(broken)
    assert result.get(timeout=1) == 1
    assert len(values) == 1
    assert "a receiver of task_prerun failed" in caplog.text


def test_publishing_is_signalled_before_and_after(
    app: Durable, heard: Callable[..., list[dict[str, Any]]], view: View
) -> None:
    task = app.task(name="task", queue="q")(lambda *args, **kwargs: None)
    before, after = heard("before_task_publish", sender="task"), heard("after_task_publish", sender=task)
    result = task.delay(1, x=2)
    app.insert_many([(task, {}), (task, {})])
    assert before[0]["body"] == ([1], {"x": 2}, {})
    assert (before[0]["routing_key"], before[0]["headers"]) == ("q", {"task": "task", "id": None})
    assert [entry["headers"]["id"] for entry in after] == [result.id, result.id + 1, result.id + 2]


def test_connecting_twice_under_one_uid_replaces_and_no_function_is_refused() -> None:
    hook, calls = Hook("some"), []
    hook.connect(lambda **_: calls.append(1), dispatch_uid="x")
    hook.connect(lambda **_: calls.append(2), dispatch_uid="x", weak=False)
    hook.send(None)
    assert calls == [2]
    assert hook.disconnect(dispatch_uid="x")
    assert not hook.disconnect(dispatch_uid="x")
    with pytest.raises(DefinitionError, match="takes a function"):
        hook.connect(3)


def test_processes_announce_themselves(
    tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], app: Durable
) -> None:
    folder = tasks_module(
        """
        import os
        from durable import celery_signals

        def note(name):
            def receive(sender, **rest):
                with open("notes", "a") as notes:
                    notes.write(f"{name} {os.getpid()}\\n")
            return receive

        for name in ("worker_init", "worker_ready", "worker_shutdown", "worker_process_init",
                     "worker_process_shutdown", "beat_init"):
            getattr(celery_signals, name).connect(note(name))
        """
    )

    def notes() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        path = folder / "notes"
        for line in path.read_text().splitlines() if path.exists() else []:
            name, pid = line.split()
            found.setdefault(name, []).append(int(pid))
        return found

    command = durable_worker("worker", "-c", "2", "-B")
    wait_until(lambda: len(notes().get("worker_process_init", [])) == 2 and "beat_init" in notes(), what="the notes")
    children = set(command.started("durable:default", 2))
    assert command.stop() == 0
    found = notes()
    assert set(found["worker_process_init"]) == children == set(found["worker_process_shutdown"])
    assert found["worker_init"] == found["worker_ready"] == found["worker_shutdown"] == [command.pid]
