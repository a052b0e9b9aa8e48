"""`durable demo`: what a newcomer sees in under a minute.

A Postgres, a worker command on three queues and a beat; an order is parked until its payment; every Python file of the
standard library becomes a task; in the middle a worker process is killed with -9 in front of the user, and another
one while the order's parcels are packed; at the end everything was processed all the same.
Works in its own schema, made anew each time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from durable import AsyncResult
from durable.errors import DurableError
from durable.instance import Snapshot
from durable.sql import quote_identifier
from durable.storage import instances
from durable.storage.session import single
from durable_cli import demo_checkout
from durable_cli.demo_tasks import TOP, app, index_file, summarise
from durable_cli.output import print_json

KILL_AT = 0.35
"""Share of the files after which a worker process is killed."""
CHUNK = 100
PATIENCE = 300.0


@click.command()
@click.option("--files", "limit", type=click.IntRange(10, 100_000), help="Index at most this many files.")
@click.option("-c", "--concurrency", type=click.IntRange(2, 64), default=2, help="Worker processes for the files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; the story goes to stderr.")
def demo(limit: int | None, concurrency: int, as_json: bool) -> None:
    """Index the standard library on real workers, and kill one of them on the way."""
    console = Console(highlight=False, stderr=as_json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped then too
    sources = _sources(limit)
    where = "the database of DURABLE_DSN" if not app.database.embedded else "an embedded Postgres"
    console.print(f"[bold]durable demo[/]: {len(sources)} Python files of the standard library, one task each\n")
    version = _fresh_schema()
    console.print(f"  {where}, PostgreSQL {version}, schema {app.schema}")
    queues = f"files:{concurrency},parcels:2,summary:1"
    with tempfile.TemporaryDirectory(prefix="durable-demo-") as folder, _cluster(Path(folder), queues) as pids:
        console.print(f"  durable worker -Q {queues}   (pid {pids[0]})")
        console.print(f"  durable beat   (pid {pids[1]})\n")
        checkout = demo_checkout.order(console)
        started = time.monotonic()
        results = app.insert_many([(index_file, {"args": (str(path),)}) for path in sources])
        console.print(f"  {len(results)} tasks inserted in {time.monotonic() - started:.2f} s\n")
        victim = _watch(console, results)
        seconds = time.monotonic() - started
        total = _aggregate(results)
        figures = _report(console, results, total, victim, seconds)
        figures["checkout"] = demo_checkout.ship(console, checkout, lambda: _kill_one(console, "parcels"))
        _what_next(console, results[0].id, checkout.id)
    app.close()
    if as_json:
        print_json(figures)


def _library() -> Path:
    return Path(os.__file__).resolve().parent


def _sources(limit: int | None) -> list[Path]:
    root = _library()
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    found = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    return found[:limit]


def _fresh_schema() -> str:
    """Drop and make the demo's schema; return the server's version."""
    with psycopg.connect(app.database.dsn(), autocommit=True) as connection:
        connection.execute("SET client_min_messages = warning")
        connection.execute(f"DROP SCHEMA IF EXISTS {quote_identifier(app.schema)} CASCADE")
        version = connection.info.parameter_status("server_version") or "?"
    app.migrate()
    return version.split()[0]


@contextmanager
def _cluster(folder: Path, queues: str) -> Iterator[tuple[int, int]]:
    """Run a worker command and a beat; both are gone afterwards, whatever happened."""
    base = [sys.executable, "-m", "durable_cli", "-A", "durable_cli.demo_tasks"]
    commands = (["worker", "-Q", queues], ["beat"])
    slots = sum(int(queue.partition(":")[2]) for queue in queues.split(","))
    logs = [folder / "worker.log", folder / "beat.log"]
    processes = []
    try:
        for arguments, log in zip(commands, logs, strict=True):
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [*base, *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        # A terminal's Ctrl-C is ours: we stop them in order.
                        start_new_session=True,
                    )
                )
        _wait_for_workers(processes, logs, slots)
        yield processes[0].pid, processes[1].pid
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_workers(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], count: int) -> None:
    until = time.monotonic() + 30
    while len(_workers()) < count:
        for process, log in zip(processes, logs, strict=True):
            if process.poll() is not None or time.monotonic() > until:
                tail = log.read_text(errors="replace")[-2000:]
                raise DurableError(f"{process.args[4:]!r} did not start; it said:\n{tail}")  # type: ignore[index]
        time.sleep(0.05)


def _workers() -> list[tuple[int, int, str]]:
    """Return (worker id, pid, queue) of the live worker processes."""
    rows = app.run(single("workers"))
    return [(row[0], row[4], row[5]) for row in rows if row[1] == "worker" and row[10]]


def _watch(console: Console, results: Sequence[AsyncResult[Any]]) -> int | None:
    """Show progress until every file is done; kill a worker process on the way."""
    waiting = {result.id for result in results}
    victim: int | None = None
    columns = (TextColumn("  indexing"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    until = time.monotonic() + PATIENCE
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("files", total=len(results))
        while waiting:
            finished: list[Snapshot] = app.run(instances.finished(sorted(waiting)))
            waiting -= {snapshot.id for snapshot in finished}
            progress.update(bar, completed=len(results) - len(waiting))
            if victim is None and len(waiting) < len(results) * (1 - KILL_AT):
                victim = _kill_one(progress.console, "files")
            if time.monotonic() > until:
                raise DurableError(f"{len(waiting)} files were not indexed within {PATIENCE:.0f} s")
            time.sleep(0.05)
    return victim


def _kill_one(console: Console, queue: str) -> int | None:
    """Kill the worker process of a queue that holds most with -9; return its pid."""
    found = [row for row in app.run(single("workers")) if row[1] == "worker" and row[5] == queue and row[10]]
    if not found:
        return None
    pid, busy = max(((row[4], row[11]) for row in found), key=lambda entry: entry[1])
    os.kill(int(pid), signal.SIGKILL)
    console.print(f"  [bold red]kill -9 {pid}[/]   a worker process dies with {busy} claimed {queue}")
    return int(pid)


def _aggregate(results: Sequence[AsyncResult[Any]]) -> dict[str, Any]:
    """Sum the indexes up with tasks of the other queue, and return the sum."""
    indexes = [result.result for result in results if result.successful()]
    with app.batch():
        partial = [summarise.delay(indexes[at : at + CHUNK]) for at in range(0, len(indexes), CHUNK)]
    return summarise.delay([result.get(timeout=60) for result in partial]).get(timeout=60)


def _report(
    console: Console, results: Sequence[AsyncResult[Any]], total: dict[str, Any], victim: int | None, seconds: float
) -> dict[str, Any]:
    """Print how it ended, and return the figures. Raises DurableError when anything was lost or doubled."""
    done, doubled, twice, moved = app.run(single("executions", {"queue": "files"}))[0]
    console.print(
        f"\n  [bold green]{done} of {len(results)} files processed, {len(results) - done} lost, "
        f"{doubled} committed twice[/]"
    )
    if victim is not None:
        console.print(
            f"  {twice} started twice (the killed process was in the middle of it); "
            f"{moved} waited in a buffer and went to another process"
        )
    console.print(f"  {done / seconds:.0f} files per second, {seconds:.1f} s in all")
    imports = sorted(total["imports"].items(), key=lambda item: -item[1])[:TOP]
    console.print(
        f"\n  {total['lines']:,} lines, {total['functions']:,} functions, {total['classes']:,} classes; most imported: "
        + ", ".join(name for name, _ in imports)
    )
    if done != len(results) or doubled:
        raise DurableError(f"{len(results) - done} files lost, {doubled} committed twice: this should never happen")
    return {
        "files": len(results),
        "done": done,
        "committed_twice": doubled,
        "started_twice": twice,
        "handed_on": moved,
        "killed": victim,
        "seconds": round(seconds, 3),
        "totals": {name: total[name] for name in ("lines", "functions", "classes", "unparsable")},
    }


def _what_next(console: Console, task: int, machine: int) -> None:
    console.print("\nWhat to type next:")
    commands = [
        ("durable -A durable_cli.demo_tasks list --limit 5", "what is in the history now"),
        (f"durable -A durable_cli.demo_tasks show {task}", "everything about one task"),
        (f"durable -A durable_cli.demo_tasks show {machine}", "and about the order, with its children"),
    ]
    if app.database.embedded:
        view = "TABLE durable_demo.instance_view LIMIT 3"
        commands.append((f"durable server psql -c '{view}'", "it is only Postgres"))
    for command, what in commands:
        console.print(f"  {command}\n      {what}", soft_wrap=True)
    console.print("  ... and the ten-line tasks file in README.md")
