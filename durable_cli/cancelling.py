"""`durable cancel`: by id or correlation key, a report each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from durable import Durable
from durable.storage import instances
from durable.storage.session import Connection, run, run_repeatedly
from durable_cli.exits import FAILED, USAGE, CommandError
from durable_cli.output import (
    print_json,
    say,
)
from durable_cli.session import Session, connected, database_options
from durable_cli.values import (
    KEY,
    REASON,
    TARGET,
    lines_of_stdin,
    target,
)


@click.command()
@click.argument("targets", nargs=-1, metavar="ID|KEY...", type=TARGET)
@click.option("--key", "keys", multiple=True, type=KEY, help="A correlation key, even one that looks like an id.")
@click.option("--reason", type=REASON, help="Kept with the instance.")
@click.option("--cascade", is_flag=True, help="Its children and theirs too.")
@click.option("--terminate", is_flag=True, help="Kill the worker process that runs its step.")
@database_options
@click.pass_context
def cancel(
    ctx: click.Context,
    targets: Sequence[int | str],
    keys: Sequence[str],
    reason: str | None,
    cascade: bool,
    terminate: bool,
) -> None:
    """Cancel instances by id or correlation key; `-` reads them from stdin, one a line.

    A waiting one ends at once, an executing one when its step ends (or is killed). Exit code 1 if one could not be
    cancelled.
    """
    session: Session = ctx.obj
    wanted: list[tuple[int | str, bool]] = [(key, True) for key in keys]
    for entry in targets:
        wanted += [(read, isinstance(read, str)) for read in (lines_of_stdin(target) if entry == "-" else (entry,))]
    if not wanted:
        raise CommandError("give ids or correlation keys, or `-` to read them from stdin", USAGE)
    app = session.database()
    failed = False
    with connected(app) as connection:
        why = reason or "cancelled"
        reports = (_cancel_one(app, connection, entry, by_key, why, cascade, terminate) for entry, by_key in wanted)
        if session.as_json:
            seen = list(reports)
            print_json(seen)
            failed = not all(report["cancelled"] for report in seen)
        else:
            for report in reports:
                failed |= not report["cancelled"]
                say(f"{report['target']}: {report['outcome']}")
    ctx.exit(FAILED if failed else 0)


def _cancel_one(
    app: Durable, connection: Connection, wanted: int | str, by_key: bool, reason: str, cascade: bool, terminate: bool
) -> dict[str, Any]:
    report: dict[str, Any] = {"target": wanted, "id": None if by_key else wanted, "cancelled": False}
    if by_key:
        report["id"] = run(connection, app.sql, instances.occupant(str(wanted)))
        if report["id"] is None:
            return {**report, "outcome": "no live instance has this key"}
    mark, begun = None, None
    if cascade:
        mark, begun = run_repeatedly(
            connection, app.sql, lambda: instances.begin_cascade(report["id"], reason, terminate)
        )
    done = run_repeatedly(connection, app.sql, lambda: instances.cancel(report["id"], reason, cascade, terminate, mark))
    if begun is not None:
        done = begun.also(done)
    killing = app.wakeups.terminations() if terminate and done.running else []
    for wakeup in (*app.wakeups.became_ready(done.woken), *killing):
        run(connection, app.sql, wakeup)
    found = run(connection, app.sql, instances.snapshot(report["id"]))
    if found is None:
        return {**report, "outcome": "not found"}
    if not done.found:
        return {**report, "outcome": f"finished already: {found.status}"}
    if not done.itself:
        outcome = f"finished already: {found.status}; what lived of its children is cancelled"
        return {**report, "cancelled": True, "outcome": outcome}
    if found.status == "cancelled":
        return {**report, "cancelled": True, "outcome": "cancelled"}
    outcome = "is killed, and then cancelled" if terminate else "will be cancelled when its step ends"
    return {**report, "cancelled": True, "outcome": outcome}
