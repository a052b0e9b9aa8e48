"""How long after its enqueueing a task starts: it sends both times to a socket that the benchmark reads.

The clock is the machine's monotonic one, which all its processes share.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

VARIABLE = "BENCH_STAMPS"
_sender: socket.socket | None = None


def stamp(sent: int) -> None:
    """Tell the benchmark that what was enqueued at `sent` (monotonic nanoseconds) starts now."""
    global _sender
    now = time.monotonic_ns()
    if _sender is None:
        _sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        _sender.connect(os.environ[VARIABLE])
    _sender.send(b"%d %d" % (sent, now))


class Stamps:
    """Where stamps arrive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)

    @property
    def environment(self) -> dict[str, str]:
        """Return what processes that stamp need."""
        return {VARIABLE: str(self.path)}

    def take(self, count: int, seconds: float = 30.0) -> list[float]:
        """Return `count` waits in milliseconds. Raises TimeoutError when nothing came for `seconds`."""
        self._socket.settimeout(seconds)
        waits = []
        for _ in range(count):
            sent, now = self._socket.recv(64).split()
            waits.append((int(now) - int(sent)) / 1e6)
        return waits

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@contextmanager
def stamps() -> Iterator[Stamps]:
    """A place for stamps, removed afterwards."""
    with TemporaryDirectory(prefix="durable-stamps-") as home:
        Path(home).chmod(0o755)
        place = Stamps(Path(home) / "stamps")
        try:
            yield place
        finally:
            place.close()
