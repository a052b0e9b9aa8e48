"""Prometheus: metrics from the events. Extra `prometheus`.

    from durable.adapters.prometheus import instrument
    instrument()

A worker command is several processes, and one scrape has to see them all: prometheus_client's multiprocess mode, which
keeps the numbers in files of PROMETHEUS_MULTIPROC_DIR. That has to be set before anything imports prometheus_client.
`durable worker --metrics-port` sets it, calls `instrument` and serves the scrape from the agent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from durable import telemetry
from durable.adapters.metrics import ROWS, SECONDS, Metric, by_event, labels
from durable.errors import ConfigError
from durable.runtime.identity import exists
from durable.telemetry import Handler

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def instrument(registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Measure this process, and those forked from it; return a function that ends it.

    Calling it again for the same registry changes nothing. Raises ValueError for a name that the registry has already.
    """
    if registry not in _handlers:
        _handlers[registry] = [(event, _handler(registry, found)) for event, found in by_event()]
    for event, handler in _handlers[registry]:
        telemetry.attach(event, handler)

    def stop() -> None:
        for event, handler in _handlers[registry]:
            telemetry.detach(event, handler)

    return stop


_handlers: dict[CollectorRegistry, list[tuple[str, Handler]]] = {}


def _handler(registry: CollectorRegistry, found: Sequence[Metric]) -> Handler:
    records = [(metric, _collector(registry, metric)) for metric in found]

    def handle(event: str, measurements: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        for metric, collector in records:
            child: Any = collector.labels(**labels(metric, metadata)) if metric.labels else collector
            value = measurements[metric.measurement]
            if metric.kind == "counter":
                child.inc(value)
            elif metric.kind == "gauge":
                child.set(value)
            else:
                child.observe(value)

    return handle


def _collector(registry: CollectorRegistry, metric: Metric) -> MetricWrapperBase:
    name = f"durable_{metric.name}{'_seconds' if metric.seconds else ''}"
    if metric.kind == "counter":
        return Counter(name, metric.meaning, metric.labels, registry=registry)
    if metric.kind == "gauge":
        # Over the processes that live: the sum, but of the lag the worst.
        mode: Literal["livemax", "livesum"] = "livemax" if metric.seconds else "livesum"
        return Gauge(name, metric.meaning, metric.labels, registry=registry, multiprocess_mode=mode)
    return Histogram(
        name, metric.meaning, metric.labels, registry=registry, buckets=SECONDS if metric.seconds else ROWS
    )


class Processes(MultiProcessCollector):
    """Collects from the files of all processes, without the gauges of those that are gone."""

    def collect(self) -> Any:
        """Return the metrics, as a registry asks for them."""
        folder = os.environ[VARIABLE]
        for pid in {path.stem.rpartition("_")[2] for path in Path(folder).glob("gauge_live*_*.db")}:
            if pid.isdecimal() and not exists(int(pid), ""):
                mark_process_dead(int(pid), folder)  # type: ignore[no-untyped-call]
        return super().collect()  # type: ignore[no-untyped-call]


def registry() -> CollectorRegistry:
    """Return a registry that sees all processes of the command, for an exporter of your own.

    Raises ConfigError when PROMETHEUS_MULTIPROC_DIR is not a folder.
    """
    folder = os.environ.get(VARIABLE, "")
    if not Path(folder or "/nowhere").is_dir():
        raise ConfigError(f"{VARIABLE} must name a folder that all processes of the command share, got {folder!r}")
    everybody = CollectorRegistry()
    Processes(everybody)  # type: ignore[no-untyped-call]
    return everybody


def serve(port: int, address: str = "127.0.0.1") -> Callable[[], None]:
    """Serve the metrics of all processes at http://address:port/metrics from a thread; return what ends it.

    Answers GET alone, whoever asks: keep the address one that only your scraper reaches.

    Raises ConfigError as `registry`, OSError when the port is taken.
    """
    server, thread = start_http_server(port, address, registry())

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
