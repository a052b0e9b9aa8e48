"""Workers that are turned by hand, and what they emit; nothing stays attached after a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from durable import telemetry, tracing
from tests.machines.driver import driver, drivers, view

__all__ = ["driver", "drivers", "view"]


class Heard:
    """Events in order, as (name, measurements, metadata)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def __call__(self, event: str, measurements: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        self.events.append((event, dict(measurements), dict(metadata)))

    def of(self, event: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(measurements, metadata) of one event."""
        return [(measurements, metadata) for name, measurements, metadata in self.events if name == event]


@pytest.fixture(autouse=True)
def _unattached() -> Iterator[None]:
    yield
    telemetry.attached.clear()
    telemetry._at_start.clear()
    telemetry._at_stop.clear()
    tracing.trace_with(None)


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Everything that is emitted in this process; each with the keys of the table and no others."""
    heard = Heard()
    for event in telemetry.EVENTS:
        telemetry.attach(event, heard)
    yield heard
    for name, measurements, metadata in heard.events:
        assert (tuple(measurements), tuple(metadata)) == telemetry.EVENTS[name][:2], name
