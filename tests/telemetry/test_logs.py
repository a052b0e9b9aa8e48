"""Logs of worker commands: structured on request, never with a payload unless asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pydantic
import pytest

from durable import Context, Done, Durable, Machine, ScheduleChildren, step
from durable_cli.logs import JsonFormatter, LineFormatter
from tests.cli.conftest import Ran, durable, here, process
from tests.fix_db import wait_until
from tests.machines.driver import Driver, View

__all__ = ["durable", "here", "process"]

SECRET = "sesame-4711"
TASKS = """
    from typing import Any
    from durable import Await, Done, Machine, Next, Retry, ScheduleChildren, step

    app.migrate()
    app.close()

    @app.task(bind=True, max_attempts=2, backoff=lambda attempt: 0)
    def fails(ctx, secret):
        ctx.log.info("about to fail")
        raise ValueError("no luck")

    @app.task
    def fine(secret):
        return secret

    @app.machine
    class Tour(Machine):
        @step(initial=True)
        def start(self, ctx):
            return Await("go", then=self.fork, state=ctx.state)

        @step
        def fork(self, ctx):
            payload = ctx.awaited[0].payload
            return ScheduleChildren([(fine, {"args": (payload,)})], then=self.nonsense)

        @step
        def nonsense(self, ctx):
            return ctx.state
"""


def run_all(durable: Callable[..., Ran], view: Callable[[], list[Any]]) -> None:
    """Every place a payload can be in: arguments, state, result, signal, a malformed outcome."""
    durable("call", "tasks.fine", "--args", f'["{SECRET}"]')
    durable("call", "tasks.fails", "--args", f'["{SECRET}"]')
    ran = durable("call", "tasks.Tour", "--kwargs", f'{{"secret": "{SECRET}"}}')
    instance = ran.err.strip().removeprefix("instance ") or ran.out.strip()
    sent = durable("signal", instance, "go", "--payload", f'"{SECRET}"')
    assert sent.code == 0, sent.err
    wait_until(lambda: len(view()) == 4, what="all four are finished")


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_payload_is_in_the_log_at_any_level(
    form: str,
    tasks_module: Callable[[str], Path],
    durable_worker: Any,
    durable: Callable[..., Ran],
    connection: Any,
    schema: str,
) -> None:
    tasks_module(TASKS)
    worker = durable_worker("worker", "-c", "2", "-B", "-l", "debug", "--log-format", form)
    run_all(durable, lambda: connection.execute(f"SELECT id FROM {schema}.history").fetchall())
    worker.stop()
    output = worker.output()
    assert "about to fail" in output
    assert "ValueError: no luck" in output
    assert "returned dict; a step returns one of" in output
    assert SECRET not in output


def test_json_lines_say_which_step_of_which_instance(
    tasks_module: Callable[[str], Path],
    durable_worker: Any,
    durable: Callable[..., Ran],
    connection: Any,
    schema: str,
) -> None:
    tasks_module(TASKS)
    worker = durable_worker("worker", "-c", "1", "--log-format", "json")
    ran = durable("call", "tasks.fails", "--args", '["x"]', "--wait", "20")
    instance = int(ran.err.splitlines()[0].removeprefix("instance "))
    worker.stop()
    lines = [json.loads(line) for line in worker.output().splitlines()]  # every one of them
    first, second = (line for line in lines if line.get("message") == "step failed")
    assert datetime.fromisoformat(first.pop("time")).utcoffset() is not None
    assert isinstance(first.pop("pid"), int)
    assert first == {
        "level": "warning",
        "logger": "durable.step",
        "process": "default",
        "message": "step failed",
        "instance": instance,
        "task": "tasks.fails",
        "step": "run",
        "attempt": 0,
        "queue": "default",
        "error": "ValueError: no luck",
    }
    assert second["attempt"] == 1
    (told,) = (line for line in lines if line.get("message") == "about to fail" and line["attempt"] == 0)
    assert (told["instance"], told["task"], told["step"]) == (instance, "tasks.fails", "run")


def test_payloads_are_logged_when_asked_for(
    app: Durable, driver: Driver, caplog: pytest.LogCaptureFixture, view: View
) -> None:
    @app.task(name="work")
    def work(secret: str) -> None: ...

    caplog.set_level(logging.DEBUG, "durable")
    work.delay(SECRET)
    driver.drain()
    assert SECRET not in caplog.text + str([vars(record) for record in caplog.records])

    app.conf.log_payloads = True
    work.delay(SECRET)
    driver.drain()
    (record,) = (record for record in caplog.records if record.getMessage() == "step starts")
    assert record.levelno == logging.DEBUG
    assert record.arguments == {"args": [SECRET]}  # type: ignore[attr-defined]
    assert SECRET in LineFormatter().format(record)
    assert json.loads(JsonFormatter().format(record))["arguments"] == {"args": [SECRET]}


def record(message: str, **extra: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "x", "levelname": "ERROR", "msg": message, **extra})


def test_a_json_line_is_one_line_of_ascii_json_without_passwords_whatever_is_in_it() -> None:
    line = JsonFormatter().format(
        record("to postgresql://me:sesame@host/db\n\x1b[31m", error="password=sesame\u2028", instances=[1], task={1})
    )
    assert "\n" not in line
    assert line.isascii()
    assert "sesame" not in line
    entry = json.loads(line)
    assert entry["instances"] == [1]
    assert entry["task"] == "{1}"


def test_a_json_line_carries_the_traceback() -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        entry = json.loads(
            JsonFormatter().format(record("it failed", exc_info=(ValueError, error, error.__traceback__)))
        )
    assert entry["traceback"].endswith("ValueError: no")


def test_a_state_that_does_not_fit_is_named_by_its_field_and_not_by_its_value(
    app: Durable, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    class Order(pydantic.BaseModel):
        number: int

    @app.machine(name="Child")
    class Child(Machine):
        State = Order

        @step
        def start(self, ctx: Context[Order]) -> Any:
            return Done()

    @app.machine(name="Parent")
    class Parent(Machine):
        @step
        def start(self, ctx: Context) -> Any:
            return ScheduleChildren([(Child, {"kwargs": {"number": SECRET}})], then=self.start)

    parent = Parent.delay()
    driver.drain()
    assert "unable to parse string as an integer - at `$.number`" in str(parent.error)
    assert "child 0: state of Child" in str([vars(record) for record in caplog.records])
    assert SECRET not in str([vars(record) for record in caplog.records])
