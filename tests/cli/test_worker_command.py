"""`worker` and `beat` as processes: what they check, say and leave behind, and results of real tasks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable_cli.run import connections_warning
from tests.cli.conftest import NO_SERVER, Ran
from tests.fix_db import wait_until

HOSTILE = "\\u001b[31mred\\u001b]0;title\\u0007"


def sockets(pid: int) -> list[str]:
    """The sockets a process has open."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return [link for link in links if link.startswith("socket:")]


def test_a_story_of_a_worker(durable_worker: Callable[..., Any], durable: Callable[..., Ran], shop: Path) -> None:
    worker = durable_worker("worker", "-Q", "default:2,checkout", "-c", "1", "-B", "-n", "w@here", "-l", "debug")
    wait_until(lambda: len(durable("workers", "--json").json) == 4, what="three worker processes and a beat")

    # The supervisor has no thread and no socket, whatever it looked at before it forked.
    assert len(list(Path(f"/proc/{worker.pid}/task").iterdir())) == 1
    assert sockets(worker.pid) == []

    ran = durable("call", "tasks.add", "--args", "[1, 2]", "--wait", "20")
    assert (ran.code, ran.out) == (0, "3\n")
    added = int(ran.err.removeprefix("instance "))
    assert durable("result", str(added)).out == "3\n"
    assert durable("result", str(added), "--no-wait", "--json").json == {
        "id": added,
        "status": "done",
        "result": 3,
        "error": None,
    }

    ran = durable("call", "tasks.say", "--args", f'[{{"x": ["é", "{HOSTILE}"]}}]', "--wait", "--json")
    assert ran.code == 0
    assert ran.json["result"] == {"x": ["é", json.loads(f'"{HOSTILE}"')]}
    said = durable("call", "tasks.say", "--args", f'["{HOSTILE}"]', "--wait").out
    assert said == "red\n"

    ran = durable("call", "tasks.fail", "--args", f'["{HOSTILE}"]', "--wait", "20")
    assert (ran.code, ran.out) == (1, "")
    failed = int(ran.err.splitlines()[0].removeprefix("instance "))
    assert ran.err.splitlines()[1] == f"Error: instance {failed} failed: ValueError: red"
    assert "raise ValueError(text)" in ran.err
    assert "\x1b" not in ran.err
    ran = durable("result", str(failed), "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "ValueError"
    assert "Traceback" in ran.json["error"]["traceback"]
    shown = durable("show", str(failed)).out
    assert "raise ValueError(text)" in shown
    assert "\x1b" not in shown

    for command in ("list", "status", "queues", "workers"):
        table = durable(command)
        assert table.code == 0
        assert "\x1b" not in table.out
    page = durable("status", "--json").json
    assert [failure["id"] for failure in page["recent_failures"]] == [failed]
    assert {state["name"] for state in page["workers"]} == {"w@here"}
    assert sorted(state["queue"] for state in page["workers"]) == ["checkout", "default", "default"]
    assert len(page["beats"]) == 1
    assert {state["queue"]: state["workers"] for state in page["queues"]} == {"default": 2, "checkout": 1}
    assert durable("cancel", str(failed)).code == 1

    assert worker.stop() == 0
    output = worker.output()
    assert output.startswith("durable ")
    for part in ("worker w@here", "default x 2, checkout x 1, and a beat", "tasks.add, tasks.fail, tasks.say"):
        assert part in output
    assert f"instance={failed} task=tasks.fail" in output
    assert "\x1b" not in output


def test_a_worker_says_what_it_is_as_json_and_ends_at_ctrl_c(durable_worker: Callable[..., Any], shop: Path) -> None:
    worker = durable_worker("worker", "-c", "1", "--prefetch", "5", "--drain-timeout", "1", "--json", "-l", "error")
    document = wait_until(lambda: worker.output().endswith("}\n") and json.loads(worker.output()), what="the banner")
    assert isinstance(document, dict)
    assert document["queues"] == {"default": 1}
    assert document["tasks"] == ["tasks.add", "tasks.fail", "tasks.say"]
    assert document["name"] == f"test@{os.uname().nodename}"
    assert document["pid"] == worker.pid
    assert worker.stop(signal.SIGINT) == 0


def test_a_beat_registers_and_ends_in_order(
    durable_worker: Callable[..., Any], durable: Callable[..., Ran], shop: Path
) -> None:
    beat = durable_worker("beat", "-n", "b@here")
    wait_until(lambda: durable("workers", "--json").json, what="the beat's lease")
    (state,) = durable("workers", "--json").json
    assert (state["kind"], state["name"], state["alive"]) == ("beat", "b@here", True)
    assert beat.stop() == 0
    assert durable("workers", "--json").json == []
    assert "beat b@here" in beat.output()


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_without_its_schema_nothing_starts(
    process: Callable[..., Ran], tasks_module: Callable[[str], Path], command: str, schema: str
) -> None:
    tasks_module("")
    ran = process(command)
    assert ran.code == 3
    assert ran.error == f"Error: schema {schema!r} isn't there; run `durable migrate`"


def test_on_a_schema_of_newer_code_nothing_starts(
    process: Callable[..., Ran],
    shop: Path,
    schema: str,
    connection: psycopg.Connection[Any],
    durable: Callable[..., Ran],
) -> None:
    assert durable("list").code == 0  # which imports, and so migrates
    connection.execute(
        f"INSERT INTO {schema}.migrations (id, name, checksum, breaking) VALUES (9999, 'later', 'x', true)"
    )
    ran = process("worker")
    assert ran.code == 3
    assert "this code is older than schema" in ran.error


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_without_its_database_nothing_starts(process: Callable[..., Ran], tmp_path: Path, command: str) -> None:
    (tmp_path / "mine.py").write_text(f"from durable import Durable\nshop = Durable('shop', dsn={NO_SERVER!r})\n")
    ran = process(command, "-A", "mine:shop")
    assert ran.code == 3
    assert "the database can't be reached" in ran.error
    assert "sesame" not in ran.err


def test_more_processes_than_the_server_has_connections_is_warned_of() -> None:
    assert connections_warning(98, 100) is None
    warning = connections_warning(99, 100)
    assert warning == "99 processes need 101 connections, but the server's max_connections is 100"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--max-memory-per-child", "lots"], "'lots' is no size like 200MB"),
        (["--max-memory-per-child", "0"], "'0' is no size"),
        (["--max-tasks-per-child", "0"], "not in the range"),
    ],
    ids=["text", "nothing", "no steps"],
)
def test_a_share_that_makes_no_sense_is_refused(
    process: Callable[..., Ran], shop: Path, options: list[str], complaint: str
) -> None:
    ran = process("worker", *options)
    assert ran.code == 2
    assert complaint in ran.err


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_settings_that_do_not_fit_each_other_start_nothing(
    durable: Callable[..., Ran], tasks_module: Callable[[str], Path], command: str
) -> None:
    """Assigned one by one each is right by itself."""
    tasks_module("app.conf.heartbeat_interval = 15\n")
    ran = durable(command)
    assert ran.code == 3
    assert "lease_ttl (20 s) must be more than twice heartbeat_interval (15 s)" in ran.error


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_a_wrong_entry_of_beat_schedule_is_said_once_and_nothing_is_forked(
    durable: Callable[..., Ran], tasks_module: Callable[[str], Path], command: str
) -> None:
    tasks_module("""
        app.migrate()
        app.conf.beat_schedule = {"nightly": {"task": "tasks.none", "schedule": 10}}
    """)
    ran = durable(command)
    assert ran.code == 3
    assert "beat_schedule, entry 'nightly'" in ran.err
