"""Steps, children, latency and due times on a real worker command; one run each, figures by the database's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg

from benchmarks.database import Database, wait_for_count
from benchmarks.drain import start
from durable import Durable


@contextmanager
def cluster(database: Database, processes: int) -> Iterator[tuple[Durable, dict[str, Any]]]:
    """A worker command with a beat, the app that feeds it, and the definitions by name."""
    worker = start(database, processes, "-B")
    app = Durable("bench", dsn=database.dsn, schema=database.schema)
    try:
        yield app, database.definitions(app)
    finally:
        app.close()
        worker.terminate()
        worker.wait()


def steps(database: Database, processes: int, count: int) -> Mapping[str, float]:
    """Return steps per second of `count` five-step machines, through the picker and inline."""
    figures = {}
    with cluster(database, processes) as (app, known):
        known["noop"].delay().get(timeout=30)
        for name in ("plain_chain", "inline_chain"):
            database.empty()
            app.insert_many([(known[name], {})] * count)
            wait_for_count(database, count)
            figures[name] = 5 * count / database.elapsed()
    return figures


def fanout(database: Database, processes: int, children: int) -> float:
    """Return children per second of one parent, from its insert to its join."""
    with cluster(database, processes) as (app, known):
        known["noop"].delay().get(timeout=30)
        began = time.monotonic()
        joined = app.insert(known["fan"], kwargs={"n": children}).get(timeout=120)
        seconds = time.monotonic() - began
        if joined != children:
            raise RuntimeError(f"{joined} of {children} children were done at the join")
    return children / seconds


def signals(database: Database, processes: int, parked: int, senders: int = 8) -> Mapping[str, float]:
    """Return signals per second, from the first one sent to the last woken instance done.

    Once from `senders` threads calling `app.signal`, once from one that calls `signal_many` in hundreds.
    """
    figures = {}
    with cluster(database, processes) as (app, known):
        app.conf.pool_size = senders
        known["noop"].delay().get(timeout=30)
        for name in (f"{senders} senders", "signal_many"):
            database.empty()
            ids = [result.id for result in app.insert_many([(known["sleeper"], {})] * parked)]
            wait_for_count(database, parked, "awaiting_signal")
            began = time.monotonic()
            if name == "signal_many":
                for at in range(0, parked, 100):
                    app.signal_many({"target": target, "name": "wake", "payload": 1} for target in ids[at : at + 100])
            else:
                with ThreadPoolExecutor(senders) as pool:
                    list(pool.map(lambda target: app.signal(target, "wake", 1), ids))
            figures[f"{name}, sent"] = parked / (time.monotonic() - began)
            wait_for_count(database, parked)
            figures[f"{name}, woken and done"] = parked / (time.monotonic() - began)
    return figures


def latency(database: Database, processes: int, count: int = 200) -> Mapping[str, float]:
    """Return milliseconds: `delay().get()` at 20 a second, and how late a row due in 0.3 s is finished."""
    with cluster(database, processes) as (_, known):
        noop = known["noop"]
        noop.delay().get(timeout=30)
        waits = []
        for _ in range(count):
            began = time.monotonic()
            noop.delay().get(timeout=30)
            waits.append(1000 * (time.monotonic() - began))
            time.sleep(0.05)
        due = []
        for _ in range(40):
            due.append(noop.apply_async(countdown=0.3))
            time.sleep(0.1)
        for result in due:
            result.get(timeout=30)
        with psycopg.connect(database.dsn) as connection:
            late = connection.execute(
                f"SELECT 1000 * extract(epoch FROM finished_at - created_at - interval '0.3 s')::float8"
                f" FROM {database.schema}.history WHERE id = ANY (%s)",
                ([result.id for result in due],),
            ).fetchall()
    lateness = [row[0] for row in late]
    return {
        "delay().get() p50": statistics.median(waits),
        "delay().get() p99": statistics.quantiles(waits, n=100)[98],
        "due row finished after its time p50": statistics.median(lateness),
        "due row finished after its time max": max(lateness),
    }
