"""`call`, `list`, `show`, `cancel`, `purge` on instances that no worker runs."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable.storage import inspection
from durable_cli import instances
from durable_cli.loading import load
from tests.cli.conftest import Ran, set_status

Connection = psycopg.Connection[Any]


@pytest.fixture
def call(durable: Callable[..., Ran], shop: Path) -> Callable[..., int]:
    """Enqueue a task and return its id."""

    def call(*arguments: str) -> int:
        ran = durable("call", *arguments)
        assert ran.code == 0, ran.err
        assert ran.err == ""
        return int(ran.out)

    return call


def test_call_prints_the_id_and_enqueues_what_was_said(durable: Callable[..., Ran], call: Callable[..., int]) -> None:
    options = ["--queue", "slow", "--priority", "-3", "--countdown", "60", "--expires", "120", "--key", "order:7"]
    instance = call("tasks.add", "--args", "[1]", "--kwargs", '{"b": 41}', *options)
    shown = durable("show", str(instance), "--json").json
    assert shown["id"] == instance
    assert (shown["task"], shown["status"], shown["queue"], shown["priority"]) == ("tasks.add", "scheduled", "slow", -3)
    assert (shown["args"], shown["kwargs"], shown["correlation_key"]) == ([1], {"b": 41}, "order:7")
    created, eligible, expires = (
        datetime.fromisoformat(shown[name]) for name in ("created_at", "eligible_at", "expires_at")
    )
    assert 59 < (eligible - created).total_seconds() < 61
    assert 119 < (expires - created).total_seconds() < 121


def test_call_at_a_time_and_as_json(durable: Callable[..., Ran], shop: Path) -> None:
    ran = durable("call", "tasks.add", "--args", "[1]", "--eta", "2031-01-01T01:00:00+01:00", "--json")
    shown = durable("show", str(ran.json["id"]), "--json").json
    assert shown["eligible_at"] == "2031-01-01T00:00:00Z"
    assert ran.json == {"id": shown["id"], "task": "tasks.add", "queue": "default"}


def test_an_occupied_key_fails_and_names_the_occupant(durable: Callable[..., Ran], call: Callable[..., int]) -> None:
    first = call("tasks.add", "--args", "[1]", "--key", "k")
    ran = durable("call", "tasks.add", "--args", "[1]", "--key", "k")
    assert ran.code == 1
    assert f"occupied by instance {first}" in ran.error


def test_list_is_one_array_newest_first(durable: Callable[..., Ran], call: Callable[..., int]) -> None:
    assert durable("list", "--json").json == []
    assert durable("list").out == "no instances\n"
    ids = [call("tasks.add", "--args", f"[{n}]") for n in range(3)]
    slow = call("tasks.say", "--args", '["x"]', "--queue", "slow")
    assert [entry["id"] for entry in durable("list", "--json").json] == [slow, *reversed(ids)]
    assert [entry["id"] for entry in durable("list", "--json", "--limit", "2").json] == [slow, ids[2]]
    assert [entry["id"] for entry in durable("list", "--json", "--queue", "slow").json] == [slow]
    assert [entry["id"] for entry in durable("list", "--json", "--task", "tasks.say").json] == [slow]
    assert durable("cancel", str(slow)).code == 0
    assert [entry["id"] for entry in durable("list", "--json", "--status", "cancelled").json] == [slow]
    first = durable("list", "--json").json[0]
    assert (first["task"], first["queue"], first["status"]) == ("tasks.say", "slow", "cancelled")
    assert first["created_at"].endswith("Z")
    assert first["finished_at"].endswith("Z")
    table = durable("list").out.splitlines()
    assert table[0].split()[:4] == ["ID", "TASK", "QUEUE", "STATUS"]
    assert table[1].split()[:4] == [str(slow), "tasks.say", "slow", "cancelled"]


def test_list_reads_any_number_page_by_page(
    durable: Callable[..., Ran], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "PAGE", 10)
    durable("list")
    app = load("tasks", "-A")
    app.insert_many([("tasks.add", {"args": (n,)}) for n in range(105)])
    app.close()
    for limit, count in (("0", 105), ("100", 100), ("10", 10), ("15", 15)):
        ids = [entry["id"] for entry in durable("list", "--json", "--limit", limit).json]
        assert len(ids) == count
        assert ids == sorted(ids, reverse=True)


def test_show_and_result_of_what_is_not_there(durable: Callable[..., Ran], shop: Path) -> None:
    for command in ("show", "result"):
        ran = durable(command, "424242")
        assert ran.code == 1
        assert ran.error == "Error: there is no instance 424242"


def test_show_for_people_is_safe_and_complete(durable: Callable[..., Ran], call: Callable[..., int]) -> None:
    instance = call("tasks.say", "--args", '["\\u001b[31mred\\u001b[0m"]')
    shown = durable("show", str(instance)).out
    assert "\x1b" not in shown
    for part in ("tasks.say", "runnable", "args", "red", "created at"):
        assert part in shown


def test_show_does_not_load_what_the_app_does_not_accept(
    durable: Callable[..., Ran], call: Callable[..., int], connection: Connection, schema: str
) -> None:
    instance = call("tasks.add", "--args", "[1]")
    connection.execute(f"UPDATE {schema}.instances SET state_type = 'pickle'")
    ran = durable("show", str(instance), "--json")
    assert ran.code == 0
    assert "not loaded" in ran.json["state"]


def test_an_unfinished_result_is_not_waited_for_when_told_so(
    durable: Callable[..., Ran], call: Callable[..., int]
) -> None:
    instance = call("tasks.add", "--args", "[1]")
    ran = durable("result", str(instance), "--no-wait")
    assert ran.code == 1
    assert ran.error == f"Error: instance {instance} is not finished: runnable"
    ran = durable("result", str(instance), "--no-wait", "--json")
    assert ran.code == 1
    assert ran.json == {"id": instance, "status": "runnable", "result": None, "error": None}
    ran = durable("result", str(instance), "--timeout", "0.05")
    assert ran.code == 1
    assert "not finished after 0.05 s" in ran.error


def test_cancel_reports_each_and_fails_if_one_could_not_be(
    durable: Callable[..., Ran], call: Callable[..., int], connection: Connection, schema: str
) -> None:
    waiting, running = (call("tasks.add", "--args", "[1]") for _ in range(2))
    call("tasks.add", "--args", "[1]", "--key", "order:1")
    set_status(connection, schema, running, "executing")
    ran = durable("cancel", str(waiting), str(running), "order:1", "--reason", "too late")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        f"{waiting}: cancelled",
        f"{running}: will be cancelled when its step ends",
        "order:1: cancelled",
    ]
    again = durable("cancel", str(waiting), "order:1", "424242", "--json")
    assert again.code == 1
    assert [(entry["target"], entry["cancelled"], entry["outcome"]) for entry in again.json] == [
        (waiting, False, "finished already: cancelled"),
        ("order:1", False, "no live instance has this key"),
        (424242, False, "not found"),
    ]
    ended = durable("result", str(waiting), "--json")
    assert ended.code == 1
    assert ended.json["status"] == "cancelled"
    assert ended.json["error"]["message"] == "too late"


def test_cancel_says_what_becomes_of_one_that_is_terminated(
    durable: Callable[..., Ran], call: Callable[..., int], connection: Connection, schema: str
) -> None:
    waiting, running = (call("tasks.add", "--args", "[1]") for _ in range(2))
    set_status(connection, schema, running, "executing")
    ran = durable("cancel", str(waiting), str(running), "--terminate", "--json")
    assert ran.code == 0
    assert [entry["outcome"] for entry in ran.json] == ["cancelled", "is killed, and then cancelled"]
    asked = connection.execute(f"SELECT id FROM {schema}.instances WHERE terminate_requested").fetchall()
    assert asked == [(running,)]


def test_cancel_reads_ids_from_stdin_and_skips_blank_lines(
    durable: Callable[..., Ran], call: Callable[..., int]
) -> None:
    ids = [call("tasks.add", "--args", "[1]") for _ in range(3)]
    text = "\n\n".join(map(str, ids)) + "\n\n"
    ran = durable("cancel", "-", stdin=text)
    assert ran.code == 0
    assert len(ran.out.splitlines()) == 3
    ran = durable("cancel", "-", stdin="1\n1,2,\n")
    assert ran.code == 2
    assert "stdin, line 2: '1,2,' is no instance id" in ran.error


def test_cancel_takes_a_key_that_looks_like_an_id(durable: Callable[..., Ran], call: Callable[..., int]) -> None:
    instance = call("tasks.add", "--args", "[1]", "--key", "4711")
    ran = durable("cancel", "--key", "4711", "--json")
    assert ran.code == 0
    assert ran.json[0]["id"] == instance


def test_purge_without_a_terminal_needs_yes(
    durable: Callable[..., Ran], call: Callable[..., int], connection: Connection, schema: str
) -> None:
    call("tasks.add", "--args", "[1]")
    call("tasks.add", "--args", "[1]", "--countdown", "60")
    call("tasks.add", "--args", "[1]", "--queue", "slow")
    running = call("tasks.add", "--args", "[1]")
    set_status(connection, schema, running, "executing")
    ran = durable("purge", "-Q", "default")
    assert ran.code == 2
    assert "2 waiting instances of queue 'default'" in ran.error
    assert connection.info.dbname in ran.error
    ran = durable("purge", "-Q", "default", "--yes", "--json")
    assert ran.code == 0
    assert ran.json == {"purged": 2, "queue": "default", "schema": schema, "database": connection.info.dbname}
    assert "deleted 1 waiting instance (" in durable("purge", "-y").out
    assert [entry["id"] for entry in durable("list", "--json").json] == [running]


@pytest.mark.parametrize(("answer", "code", "left"), [(b"n\n", 1, 1), (b"y\n", 0, 0)])
def test_purge_asks_on_a_terminal(
    call: Callable[..., int], shop: Path, durable: Callable[..., Ran], answer: bytes, code: int, left: int
) -> None:
    call("tasks.add", "--args", "[1]")
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    done = subprocess.run(
        [sys.executable, "-m", "durable_cli", "purge"], cwd=shop, stdin=theirs, capture_output=True, timeout=60
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code
    assert b"Delete 1 waiting instance of all queues" in done.stderr
    assert len(durable("list", "--json").json) == left


def test_queues_workers_and_status_without_any(durable: Callable[..., Ran], shop: Path) -> None:
    assert durable("queues").out == "no queue has instances or workers\n"
    assert durable("workers").out == "no worker and no beat runs\n"
    assert durable("queues", "--json").json == []
    assert durable("workers", "--json").json == []
    page = durable("status").out
    assert "none: nothing runs; start `durable worker`" in page


def test_queues_and_status_count(
    durable: Callable[..., Ran], call: Callable[..., int], schema: str, connection: Connection
) -> None:
    call("tasks.add", "--args", "[1]")
    call("tasks.add", "--args", "[1]", "--countdown", "60")
    set_status(connection, schema, call("tasks.add", "--args", "[1]", "--queue", "slow"), "executing")
    default, slow = durable("queues", "--json").json
    assert (default["queue"], default["runnable"], default["scheduled"], default["executing"]) == ("default", 1, 1, 0)
    assert (slow["queue"], slow["runnable"], slow["executing"], slow["oldest"]) == ("slow", 0, 1, None)
    assert default["oldest"] > 0
    page = durable("status", "--json").json
    assert page["schema"] == schema
    assert {name: count for name, count in page["totals"].items() if count} == {
        "runnable": 1,
        "scheduled": 1,
        "executing": 1,
    }
    assert page["recent_failures"] == []
    assert page["estimated"] == []
    assert "QUEUE" in durable("status").out


def test_status_says_which_numbers_are_estimates(
    durable: Callable[..., Ran],
    call: Callable[..., int],
    connection: Connection,
    schema: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(3):
        durable("cancel", str(call("tasks.add", "--args", "[1]")))
    connection.execute(f"UPDATE {schema}.history SET status = 'done' WHERE id < 3")
    connection.execute(f"ANALYZE {schema}.history")
    assert "2 done, 1 cancelled" in durable("status").out
    monkeypatch.setattr(inspection, "COUNT_MOST", 1)
    assert "~2 done, 1 cancelled" in durable("status").out
    assert durable("status", "--json").json["estimated"] == ["done"]


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&-", 0, ""),
        (">/dev/full", 1, "Error: No space left on device\n"),
        ("| true", 1, ""),
    ],
)
def test_a_stdout_that_is_closed_full_or_gone(shop: Path, redirection: str, code: int, said: str) -> None:
    script = f"set -o pipefail; {sys.executable} -m durable_cli migrate --sql {redirection} "
    done = subprocess.run(["bash", "-c", script], cwd=shop, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)
