"""What a worker command with nothing to do costs, with and without instances that are parked on signals."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from benchmarks.database import Database, wait_for_count
from benchmarks.figures import OURS, Measure, Target, interleave_many
from benchmarks.processes import cpu_seconds, family
from benchmarks.registry import Size
from benchmarks.workers import producer, worker

PARKED = 10_000
NOBODY, EMPTY, WAITING = "nobody connected", OURS, f"{OURS}, parked on signals"
CPU, QUERIES = "CPU of an idle worker command", "transactions of an idle worker command"
WATCHES = 3
"""How often it is watched again when a process of it was replaced meanwhile: a machine that was suspended, say."""
SETTLE = 20.0
"""Seconds after which a command's start is no longer in what is counted: a process that was busy compares once what it
holds (reconcile_interval, fifteen), and a session that fell idle adds what it did to the server's statistics after ten
(PGSTAT_IDLE_INTERVAL)."""


def run(database: Database, seconds: int, processes: int, parked: int, *, nobody: bool = False) -> Mapping[str, float]:
    """Return percent of a core and transactions per second."""
    database.fill(0)
    if nobody:
        return {QUERIES: _transactions(database, seconds)}
    with worker(database, processes) as command:
        if parked:
            with producer(database) as (app, known):
                app.insert_many([(known["sleeper"], {})] * parked)
            wait_for_count(database, parked, "awaiting_signal")
        time.sleep(SETTLE)
        for _ in range(WATCHES):
            pids = family(command.pid)
            before = cpu_seconds(pids)
            transactions = _transactions(database, seconds)
            now = family(command.pid)
            if now == pids:
                return {CPU: 100 * (cpu_seconds(pids) - before) / seconds, QUERIES: transactions}
    raise RuntimeError(
        f"processes of the idle command came or went in each of {WATCHES} watches, in the last from {pids} to {now}"
    )


def _transactions(database: Database, seconds: int) -> float:
    query = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    before = database.value(query)
    time.sleep(seconds)
    return float(database.value(query) - before) / seconds


def idle(database: Database, size: Size) -> list[Measure]:
    """Watch a worker command that has nothing to do: its CPU, and its transactions (each one query)."""
    measures = []
    for processes in size.processes:
        found = interleave_many(
            size.runs,
            {
                NOBODY: partial(run, database, size.count, processes, 0, nobody=True),
                EMPTY: partial(run, database, size.count, processes, 0),
                WAITING: partial(run, database, size.count, processes, PARKED),
            },
        )
        units = {CPU: ("% of a core", 0.3), QUERIES: ("per second", 2.0)}
        measures += [
            Measure(
                f"{what}, {processes} children",
                units[what][0],
                series,
                [Target(name, units[what][1], None, True) for name in (EMPTY, WAITING)],
            )
            for what, series in sorted(found.items())
        ]
    return measures
