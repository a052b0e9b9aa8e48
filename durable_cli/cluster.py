"""`durable status`, `queues`, `workers`: what the cluster looks like now."""

from __future__ import annotations

from collections.abc import Iterable

import click

from durable.instance import STATUSES
from durable.storage import inspection
from durable.storage.inspection import QueueState, Totals, WorkerState
from durable.storage.session import run
from durable_cli.output import error_line, heading, print_json, print_pairs, print_table, say
from durable_cli.run import place
from durable_cli.session import Session, ask, connected, database_options
from durable_cli.values import INTERVAL
from durable_cli.watching import NUMBERS, QUEUE_COLUMNS, RECENT, queue_rows, watch

_WORKER_NUMBERS = ("pid", "busy", "id")


@click.group(invoke_without_command=True)
@database_options
@click.pass_context
def queues(ctx: click.Context) -> None:
    """Show what waits and runs in each queue, or set how it is served."""
    if ctx.invoked_subcommand is not None:
        return
    session: Session = ctx.obj
    found = ask(session.database(), inspection.queues())
    if session.as_json:
        print_json([state._asdict() for state in found])
    elif found:
        _print_queues(found)
    else:
        say("no queue has instances or workers")


@click.group(invoke_without_command=True)
@database_options
@click.pass_context
def workers(ctx: click.Context) -> None:
    """Show worker processes and beats, or ask worker commands to end."""
    if ctx.invoked_subcommand is not None:
        return
    session: Session = ctx.obj
    found = ask(session.database(), inspection.processes())
    if session.as_json:
        print_json([state._asdict() for state in found])
    elif found:
        _print_workers(found)
    else:
        say("no worker and no beat runs")


@click.command()
@click.option(
    "--watch", "interval", is_flag=False, flag_value="2", type=INTERVAL, metavar="[SECONDS]",
    help="Go on looking: a live page, or with --json or no terminal one JSON document a line.",
)  # fmt: skip
@database_options
@click.pass_obj
def status(session: Session, interval: float | None) -> None:
    """Show one page on everything."""
    app = session.database()
    if interval is not None:
        watch(session, app, interval)
        return
    with connected(app) as connection:
        facts = run(connection, app.sql, inspection.server())
        totals = run(connection, app.sql, inspection.totals())
        queue_states = run(connection, app.sql, inspection.queues())
        processes = run(connection, app.sql, inspection.processes())
        failures = run(connection, app.sql, inspection.recent_failures(RECENT))
    beats = [state for state in processes if state.kind == "beat"]
    worker_states = [state for state in processes if state.kind == "worker"]
    database = place(app, facts.database)
    if session.as_json:
        print_json(
            {
                "database": database,
                "schema": app.schema,
                "server_version": facts.version,
                "totals": {name: totals.counts.get(name, 0) for name in STATUSES},
                "estimated": [name for name in STATUSES if name in totals.estimated],
                "queues": [state._asdict() for state in queue_states],
                "workers": [state._asdict() for state in worker_states],
                "beats": [state._asdict() for state in beats],
                "recent_failures": [failure._asdict() for failure in failures],
            }
        )
        return
    print_pairs(
        [
            ("database", f"{database} (PostgreSQL {facts.version})"),
            ("schema", app.schema),
            ("instances", ", ".join(_counted(totals)) or "none"),
            ("workers", _commands(worker_states) or "none: nothing runs; start `durable worker`"),
            ("beats", _commands(beats) or "none: scheduled instances may start a second late; start `durable beat`"),
        ]
    )
    if queue_states:
        heading("Queues")
        _print_queues(queue_states)
    if failures:
        heading("Latest failures")
        print_table(
            ("id", "task", "failed", "error"),
            [(failure.id, failure.machine, failure.finished_at, error_line(failure.error)) for failure in failures],
            ("id",),
        )


def _counted(totals: Totals) -> Iterable[str]:
    for name in STATUSES:
        if name in totals.counts:
            sign = "" if name not in totals.estimated else "~" if name == "done" else "over "
            yield f"{sign}{totals.counts[name]:,} {name}"


def _commands(states: Iterable[WorkerState]) -> str:
    """Processes by the name of their command: `shop@host (4 processes)`."""
    counts: dict[str, list[bool]] = {}
    for state in states:
        counts.setdefault(state.name, []).append(state.alive)
    parts = []
    for name, alive in counts.items():
        silent = len(alive) - sum(alive)
        processes = f"{len(alive)} process{'' if len(alive) == 1 else 'es'}"
        parts.append(f"{name} ({processes}{f', {silent} silent' if silent else ''})")
    return ", ".join(parts)


def _print_queues(states: Iterable[QueueState]) -> None:
    print_table(QUEUE_COLUMNS, queue_rows(states), NUMBERS)


def _print_workers(states: Iterable[WorkerState]) -> None:
    rows = [
        (
            state.id,
            state.kind,
            state.name,
            state.host,
            state.pid,
            state.queue,
            state.busy,
            state.started_at,
            "yes" if state.alive else "silent",
        )
        for state in states
    ]
    print_table(("id", "kind", "name", "host", "pid", "queue", "busy", "started", "alive"), rows, _WORKER_NUMBERS)
