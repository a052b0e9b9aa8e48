"""A proxy in front of Postgres that counts statements and round trips, exactly and on any server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

_SYNC = (b"Q", b"S", b"H", b"c")
"""Query, Sync, Flush, CopyDone: after each of them the client waits for an answer."""
_CHUNK = 65_536


class Wire:
    """Passes connections on to the server of a DSN, and counts what clients send.

    Args:
        dsn: Where the server is. Clients connect to `self.dsn` instead.
    """

    def __init__(self, dsn: str) -> None:
        with psycopg.connect(dsn) as connection:
            self._host, self._port = connection.info.host, connection.info.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self.statements: Counter[str] = Counter()
        self.round_trips = 0
        # Nothing that would hide the protocol from the proxy.
        self.dsn = psycopg.conninfo.make_conninfo(
            dsn, host="127.0.0.1", port=self._listener.getsockname()[1], sslmode="disable", gssencmode="disable"
        )
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no further connections."""
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept(), which close() would not
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _connect(self) -> socket.socket:
        if not self._host.startswith("/"):
            return socket.create_connection((self._host, self._port))
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(f"{self._host}/.s.PGSQL.{self._port}")
        return upstream

    def _serve(self, client: socket.socket) -> None:
        with client, self._connect() as upstream:
            threading.Thread(target=_pump, args=(upstream, client), daemon=True).start()
            reader = Reader()
            while data := _received(client):
                statements, round_trips = reader.read(data)
                with self._lock:
                    self.statements.update(statements)
                    self.round_trips += round_trips
                upstream.sendall(data)
            with contextlib.suppress(OSError):
                upstream.shutdown(socket.SHUT_WR)


class Reader:
    """Follows what one client sends: which statement each Execute runs, and where the client waits."""

    def __init__(self) -> None:
        self._pending = b""
        self._started = False
        self._prepared: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}

    def read(self, data: bytes) -> tuple[list[str], int]:
        """Take the next bytes of the stream.

        Returns:
            The texts of the statements in them, and the number of round trips.
        """
        self._pending += data
        statements: list[str] = []
        round_trips = 0
        while len(self._pending) >= 5:
            # The first message has no type.
            length = int.from_bytes(self._pending[self._started : 4 + self._started], "big") + self._started
            if len(self._pending) < length:
                break
            kind, body = self._pending[:1], self._pending[5:length]
            if self._started:
                statements += self._statement(kind, body)
                round_trips += kind in _SYNC
            self._started, self._pending = True, self._pending[length:]
        return statements, round_trips

    def _statement(self, kind: bytes, body: bytes) -> Iterator[str]:
        if kind == b"Q":
            yield body.rstrip(b"\0").decode(errors="replace")
        elif kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            self._prepared[name] = text.decode(errors="replace")
        elif kind == b"B":
            portal, name, _ = body.split(b"\0", 2)
            self._portals[portal] = self._prepared.get(name, "")
        elif kind == b"E":
            yield self._portals[body.split(b"\0", 1)[0]]


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_CHUNK)
    except OSError:  # the other side's end of the connection closed both
        return b""


def _pump(source: socket.socket, to: socket.socket) -> None:
    while data := _received(source):
        try:
            to.sendall(data)
        except OSError:  # the client is gone
            return
    with contextlib.suppress(OSError):
        to.shutdown(socket.SHUT_WR)


@contextmanager
def wire(dsn: str) -> Iterator[Wire]:
    """A counting proxy, closed afterwards."""
    made = Wire(dsn)
    try:
        yield made
    finally:
        made.close()
