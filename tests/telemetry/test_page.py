"""docs/telemetry.md says what the code does: its tables are the code's."""

from __future__ import annotations

from pathlib import Path

import pytest

from durable import telemetry
from durable.adapters.metrics import METRICS, Metric, by_event

PAGE = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()


def table(head: str) -> list[str]:
    """The rows of the table below a head line."""
    lines = PAGE.split(head + "\n", 1)[1].splitlines()[1:]
    return lines[: next(n for n, line in enumerate(lines) if not line.startswith("|"))]


def test_every_event_is_on_the_page_as_it_is() -> None:
    assert table("| event | measurements | metadata | when |") == [
        f"| `{name}` | {', '.join(event.measurements)} | {', '.join(event.metadata)} | {event.meaning} |"
        for name, event in telemetry.EVENTS.items()
    ]


def test_every_metric_is_on_the_page_as_it_is() -> None:
    assert table("| metric | kind | of | labels | |") == [
        f"| `{m.name}` | {m.kind} | `{m.event}` {m.measurement} | {', '.join(m.labels)} | {m.meaning} |"
        for m in METRICS
    ]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_of_what_its_event_has_and_has_no_label_that_is_an_id(metric: Metric) -> None:
    event = telemetry.EVENTS[metric.event]
    assert metric.measurement in event.measurements
    assert set(metric.labels) <= set(event.metadata) - {"id", "ids", "key", "concurrency_key", "worker"}


def test_every_event_makes_metrics() -> None:
    assert {event for event, _ in by_event()} == set(telemetry.EVENTS)
