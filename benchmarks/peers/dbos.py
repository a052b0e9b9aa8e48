"""DBOS Transact for Python."""

from __future__ import annotations

import signal
import time
from typing import Any

from benchmarks import stamps
from benchmarks.peers.base import STEPS, PostgresPeer

QUEUE = "bench"
CONCURRENCY = 100


class Dbos(PostgresPeer):
    """Workflows are rows that stay, with a row per step."""

    name = "dbos"
    setting = f"queue, worker concurrency {CONCURRENCY}, polled each 50 ms, results kept"
    distributions = ("dbos",)
    share = 0.03
    chains = True
    FINISHED = (
        "SELECT count(*), min(updated_at) / 1000.0, max(updated_at) / 1000.0 FROM dbos.workflow_status"
        " WHERE status = 'SUCCESS' AND queue_name IS NOT NULL"
    )

    @property
    def url(self) -> str:
        """Return the DSN as SQLAlchemy reads it."""
        from urllib.parse import quote

        from psycopg.conninfo import conninfo_to_dict

        given = conninfo_to_dict(self.dsn)
        user = quote(str(given.get("user", "postgres")))
        port = given.get("port") or 5432
        return f"postgresql+psycopg://{user}@/{given['dbname']}?host={quote(str(given['host']))}&port={port}"

    def _launch(self) -> Any:
        import dbos

        dbos.DBOS(
            config={
                "name": "bench",
                "system_database_url": self.url,
                "application_version": "1",
                "log_level": "ERROR",
                "sys_db_pool_size": 20,
            }
        )

        @dbos.DBOS.workflow(name="noop")
        def noop() -> None: ...

        @dbos.DBOS.workflow(name="stamp")
        def stamp(sent: int) -> None:
            stamps.stamp(sent)

        @dbos.DBOS.step(name="one")
        def one(n: int) -> int:
            return n

        @dbos.DBOS.workflow(name="chain")
        def chain() -> None:
            for n in range(STEPS):
                one(n)

        dbos.DBOS.launch()
        dbos.DBOS.register_queue(QUEUE, worker_concurrency=CONCURRENCY, polling_interval_sec=0.05)
        return dbos.DBOS

    def _client(self) -> Any:
        import dbos

        return dbos.DBOSClient(system_database_url=self.url)

    def prepare(self) -> None:
        self._launch().destroy()

    def _enqueue(self, count: int, workflow: str, interval: float = 0.0, stamped: bool = False) -> None:
        client = self._client()
        options = {"queue_name": QUEUE, "workflow_name": workflow, "app_version": "1"}
        for _ in range(count):
            client.enqueue(options, *([time.monotonic_ns()] if stamped else []))
            if interval:
                time.sleep(interval)
        client.destroy()

    def fill(self, count: int) -> None:
        self._enqueue(count, "noop")

    def fill_chains(self, count: int) -> None:
        self._enqueue(count, "chain")

    def pace(self, count: int, interval: float) -> None:
        self._enqueue(count, "stamp", interval, stamped=True)

    def work(self, processes: int) -> None:
        self._launch()
        signal.pause()
