"""How long after its enqueueing a task starts: it sends both times to a socket that the benchmark reads.

The clock is the machine's monotonic one, which all its processes share.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
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
    """Where stamps arrive. A thread reads them as they come: the kernel keeps ten, and lets further senders wait."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self._waits: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while message := self._socket.recv(64):
            sent, now = message.split()
            self._waits.put((int(now) - int(sent)) / 1e6)

    @property
    def environment(self) -> dict[str, str]:
        """Return what processes that stamp need."""
        return {VARIABLE: str(self.path)}

    def take(self, count: int, seconds: float = 30.0) -> list[float]:
        """Return `count` waits in milliseconds. Raises queue.Empty when nothing came for `seconds`."""
        return [self._waits.get(timeout=seconds) for _ in range(count)]

    def drain(self, quiet: float = 0.3) -> int:
        """Forget what still comes, until nothing has for `quiet` seconds; return how many that were."""
        count = 0
        while True:
            try:
                self._waits.get(timeout=quiet)
            except queue.Empty:
                return count
            count += 1

    def close(self) -> None:
        """Read no more, and close the socket."""
        self._socket.shutdown(socket.SHUT_RD)
        self._reader.join()
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
