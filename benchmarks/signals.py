"""Signals per second to parked instances, until the last of them has woken and is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg

from benchmarks import floor
from benchmarks.database import Database, wait_for_count
from benchmarks.figures import FLOOR, OURS, Measure, Target, interleave_many
from benchmarks.registry import Size
from benchmarks.workers import cluster
from durable import Durable

SENDERS = 8
BATCH = 100
SENT, DONE = "signals sent", "signals sent, their targets woken and done"
DELIVER = """
WITH stored AS (
    INSERT INTO {schema}.signals (target_id, name, payload_type, payload) VALUES (%(id)s, 'wake', 'json', '1')
    RETURNING id, target_id
)
UPDATE {schema}.instances AS i SET status = 'runnable', inbox = stored.id, eligible_at = clock_timestamp()
FROM stored WHERE i.id = stored.target_id"""


def of_floor(database: Database, processes: int, parked: int) -> Mapping[str, float]:
    """Return the floor's figures: one statement per signal from eight connections, then a drain of the woken rows."""
    database.fill(parked, "sleeper", "start")
    database.value("WITH p AS (UPDATE {schema}.instances SET status = 'awaiting_signal', awaits = '{wake}') SELECT 1")
    ids = list(database.value("SELECT array_agg(id) FROM {schema}.instances"))

    def send(part: list[int]) -> None:
        statement = DELIVER.format(schema=database.schema).encode()
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            for target in part:
                connection.execute(statement, {"id": target}, prepare=True)

    began = time.monotonic()
    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(send, [ids[at::SENDERS] for at in range(SENDERS)]))
    sent = time.monotonic() - began
    drained = database.finished_after(floor.run(database, processes))
    database.check(parked, machine="sleeper")
    return {SENT: parked / sent, DONE: parked / (sent + drained)}


def one_by_one(app: Durable, ids: list[int]) -> None:
    """Send from as many threads as the floor."""
    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(lambda target: app.signal(target, "wake", 1), ids))


def in_batches(app: Durable, ids: list[int]) -> None:
    """Send hundreds at a time from one thread."""
    for at in range(0, len(ids), BATCH):
        app.signal_many({"target": target, "name": "wake", "payload": 1} for target in ids[at : at + BATCH])


def of_ours(
    database: Database, processes: int, parked: int, send: Callable[[Durable, list[int]], Any]
) -> Mapping[str, float]:
    """Return our figures: a worker is up and everything is parked when the first signal is sent."""
    with cluster(database, processes) as (app, known):
        app.conf.pool_size = SENDERS
        database.empty()
        ids = [result.id for result in app.insert_many([(known["sleeper"], {})] * parked)]
        wait_for_count(database, parked, "awaiting_signal")
        began, clock = time.monotonic(), database.clock()
        send(app, ids)
        sent = time.monotonic() - began
        wait_for_count(database, parked)
        seconds = database.finished_after(clock)
        database.check(parked, 2, "1", "sleeper")
    return {SENT: parked / sent, DONE: parked / seconds}


def signals(database: Database, size: Size) -> list[Measure]:
    """Wake parked instances by `signal` from eight threads and by `signal_many` in hundreds."""
    eight, many = f"{OURS}, {SENDERS} senders", f"{OURS}, signal_many"
    measures = []
    for processes in size.processes:
        found = interleave_many(
            size.runs,
            {
                FLOOR: partial(of_floor, database, processes, size.count),
                eight: partial(of_ours, database, processes, size.count, one_by_one),
                many: partial(of_ours, database, processes, size.count, in_batches),
            },
        )
        measures += [
            Measure(f"{what}, {size.count:,} parked", "signals/s", series, [Target(many, 5000)] if what == DONE else [])
            for what, series in found.items()
        ]
    return measures
