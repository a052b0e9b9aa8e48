"""A TCP proxy in front of the server's socket that can be told to be a bad network. Runs in a thread of its own."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg

# CommandComplete of what writes: its answer is the one that hurts.
_WRITTEN = re.compile(rb"C\0\0\0.(?:COMMIT|INSERT 0|UPDATE|DELETE)", re.S)


_TERMINATE = b"X\0\0\0\4"  # nobody waits for an answer to that
_NAME = re.compile(rb"application_name\0([^\0]*)\0")


@dataclass(eq=False)
class Link:
    """One connection, both sides of it.

    name          how the client calls itself
    silent        whether what it says is taken and passed on to nobody, in either direction
    lingers       seconds for which the server learns nothing of the client's end, once silent
    waited_since  time.monotonic() when the client said something that no answer came to
    closed        when the client gave it up
    """

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    name: str = ""
    silent: bool = False
    lingers: float = 0.0
    waited_since: float | None = None
    closed: float = 0.0

    def waited(self) -> float | None:
        """Seconds that the client waited for an answer; None: it was still waiting."""
        assert self.waited_since is not None, "asked of those who waited"
        return self.closed - self.waited_since if self.closed else None


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
        self._links: set[Link] = set()
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

    def silence(self, share: float, dice: random.Random, lingers: float) -> list[Link]:
        """Never answer again on a part of the connections there are (0: on one); return them."""

        async def chosen() -> list[Link]:
            links = sorted((link for link in self._links if link.name and not link.silent), key=lambda link: link.name)
            chosen = dice.sample(links, max(1, int(share * len(links)))) if links else []
            for link in chosen:
                link.silent, link.lingers = True, lingers
            return chosen

        return asyncio.run_coroutine_threadsafe(chosen(), self._loop).result(10)

    def reset(self, links: list[Link]) -> None:
        """Reset these, both sides."""
        for link in links:
            self._loop.call_soon_threadsafe(self._reset, link)

    async def _cut(self) -> int:
        links = list(self._links)
        for link in links:
            self._reset(link)
        self.touched += len(links)
        return len(links)

    def _reset(self, link: Link) -> None:
        self._links.discard(link)
        for writer in (link.client, link.server):
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
        link = Link(client, server)
        self._links.add(link)
        await asyncio.gather(self._pump(reader, server, link, False), self._pump(answers, client, link, True))

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, link: Link, answers: bool
    ) -> None:
        try:
            while data := await source.read(65536):
                if not answers and not link.name and (named := _NAME.search(data)):
                    link.name = named[1].decode(errors="replace")
                if not self._flowing.is_set():
                    self.touched += 1
                    await self._flowing.wait()
                if self.latency:
                    self.touched += 1
                    await asyncio.sleep(self.latency)
                if link.silent:
                    self.touched += 1
                    if not answers and link.waited_since is None and data != _TERMINATE:
                        link.waited_since = time.monotonic()
                    continue
                if answers and self.swallow and _WRITTEN.search(data):
                    self.swallow -= 1
                    self.touched += 1
                    break
                target.write(data)
                await target.drain()
        except OSError:
            pass  # one end is gone: so is the other
        if not answers:
            link.closed = time.monotonic()
        if link.silent and link in self._links:
            await asyncio.sleep(link.lingers)
        self._reset(link)
