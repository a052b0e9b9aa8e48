"""Metrics as prometheus_client shows them: of one process, and of all processes of a command."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from durable import Durable
from durable.adapters import prometheus
from durable.errors import ConfigError
from tests.cli.conftest import Ran, durable, here, process
from tests.fix_db import wait_until
from tests.machines.driver import Driver
from tests.telemetry.conftest import Heard

__all__ = ["durable", "here", "process"]


def test_the_events_become_metrics(app: Durable, driver: Driver) -> None:
    registry = CollectorRegistry()
    prometheus.instrument(registry)
    stop = prometheus.instrument(registry)  # once more, which must not count twice

    @app.task(name="work")
    def work() -> None: ...

    app.insert_many([(work, {})] * 3)
    driver.engine._saturation.report()
    driver.drain()
    stop()
    app.insert(work)
    driver.drain()

    labels = {"fsm": "work", "step": "run", "kind": "done"}
    assert registry.get_sample_value("durable_step_duration_seconds_count", labels) == 3
    assert registry.get_sample_value("durable_claimed_total", {"queue": "default"}) == 3
    assert registry.get_sample_value("durable_slots", {"queue": "default"}) == 1
    assert registry.get_sample_value("durable_reaped_total") == 0


def test_a_name_that_is_taken_is_an_error_and_not_a_double_count(heard: Heard) -> None:
    registry = CollectorRegistry()
    prometheus.Counter("durable_reaped", "mine", registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        prometheus.instrument(registry)


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere/at/all")
    with pytest.raises(ConfigError, match=r"PROMETHEUS_MULTIPROC_DIR must name a folder .* got '/nowhere/at/all'"):
        prometheus.serve(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample, its labels) -> value."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


TASKS = """
    app.migrate()
    app.close()

    @app.task
    def work():
        pass

    @app.task(queue="other")
    def other():
        pass
"""


def test_one_scrape_sees_all_processes_of_a_worker_and_outlives_their_deaths(
    tasks_module: Callable[[str], Path], durable_worker: Any, durable: Callable[..., Ran], here: Path
) -> None:
    tasks_module(TASKS)
    port = free_port()
    worker = durable_worker("worker", "-Q", "default:2,other:1", "--metrics-port", str(port))
    slots = ("durable_slots", (("queue", "default"),))
    wait_until(lambda: scrape(port).get(slots) == 2)
    for _ in range(5):
        durable("call", "tasks.work", "--wait", "20")
    durable("call", "tasks.other", "--wait", "20")

    def done(name: str) -> float | None:
        labels = (("fsm", f"tasks.{name}"), ("kind", "done"), ("step", "run"))
        return scrape(port).get(("durable_step_duration_seconds_count", labels))

    wait_until(lambda: (done("work"), done("other")) == (5, 1), what="what was done to be counted")
    victim = worker.started("durable:default", 2)[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in worker.children("durable:") and len(worker.children("durable:default")) == 2)
    wait_until(lambda: scrape(port).get(slots) == 2, what="gauges of those that live")
    assert done("work") == 5, "what it had counted is not lost"

    (agent,) = worker.started("durable:agent")
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: done("work") == 5, what="the new agent serves")
    assert worker.stop() == 0
    assert not list(Path(tempfile.gettempdir()).glob(f"durable-metrics-{worker.pid}-*"))


def test_a_beat_serves_its_own(
    tasks_module: Callable[[str], Path], durable_worker: Any, durable: Callable[..., Ran], here: Path
) -> None:
    tasks_module(TASKS)
    port = free_port()
    beat = durable_worker("beat", "--metrics-port", str(port))
    wait_until(lambda: ("durable_gc_swept_total", ()) in scrape(port))
    assert beat.stop() == 0
    assert not list(Path(tempfile.gettempdir()).glob(f"durable-metrics-{beat.pid}-*"))


def test_a_port_that_is_taken_is_told_before_anything_starts(
    tasks_module: Callable[[str], Path], process: Callable[..., Ran]
) -> None:
    tasks_module(TASKS)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        ran = process("worker", "--metrics-port", str(taken.getsockname()[1]))
    assert ran.code == 1
    assert "Address already in use" in ran.error


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--metrics-port", "0"], 2, "0 is not in the range"),
        (["--metrics-port", "65536"], 2, "65536 is not in the range"),
        (["--metrics-port", "9464", "--metrics-host", "192.0.2.1"], 1, "192.0.2.1:9464: Cannot assign"),
        (["--metrics-port", "9464", "--metrics-host", "no such host"], 1, "can't be served at no such host:9464: "),
        (["--metrics-port", "9464", "--metrics-host", "x" * 70], 1, "can't be served at xxx"),
    ],
)
@pytest.mark.parametrize("command", ["worker", "beat"])
def test_an_address_that_is_none_is_told_before_anything_starts(
    tasks_module: Callable[[str], Path],
    durable: Callable[..., Ran],
    command: str,
    options: list[str],
    code: int,
    said: str,
) -> None:
    tasks_module("")
    ran = durable(command, *options)
    assert ran.code == code
    assert said in ran.error


def test_metrics_are_read_and_nothing_else_at_this_host_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    port = free_port()
    stop = prometheus.serve(port)
    try:
        assert answer(port, "GET", Host="evil.example").status == 200
        assert answer(port, "OPTIONS").headers["Allow"] == "OPTIONS,GET"
        for method in ("POST", "PUT", "DELETE", "PATCH", "HEAD", "TRACE", "NONSENSE"):
            assert answer(port, method).status in (405, 501), method
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 5)
    finally:
        stop()


def answer(port: int, method: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, "/metrics", headers=headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response
