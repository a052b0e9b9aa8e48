"""A TCP proxy in front of the server's socket that can be told to be a bad network. Runs in a thread of its own."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from pathlib import Path

import psycopg

# CommandComplete of what writes: its answer is the one that hurts.
_WRITTEN = re.compile(rb"C\0\0\0.(?:COMMIT|INSERT 0|UPDATE|DELETE)", re.S)


class Proxy:
    """Passes connections on to the server that `dsn` names.

    latency   seconds that each chunk is kept back, either way
    swallow   how many answers to writes are still to be lost, with their connections
    touched   chunks that a fault was done to, and connections that were cut
    """

    def __init__(self, dsn: str) -> None:
        self._given = psycopg.conninfo.conninfo_to_dict(dsn)
        self._socket = Path(str(self._given["host"])) / f".s.PGSQL.{self._given['port']}"
        self.latency = 0.0
        self.swallow = 0
        self.touched = 0
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._port = 0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True, name="proxy")
        self._thread.start()
        ready.wait()

    @property
    def port(self) -> int:
        return self._port

    def half_open(self, on: bool) -> None:
        """Stop to read and write, both sockets stay; or go on."""
        self._loop.call_soon_threadsafe(self._flowing.clear if on else self._flowing.set)

    def cut(self) -> int:
        """Reset every connection, both sides; return how many."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    def close(self) -> None:
        """End everything."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))

    async def _cut(self) -> int:
        pairs = list(self._pairs)
        for pair in pairs:
            self._reset(pair)
        self.touched += len(pairs)
        return len(pairs)

    def _reset(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self._pairs.discard(pair)
        for writer in pair:
            raw = writer.get_extra_info("socket")
            if raw is not None and raw.family == socket.AF_INET and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            answers, server = await asyncio.open_unix_connection(self._socket)
        except OSError:
            client.transport.abort()
            return
        pair = (client, server)
        self._pairs.add(pair)
        await asyncio.gather(self._pump(reader, server, pair, False), self._pump(answers, client, pair, True))

    async def _pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        answers: bool,
    ) -> None:
        try:
            while data := await source.read(65536):
                if not self._flowing.is_set():
                    self.touched += 1
                    await self._flowing.wait()
                if self.latency:
                    self.touched += 1
                    await asyncio.sleep(self.latency)
                if answers and self.swallow and _WRITTEN.search(data):
                    self.swallow -= 1
                    self.touched += 1
                    break
                target.write(data)
                await target.drain()
        except OSError:
            pass  # one end is gone: so is the other
        self._reset(pair)
