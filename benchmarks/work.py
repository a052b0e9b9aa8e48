"""What a run took in work, which a shared machine's noise hardly changes: pages touched, CPU of server and workers."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from benchmarks.database import Database


@contextmanager
def counted(database: Database, count: int) -> Iterator[dict[str, float]]:
    """Yield what holds, after the block, the work for each of `count` rows.

    Pages that the server touched, and microseconds of CPU of all its processes and of the child processes of this
    one that ended within the block.
    """
    spent: dict[str, float] = {}
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    workers = children.ru_utime + children.ru_stime
    pages, server = _pages(database), server_cpu(database)
    yield spent
    time.sleep(1.0)  # the last sessions end, and tell of their pages
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent["pages of the server per row"] = (_pages(database) - pages) / count
    spent["us CPU of the server per row"] = (server_cpu(database) - server) * 1e6 / count
    spent["us CPU of the workers per row"] = (children.ru_utime + children.ru_stime - workers) * 1e6 / count


def server_cpu(database: Database) -> float:
    """Return the CPU seconds of every process that the server has had so far."""
    with psycopg.connect(database.dsn) as connection:
        postmaster = _stat(connection.info.backend_pid)[1]
    ticks = sum(_stat(postmaster)[11:15])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = _stat(int(folder.name))
        except OSError:
            continue
        ticks += sum(stat[11:13]) if stat[1] == postmaster else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[int]:
    """The numbers of /proc/PID/stat behind the state; [1] the parent, [11:15] the times (the first is put as 0)."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return [0, *map(int, fields[1:])]


def _pages(database: Database) -> int:
    """Pages that were touched so far, by sessions that have ended or told of it."""
    with psycopg.connect(database.dsn) as connection:
        row = connection.execute(
            "SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    return int(row[0]) if row else 0
