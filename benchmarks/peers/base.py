"""What a peer is to the benchmarks: how it is installed, filled, worked and counted, at its documented best setting.

Everything of a peer runs in processes of its own (`python -m benchmarks.peers NAME ACTION`), so that the benchmark
itself imports none of them. Servers are found in the environment: BENCH_POSTGRES, BENCH_REDIS, BENCH_RABBITMQ.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

import psycopg

POSTGRES, REDIS, RABBITMQ = "postgres", "redis", "rabbitmq"
STEPS = 5


@dataclass(frozen=True)
class Finished:
    """How many tasks ended well, and when the first and the last did, in seconds of one clock.

    before  how many had ended by `first`, if that is only when somebody looked
    """

    count: int
    first: float
    last: float
    before: int = 0

    def rate(self) -> float:
        """Return how many ended per second. Raises ValueError when too few did after the first look."""
        if self.last <= self.first or 2 * self.before >= self.count:
            raise ValueError(f"{self.count} tasks that end in one moment tell no rate: take more")
        return (self.count - self.before) / (self.last - self.first)


class Peer(ABC):
    """One system on the benchmark's tasks.

    name           as printed
    setting        what it is run with, printed beside its figure
    distributions  what has to be installed, the first one's version is printed
    servers        what it needs
    share          of the fastest peer's number of tasks, so that runs last about as long
    forks          whether one command makes as many processes as it is told
    chains         whether it has five-step work
    look           seconds between two looks at how many finished: a count of rows costs, and needs no exact moment
    """

    name: ClassVar[str]
    setting: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    servers: ClassVar[tuple[str, ...]] = (POSTGRES,)
    share: ClassVar[float] = 1.0
    forks: ClassVar[bool] = False
    chains: ClassVar[bool] = False
    look: ClassVar[float] = 0.25

    @classmethod
    def missing(cls) -> str:
        """Return which distributions are not installed; empty when all are."""
        return ", ".join(name for name in cls.distributions if installed(name) is None)

    @classmethod
    def described(cls) -> str:
        """Return version and setting."""
        return f"{installed(cls.distributions[0])}; {cls.setting}"

    @abstractmethod
    def prepare(self) -> None:
        """Make its tables in an empty database, or its queues."""

    @abstractmethod
    def fill(self, count: int) -> None:
        """Enqueue no-op tasks, as fast as it can."""

    @abstractmethod
    def pace(self, count: int, interval: float) -> None:
        """Enqueue `count` tasks that stamp, `interval` seconds apart."""

    @abstractmethod
    def work(self, processes: int) -> None:
        """Work until killed; `processes` is 1 unless it forks."""

    @abstractmethod
    def finished(self) -> Finished:
        """Count what ended well."""

    def fill_chains(self, count: int) -> None:
        """Enqueue work of STEPS steps; each counts as one that finished."""
        raise NotImplementedError(f"{self.name} has no steps")


class PostgresPeer(Peer):
    """A peer whose tasks end as rows: FINISHED selects their number, and first and last time as seconds since 1970."""

    FINISHED: ClassVar[str]

    @property
    def dsn(self) -> str:
        """Return the database that is its own."""
        return os.environ["BENCH_POSTGRES"]

    def finished(self) -> Finished:
        """Count rows."""
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute(self.FINISHED.encode()).fetchone()
        assert row is not None, "an aggregate has a row"
        return Finished(int(row[0]), float(row[1] or 0), float(row[2] or 0))


class RedisResults(Peer):
    """A peer whose results are keys of a Redis database, which expire later than anybody looks."""

    look = 0.01

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    @property
    def results(self) -> str:
        """Return the URL of the database that holds nothing but results."""
        return f"{os.environ['BENCH_REDIS']}/1"

    def finished(self) -> Finished:
        """Count keys; the first time is when some were first seen."""
        from redis import Redis

        with Redis.from_url(self.results) as client:
            count = int(client.dbsize())
        now = time.monotonic()
        if count and self._first is None:
            self._first = (now, count)
        first, before = self._first or (now, 0)
        return Finished(count, first, now, before)


def installed(distribution: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return None


async def paced(count: int, interval: float, send: object) -> None:
    """Await `send(monotonic nanoseconds)` `count` times, `interval` seconds apart."""
    import asyncio

    assert callable(send)
    for _ in range(count):
        await send(time.monotonic_ns())
        await asyncio.sleep(interval)
