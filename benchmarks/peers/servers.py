"""Redis and RabbitMQ for the peers that need them: free ports, a temporary folder, stopped by their own pids."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peers.base import RABBITMQ, REDIS

RABBITMQ_PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Debian's; the one on the path changes to an account of its own."""


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reason(server: str) -> str:
    """Return why a server can't be had; empty when it can."""
    if server == REDIS and shutil.which("redis-server") is None:
        return "not available here: no redis-server on the path"
    if server == RABBITMQ and not RABBITMQ_PROGRAM.exists():
        return f"not available here: no {RABBITMQ_PROGRAM}"
    return ""


@contextmanager
def servers(wanted: set[str]) -> Iterator[Mapping[str, str]]:
    """Start what is wanted and can be had; the environment in which peers find them. Stopped and removed afterwards."""
    environment = {}
    with ExitStack() as stack:
        if REDIS in wanted and not reason(REDIS):
            environment["BENCH_REDIS"] = stack.enter_context(_redis())
        if RABBITMQ in wanted and not reason(RABBITMQ):
            environment["BENCH_RABBITMQ"] = stack.enter_context(_rabbitmq())
        yield environment


@contextmanager
def _redis() -> Iterator[str]:
    """The defaults of Debian's package: snapshots now and then, no append-only file."""
    port = free_port()
    with TemporaryDirectory(prefix="durable-bench-redis-") as home:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", home]
        with _process(["redis-server", *options], port, {}):
            yield f"redis://127.0.0.1:{port}"


@contextmanager
def _rabbitmq() -> Iterator[str]:
    port, names, distribution = free_port(), free_port(), free_port()
    with TemporaryDirectory(prefix="durable-bench-rabbitmq-") as home:
        plugins = Path(home) / "plugins"
        plugins.write_text("[].")
        own = {
            "HOME": home,
            "ERL_EPMD_PORT": str(names),
            "RABBITMQ_NODENAME": f"bench{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": home,
            "RABBITMQ_LOG_BASE": home,
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        }
        # Erlang would start the name server as a daemon that stays.
        with (
            _process(["epmd", "-port", str(names), "-address", "127.0.0.1"], names, {}),
            _process([str(RABBITMQ_PROGRAM)], port, own),
        ):
            yield f"amqp://guest:guest@127.0.0.1:{port}/%2F"


@contextmanager
def _process(command: list[str], port: int, environment: Mapping[str, str], seconds: float = 90.0) -> Iterator[None]:
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + seconds
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} does not listen on port {port} (exit code {process.poll()})")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
