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
