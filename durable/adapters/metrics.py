"""Which metrics the events make: one table, from which the adapters build theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from durable.telemetry import EVENTS


class Metric(NamedTuple):
    """One metric: a counter adds up what events measure, a gauge shows the latest, a histogram their distribution.

    labels  names of metadata; ids of instances and workers are none, since each would be a series of its own
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    event: str
    measurement: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def seconds(self) -> bool:
        """Whether it is in seconds; else it counts."""
        return self.measurement in ("duration", "flush_lag")


METRICS = (
    Metric("step_duration", "histogram", "step.stop", "duration", ("fsm", "step", "kind"), "time that steps ran"),
    Metric("claim_size", "histogram", "pick.stop", "count", ("queue",), "rows of a claim, 0 when it found none"),
    Metric("claimed", "counter", "pick.stop", "count", ("queue",), "rows claimed"),
    Metric("slots", "gauge", "scheduler.saturation", "concurrency", ("queue",), "steps that can run at once"),
    Metric("slots_busy", "gauge", "scheduler.saturation", "in_flight", ("queue",), "steps that run"),
    Metric("buffer", "gauge", "scheduler.saturation", "buffer", ("queue",), "claimed rows that wait for a slot"),
    Metric("prefetch", "gauge", "scheduler.saturation", "prefetch", ("queue",), "rows the buffer is meant to hold"),
    Metric("flush_lag", "gauge", "scheduler.saturation", "flush_lag", ("queue",), "age of the oldest outcome in wait"),
    Metric("drain_released", "counter", "scheduler.drain", "released", ("queue",), "claims given back at a shutdown"),
    Metric("reclaimed", "counter", "scheduler.reclaimed", "count", ("queue",), "claims taken back from the dead"),
    Metric("outcomes_stale", "counter", "outcome.stale", "count", ("fsm", "step", "kind"), "outcomes come too late"),
    Metric("reaped", "counter", "reaper.reaped", "count", (), "rows taken back from silent workers"),
    Metric("await_timeouts", "counter", "await.timeout", "count", (), "parks that ended by their timeout"),
    Metric("signals_unread", "counter", "signal.unread", "count", ("fsm", "rerun"), "signals that came too late"),
    Metric("gc_swept", "counter", "gc.swept", "count", (), "rows and partitions collected as garbage"),
    Metric("gc_swept_buckets", "counter", "gc.swept", "buckets", (), "buckets of rate limits collected as garbage"),
    Metric("gc_swept_gates", "counter", "gc.swept", "gates", (), "gates collected as garbage"),
    Metric("concurrency_contended", "counter", "concurrency.contended", "count", ("fsm",), "rows that met a taken key"),
    Metric("concurrency_wanted", "counter", "concurrency.throttled", "wanted", ("queue",), "rows that met full gates"),
    Metric("concurrency_admitted", "counter", "concurrency.throttled", "admitted", ("queue",), "of those, let in"),
    Metric("rate_limit_wanted", "counter", "rate_limit.throttled", "wanted", ("queue",), "rows that met dry limits"),
    Metric("rate_limit_granted", "counter", "rate_limit.throttled", "granted", ("queue",), "of those, let in"),
    Metric("rate_limit_contended", "counter", "rate_limit.contended", "count", ("queue",), "rows in wait for claims"),
    Metric("rate_limit_unknown", "counter", "rate_limit.unknown", "count", ("name",), "rows whose limit is gone"),
)
"""Every metric; adapters put `durable` before the name, and the unit and kind behind it as is usual with them."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
ROWS = (0, 1, 2, 5, 10, 25, 50, 100, 200, 400)
"""Bounds of the histograms' buckets."""


def by_event() -> Iterable[tuple[str, list[Metric]]]:
    """Return the metrics of each event that makes any."""
    for event in EVENTS:
        metrics = [metric for metric in METRICS if metric.event == event]
        if metrics:
            yield event, metrics


def labels(metric: Metric, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels of a measurement."""
    return {name: str(metadata[name]) for name in metric.labels}
