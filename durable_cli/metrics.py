"""`--metrics-port`: the events of all processes of a command, counted for Prometheus and served by one of them.

The folder in which the processes share their numbers is named by PROMETHEUS_MULTIPROC_DIR, before anything imports
prometheus_client; it is made, and removed at the end, unless the environment names one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from durable import telemetry
from durable_cli.exits import CONFIG, FAILED, CommandError

F = TypeVar("F", bound=Callable[..., Any])
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_port_option = click.option(
    "--metrics-port", type=click.IntRange(1, 65535), metavar="PORT",
    help="Serve Prometheus metrics of all processes at this port (extra `prometheus`).",
)  # fmt: skip
_host_option = click.option(
    "--metrics-host", metavar="ADDRESS", default="127.0.0.1", show_default=True,
    help="The address to serve them at; 0.0.0.0 for every one of this host, for a scrape from elsewhere.",
)  # fmt: skip


def options(command: F) -> F:
    """Where to serve metrics."""
    return _port_option(_host_option(command))


@contextmanager
def shared(port: int | None, host: str) -> Iterator[None]:
    """Prepare for the import of an app whose processes are measured; None: they are not. Raises CommandError."""
    if port is None:
        yield
        return
    if importlib.util.find_spec("prometheus_client") is None:
        raise CommandError("--metrics-port needs prometheus-client: pip install 'durable-pg[prometheus]'", CONFIG)
    _check(port, host)
    # A command that replaces itself (SIGHUP) keeps its pid, its environment and this folder.
    prefix = f"durable-metrics-{os.getpid()}-"
    if not os.environ.get(VARIABLE):
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix=prefix)
    folder = Path(os.environ[VARIABLE])
    if not folder.is_dir():
        raise CommandError(f"{VARIABLE} is {str(folder)!r}, which is no folder", CONFIG)
    try:
        yield
    finally:
        if folder.name.startswith(prefix):
            shutil.rmtree(folder, ignore_errors=True)
            del os.environ[VARIABLE]


def _check(port: int, host: str) -> None:
    try:
        # As it will be served.
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"metrics can't be served at {host}:{port}: {why}", FAILED) from error


def serve(port: int | None, host: str, role: str) -> None:
    """Count from now on, and serve from the process of that role when it begins. None: do nothing."""
    if port is None:
        return
    # Imported when asked for: it is an extra.
    prometheus: Any = importlib.import_module("durable.adapters.prometheus")
    prometheus.instrument()
    telemetry.on_process_start(lambda present: prometheus.serve(port, host) if present == role else None)
