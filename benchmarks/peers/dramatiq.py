"""Dramatiq, on either broker, with its results in Redis."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks import stamps
from benchmarks.peers.base import RABBITMQ, REDIS, RedisResults

THREADS = 8


class _Dramatiq(RedisResults):
    """Results are keys."""

    setting = f"{THREADS} threads a process, results in Redis"
    share = 0.1
    forks = True

    def __init__(self) -> None:
        import dramatiq
        from dramatiq.results import Results
        from dramatiq.results.backends import RedisBackend

        super().__init__()
        self.broker = self.make_broker()
        self.broker.add_middleware(Results(backend=RedisBackend(url=self.results), store_results=True))
        dramatiq.set_broker(self.broker)

        @dramatiq.actor(actor_name="noop")
        def noop() -> int:
            return 0

        @dramatiq.actor(actor_name="stamp")
        def stamp(sent: int) -> int:
            stamps.stamp(sent)
            return 0

        self.noop, self.stamp = noop, stamp

    def make_broker(self) -> Any:
        """Return the broker."""
        raise NotImplementedError

    def prepare(self) -> None:
        from redis import Redis

        with Redis.from_url(os.environ["BENCH_REDIS"]) as client:
            client.flushall()
        self.broker.flush_all()

    def fill(self, count: int) -> None:
        for _ in range(count):
            self.noop.send()

    def pace(self, count: int, interval: float) -> None:
        for _ in range(count):
            self.stamp.send(time.monotonic_ns())
            time.sleep(interval)

    def work(self, processes: int) -> None:
        os.environ["BENCH_DRAMATIQ"] = type(self).__name__
        command = ["-m", "dramatiq", "benchmarks.peers.dramatiq_app:broker"]
        options = ["--processes", str(processes), "--threads", str(THREADS)]
        os.execv(sys.executable, [sys.executable, *command, *options])


class DramatiqRedis(_Dramatiq):
    """With Redis as broker."""

    name = "dramatiq (redis)"
    distributions = ("dramatiq", "redis")
    servers = (REDIS,)

    def make_broker(self) -> Any:
        from dramatiq.brokers.redis import RedisBroker

        return RedisBroker(url=f"{os.environ['BENCH_REDIS']}/0")


class DramatiqRabbitmq(_Dramatiq):
    """With RabbitMQ as broker."""

    name = "dramatiq (rabbitmq)"
    distributions = ("dramatiq", "redis", "pika")
    servers = (REDIS, RABBITMQ)

    def make_broker(self) -> Any:
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        return RabbitmqBroker(url=os.environ["BENCH_RABBITMQ"])


KINDS = {kind.__name__: kind for kind in (DramatiqRedis, DramatiqRabbitmq)}
