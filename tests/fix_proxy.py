"""A proxy in front of Postgres that counts the queries that go through it, and can fall silent."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import psycopg
import pytest

_QUERIES = (b"Q", b"E")  # the protocol's Query and Execute


class CountingProxy:
    """Accepts connections for `dsn`, at an address of ours, and passes everything on to the server that it names."""

    def __init__(self, dsn: str, address: str = "127.0.0.1") -> None:
        self._to = psycopg.conninfo.conninfo_to_dict(dsn)
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                proxy._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

        self._server = Server((address, 0), Handler)
        self._counted = 0
        self._live: set[socket.socket] = set()
        self._silent: set[socket.socket] = set()
        self._swallow_new = False
        self._lock = threading.Lock()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def dsn(self) -> str:
        """Where to connect instead."""
        host, port = self._server.server_address[:2]
        # Nothing that would hide the protocol from us.
        return psycopg.conninfo.make_conninfo(
            **{**self._to, "host": str(host), "port": port, "sslmode": "disable", "gssencmode": "disable"}
        )

    @property
    def queries(self) -> int:
        """How many queries went through, of all connections."""
        with self._lock:
            return self._counted

    @property
    def open(self) -> int:
        """How many connections are open."""
        with self._lock:
            return len(self._live)

    def silence(self, *, new: bool = False) -> int:
        """Swallow what either end of the open connections sends from now on, and keep them open.

        new  connections that are made from now on are accepted and silent, too
        """
        with self._lock:
            self._swallow_new = new
            self._silent |= self._live
            return len(self._silent)

    def speak(self) -> None:
        """Serve connections that are made from now on; the silent ones stay silent."""
        with self._lock:
            self._swallow_new = False

    def _is_silent(self, client: socket.socket) -> bool:
        with self._lock:
            return client in self._silent

    def close(self) -> None:
        """Accept no more connections."""
        self._server.shutdown()
        self._server.server_close()

    def _connect(self) -> socket.socket:
        host, port = str(self._to.get("host") or "127.0.0.1"), int(self._to.get("port") or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(f"{host}/.s.PGSQL.{port}")
        return upstream

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._live.add(client)
            if self._swallow_new:
                self._silent.add(client)
        with self._connect() as upstream:
            threading.Thread(target=self._pump, args=(upstream, client), daemon=True).start()
            started, pending = False, b""
            while data := _received(client):
                if self._is_silent(client):
                    continue
                upstream.sendall(data)
                pending += data
                while len(pending) >= 5:
                    # The first message has no type.
                    length = int.from_bytes(pending[1:5] if started else pending[:4], "big") + started
                    if len(pending) < length:
                        break
                    if started and pending[:1] in _QUERIES:
                        with self._lock:
                            self._counted += 1
                    started, pending = True, pending[length:]
            _end(upstream)  # else the thread that reads it waits on, and keeps the session
        with self._lock:
            self._live.discard(client)
            self._silent.discard(client)
        _end(client)

    def _pump(self, upstream: socket.socket, client: socket.socket) -> None:
        try:
            while data := _received(upstream):
                if not self._is_silent(client):
                    client.sendall(data)
        except OSError:
            pass  # its other end is gone: so is this one
        if not self._is_silent(client):
            _end(client)


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except OSError:
        return b""


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it had ended already
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def counting_proxy(database: str) -> Iterator[CountingProxy]:
    """A counting proxy in front of this test process's database."""
    proxy = CountingProxy(database)
    yield proxy
    proxy.close()
