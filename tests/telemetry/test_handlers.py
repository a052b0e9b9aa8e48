"""Attaching, detaching, failing handlers, callbacks of processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest

import durable
from durable import telemetry
from durable.errors import ValidationError
from tests.telemetry.conftest import Heard


def test_it_is_there_as_soon_as_durable_is() -> None:
    assert durable.telemetry is telemetry


def test_a_handler_gets_event_measurements_and_metadata_once_however_often_it_was_attached() -> None:
    heard = Heard()
    telemetry.attach("await.timeout", heard)
    telemetry.attach("await.timeout", heard)
    telemetry.emit("await.timeout", {"count": 2}, {})
    telemetry.emit("gc.swept", {"count": 0, "buckets": 0, "gates": 0}, {})
    assert heard.events == [("await.timeout", {"count": 2}, {})]


def test_detach_says_whether_it_was_attached_and_leaves_nothing_to_look_through() -> None:
    first, second = Heard(), Heard()
    telemetry.attach("await.timeout", first)
    telemetry.attach("await.timeout", second)
    assert telemetry.detach("await.timeout", first)
    assert not telemetry.detach("await.timeout", first)
    telemetry.emit("await.timeout", {"count": 1}, {})
    assert (len(first.events), len(second.events)) == (0, 1)
    assert telemetry.detach("await.timeout", second)
    assert telemetry.attached == {}


@pytest.mark.parametrize(("name", "hint"), [("step.stopp", "'step.stop'"), ("reaper.reap", "'reaper.reaped'")])
def test_an_unknown_event_is_refused_and_the_nearest_named(name: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=f"there is no event '{name}'; did you mean {hint}"):
        telemetry.attach(name, print)
    with pytest.raises(ValidationError, match="there is no event"):
        telemetry.detach(name, print)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ValidationError, match="a handler is a function of"):
        telemetry.attach("step.stop", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)], ids=["exception", "exit"])
def test_a_handler_that_fails_is_logged_and_detached_and_the_others_go_on(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(event: str, measurements: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        raise error

    heard = Heard()
    telemetry.attach("await.timeout", bad)
    telemetry.attach("await.timeout", heard)
    telemetry.emit("await.timeout", {"count": 1}, {})
    telemetry.emit("await.timeout", {"count": 2}, {})
    assert [measurements["count"] for measurements, _ in heard.of("await.timeout")] == [1, 2]
    assert telemetry.attached == {"await.timeout": (heard,)}
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "a handler of await.timeout failed; it is detached" in record.getMessage()


def test_a_handler_cannot_change_what_the_next_one_sees(caplog: pytest.LogCaptureFixture) -> None:
    def bad(event: str, measurements: Any, metadata: Any) -> None:
        measurements["count"] = 0

    heard = Heard()
    telemetry.attach("await.timeout", bad)
    telemetry.attach("await.timeout", heard)
    telemetry.emit("await.timeout", {"count": 1}, {})
    assert heard.events == [("await.timeout", {"count": 1}, {})]


def test_the_callbacks_of_a_process_are_called_once_each_and_a_failing_one_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []

    @telemetry.on_process_start
    def bad(role: str) -> None:
        raise ValueError(role)

    telemetry.on_process_start(lambda role: seen.append(f"start {role}"))
    telemetry.on_process_stop(lambda role: seen.append(f"stop {role}"))
    with telemetry.process("agent"):
        telemetry.leave()
    telemetry.leave()
    assert seen == ["start agent", "stop agent"]
    assert "failed in the agent process" in caplog.text
