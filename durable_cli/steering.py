"""`durable pause`, `resume`, `queues set`, `workers stop`, `workers reload`: orders, kept in the database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from durable.storage import control
from durable.storage.ageing import set_ageing
from durable.storage.session import Operation, run
from durable_cli.exits import USAGE, CommandError
from durable_cli.output import print_json, say
from durable_cli.session import Session, connected, database_options
from durable_cli.values import AGEING, CONCURRENCY, NAME, QUEUE, REASON


@click.command()
@click.argument("queues", nargs=-1, required=True, metavar="QUEUE...", type=QUEUE)
@click.option("--reason", type=REASON, help="Shown with the queue.")
@database_options
@click.pass_obj
def pause(session: Session, queues: Sequence[str], reason: str | None) -> None:
    """Have no step of these queues begin until they are resumed.

    What runs goes on to its end; what is only claimed goes back to the queue.
    """
    _order(session, queues, lambda queue: control.pause(queue, reason), "paused", "paused already")


@click.command()
@click.argument("queues", nargs=-1, required=True, metavar="QUEUE...", type=QUEUE)
@database_options
@click.pass_obj
def resume(session: Session, queues: Sequence[str]) -> None:
    """Have paused queues worked off again."""
    _order(session, queues, control.resume, "resumed", "not paused")


@click.command("set")
@click.argument("queues", nargs=-1, required=True, metavar="QUEUE...", type=QUEUE)
@click.option(
    "--concurrency", type=CONCURRENCY, metavar="N|auto",
    help="Worker processes in each command that serves it; auto: as each was started.",
)  # fmt: skip
@click.option(
    "--ageing", type=AGEING, metavar="SECONDS|off",
    help="After how long a waiting row joins the best priority that waits there; off: never.",
)  # fmt: skip
@database_options
@click.pass_obj
def set_queue(
    session: Session, queues: Sequence[str], concurrency: int | str | None, ageing: float | str | None
) -> None:
    """Set what holds for queues, in commands that run and in those that start later."""
    if concurrency is None and ageing is None:
        raise CommandError("give --concurrency or --ageing", USAGE)
    if concurrency is not None:
        wanted = None if isinstance(concurrency, str) else concurrency
        said = "as each command was started" if wanted is None else f"{wanted} processes per command"
        _order(session, queues, lambda queue: control.set_concurrency(queue, wanted), said, f"{said} already")
    if ageing is not None:
        after = None if isinstance(ageing, str) else ageing
        said = "priorities do not age" if after is None else f"rows go first after {after:g} s"
        _order(session, queues, lambda queue: set_ageing(queue, after), said, f"{said} already")


@click.command()
@click.argument("name", type=NAME)
@database_options
@click.pass_obj
def stop(session: Session, name: str) -> None:
    """Ask the worker commands of a name, on whatever host, to drain and end, as SIGTERM does."""
    _ask(session, name, "stop")


@click.command()
@click.argument("name", type=NAME)
@database_options
@click.pass_obj
def reload(session: Session, name: str) -> None:
    """Ask the worker commands of a name, on whatever host, to drain and start afresh, as SIGHUP does."""
    _ask(session, name, "reload")


def _ask(session: Session, name: str, what: str) -> None:
    app = session.database()
    with connected(app) as connection:
        asked = run(connection, app.sql, control.ask(name, what))
        for wakeup in app.wakeups.orders():
            run(connection, app.sql, wakeup)
    if not asked:
        raise CommandError(f"no worker of the name {name!r} is alive; `durable workers` shows their names")
    if session.as_json:
        print_json([{"worker": name, "host": host, "pid": pid, "asked": what} for host, pid in asked])
        return
    for host, pid in asked:
        say(f"{name} (pid {pid} on {host}) is asked to {what}")


def _order(
    session: Session, queues: Sequence[str], order: Callable[[str], Operation[bool]], done: str, no_change: str
) -> None:
    app = session.database()
    reports: list[dict[str, Any]] = []
    with connected(app) as connection:
        for queue in queues:
            changed = run(connection, app.sql, order(queue))
            reports.append({"queue": queue, "changed": changed, "outcome": done if changed else no_change})
        for wakeup in app.wakeups.orders():
            run(connection, app.sql, wakeup)
    if session.as_json:
        print_json(reports)
        return
    for report in reports:
        say(f"{report['queue']}: {report['outcome']}")
