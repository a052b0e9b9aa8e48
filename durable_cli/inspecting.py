"""`durable inspect`: what each worker process runs, what it holds besides, what each command can run.

All of it from the database, and so of workers on any host. What a process runs only it knows: its agent tells it with
each heartbeat, and at once when asked by notification.
"""

from __future__ import annotations

import time
from typing import Any

import click

from durable import Durable
from durable.storage import inspection, maintenance
from durable.storage.session import Connection, run
from durable_cli.output import note, print_json, print_table, say
from durable_cli.session import Session, connected, database_options
from durable_cli.values import NAME

PATIENCE = 1.0
"""Seconds that agents get to answer."""


@click.command()
@click.argument("what", type=click.Choice(["active", "reserved", "registered"]))
@click.option("--worker", type=NAME, metavar="NAME", help="Of worker commands of this name only.")
@database_options
@click.pass_obj
def inspect(session: Session, what: str, worker: str | None) -> None:
    """Show what workers run now (active), have claimed but not begun (reserved), or can run (registered)."""
    app = session.database()
    with connected(app) as connection:
        if what == "registered":
            _registered(session, run(connection, app.sql, inspection.registered(worker)))
            return
        if not _asked(app, connection):
            note("Warning: not every worker process answered; what those run is as of their last heartbeat")
        held = run(connection, app.sql, inspection.held_by_workers(worker))
    found = [row for row in held if (row.since is not None) == (what == "active")]
    if session.as_json:
        print_json([row._asdict() for row in found])
    elif found:
        columns = ("worker", "host", "pid", "queue", "id", "task", "step", "attempt", "since", "as of")
        print_table(columns, found, ("pid", "id", "attempt"))
    else:
        say("no worker runs a step" if what == "active" else "no worker has claimed more than it runs")


def _asked(app: Durable, connection: Connection) -> bool:
    """Ask the agents, and wait until all have answered; return whether they have."""
    asked = run(connection, app.sql, maintenance.now())
    for wakeup in app.wakeups.inspection():
        run(connection, app.sql, wakeup)
    until = time.monotonic() + PATIENCE
    while not (answered := run(connection, app.sql, inspection.told_since(asked))) and time.monotonic() < until:
        time.sleep(0.02)
    return answered


def _registered(session: Session, found: list[inspection.Registered]) -> None:
    if session.as_json:
        print_json([row._asdict() for row in found])
        return
    rows: list[tuple[Any, ...]] = [
        (row.worker, row.host, row.pid, ", ".join(row.queues), task) for row in found for task in row.tasks or [""]
    ]
    if rows:
        print_table(("worker", "host", "pid", "queues", "task"), rows, ("pid",))
    else:
        say("no worker runs")
