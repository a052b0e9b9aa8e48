"""Celery, on either broker, with its results in Redis."""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

from benchmarks import stamps
from benchmarks.pace import pace
from benchmarks.peers.base import RABBITMQ, REDIS, STEPS, RedisResults

PREFETCH = 128


class _Celery(RedisResults):
    """Results are keys; nothing is durable in Redis but its snapshots."""

    setting = f"prefork, prefetch multiplier {PREFETCH}, gossip, mingle and heartbeat off, results in Redis"
    share = 0.05
    forks = True
    chains = True
    broker: ClassVar[str]

    def __init__(self) -> None:
        import celery

        super().__init__()
        self.app = celery.Celery("bench", broker=self.url, backend=self.results)
        self.app.conf.worker_prefetch_multiplier = PREFETCH
        self.app.conf.broker_connection_retry_on_startup = True

        @self.app.task(name="noop")
        def noop(*given: Any) -> None: ...

        @self.app.task(name="stamp")
        def stamp(sent: int) -> None:
            stamps.stamp(sent)

        @self.app.task(name="work")
        def work(sent: int) -> None:
            time.sleep(0.001)
            stamps.stamp(sent)

        self.noop, self.stamp, self.work_task = noop, stamp, work

    @property
    def url(self) -> str:
        """Return the broker's URL."""
        raise NotImplementedError

    def prepare(self) -> None:
        from redis import Redis

        with Redis.from_url(os.environ["BENCH_REDIS"]) as client:
            client.flushall()
        with self.app.connection_for_write() as connection:
            self.app.amqp.queues["celery"](connection.default_channel).declare()
        self.app.control.purge()

    def fill(self, count: int) -> None:
        with self.app.producer_pool.acquire(block=True) as producer:
            for _ in range(count):
                self.noop.apply_async(producer=producer)

    def fill_chains(self, count: int) -> None:
        from celery import chain

        for _ in range(count):
            chain(*[self.noop.si()] * STEPS).apply_async()

    def pace(self, count: int, interval: float) -> None:
        for _ in range(count):
            self.stamp.delay(time.monotonic_ns())
            time.sleep(interval)

    def steady(self, rate: float, seconds: float, begin: float) -> None:
        """Enqueue 1 ms tasks as `benchmarks.pace` does."""
        pace(self.work_task.delay, rate, seconds, begin)

    def work(self, processes: int) -> None:
        options = ["-P", "prefork", "-c", str(processes), "-l", "ERROR"]
        self.app.worker_main(["worker", *options, "--without-gossip", "--without-mingle", "--without-heartbeat"])


class CeleryRedis(_Celery):
    """With Redis as broker."""

    name = "celery (redis)"
    distributions = ("celery", "redis")
    servers = (REDIS,)

    @property
    def url(self) -> str:
        return f"{os.environ['BENCH_REDIS']}/0"


class CeleryRabbitmq(_Celery):
    """With RabbitMQ as broker."""

    name = "celery (rabbitmq)"
    distributions = ("celery", "redis")
    servers = (REDIS, RABBITMQ)

    @property
    def url(self) -> str:
        return os.environ["BENCH_RABBITMQ"]
