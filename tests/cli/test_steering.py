"""Orders from the command line: queues paused and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import NO_SERVER, Ran

pytestmark = pytest.mark.usefixtures("shop")


def test_a_queue_is_paused_and_resumed_and_says_what_changed(durable: Callable[..., Ran]) -> None:
    assert durable("pause", "default", "checkout", "--reason", "no paper").out == "default: paused\ncheckout: paused\n"
    assert durable("pause", "default").out == "default: paused already\n"
    assert durable("resume", "default", "other").out == "default: resumed\nother: not paused\n"
    assert durable("resume", "checkout", "--json").json == [
        {"queue": "checkout", "changed": True, "outcome": "resumed"}
    ]


def test_queues_and_status_show_what_is_paused_and_why(durable: Callable[..., Ran]) -> None:
    assert "PAUSED" not in durable("queues").out
    durable("pause", "checkout", "--reason", "no \x1b[31mpaper")
    for command in ("queues", "status"):
        page = durable(command).out
        assert "PAUSED" in page
        assert "Z: no paper" in page
    (state,) = durable("queues", "--json").json
    assert (state["queue"], state["pause_reason"]) == ("checkout", "no \x1b[31mpaper")
    assert state["paused_at"].endswith("Z")
    durable("resume", "checkout")
    assert durable("queues").out == "no queue has instances or workers\n"


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_wrong_queues_and_a_database_away_are_one_line(
    durable: Callable[..., Ran], command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert durable(command).code == 2
    ran = durable(command, "good", "No Queue")
    assert (ran.code, "queue must be 1 to 63" in ran.err) == (2, True)
    assert durable("queues", "--json").json == [], "nothing is written when one of them is wrong"
    ran = durable(command, "default", "--dsn", NO_SERVER)
    assert ran.code != 0
    assert "sesame" not in ran.error


def test_a_queues_concurrency_is_set_shown_and_left_to_each_command_again(durable: Callable[..., Ran]) -> None:
    assert durable("queues", "set", "default", "--concurrency", "7").out == "default: 7 processes per command\n"
    assert "already" in durable("queues", "set", "default", "--concurrency", "7").out
    (state,) = durable("queues", "--json").json
    assert (state["queue"], state["concurrency"], state["paused_at"]) == ("default", 7, None)
    assert "SET" in durable("queues").out
    assert durable("queues", "set", "default", "--concurrency", "auto").out == "default: as each command was started\n"
    assert durable("queues", "--json").json == []


def test_a_queues_ageing_is_set_shown_and_taken_back(durable: Callable[..., Ran]) -> None:
    assert durable("queues", "set", "default", "--ageing", "90").out == "default: rows go first after 90 s\n"
    assert "already" in durable("queues", "set", "default", "--ageing", "90").out
    (state,) = durable("queues", "--json").json
    assert (state["queue"], state["ageing"], state["concurrency"]) == ("default", 90.0, None)
    assert "AGEING" in durable("queues").out
    assert durable("queues", "set", "default", "--ageing", "off").out == "default: priorities do not age\n"
    assert durable("queues", "--json").json == []


@pytest.mark.parametrize(
    "options", [(), ("--ageing", "0.5"), ("--ageing", "nan"), ("--ageing", "-1"), ("--ageing", "x")]
)
def test_a_wrong_ageing_or_nothing_to_set_is_refused(durable: Callable[..., Ran], options: tuple[str, ...]) -> None:
    ran = durable("queues", "set", "default", *options)
    assert (ran.code, "Error" in ran.err) == (2, True)
    assert durable("queues", "--json").json == []


@pytest.mark.parametrize("wrong", ["0", "1001", "-1", "many", ""])
def test_a_wrong_concurrency_is_refused(durable: Callable[..., Ran], wrong: str) -> None:
    ran = durable("queues", "set", "default", "--concurrency", wrong)
    assert (ran.code, "Error" in ran.err) == (2, True)
    assert durable("queues", "--json").json == []


@pytest.mark.parametrize("wrong", ["3", "3,2", "0,2", "1,1001", "a,b", "1,2,3"])
def test_a_wrong_autoscale_is_refused_before_anything_starts(durable: Callable[..., Ran], wrong: str) -> None:
    ran = durable("worker", "--autoscale", wrong)
    assert (ran.code, "--autoscale" in ran.err) == (2, True)


@pytest.mark.parametrize("what", ["stop", "reload"])
def test_a_worker_that_is_not_there_cannot_be_asked(durable: Callable[..., Ran], what: str) -> None:
    ran = durable("workers", what, "nobody@nowhere")
    assert (ran.code, "no worker of the name 'nobody@nowhere' is alive" in ran.error) == (1, True)
    assert durable("workers", what).code == 2
