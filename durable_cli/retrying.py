"""`durable retry`: failed instances go on from their failed step, a report each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from durable import Durable
from durable.errors import DuplicateError
from durable.storage import instances
from durable.storage.session import Connection, run
from durable_cli.exits import FAILED, USAGE, CommandError
from durable_cli.output import print_json, say
from durable_cli.session import Session, connected, database_options
from durable_cli.values import Checked, instance_id, lines_of_stdin

_INSTANCE = Checked("id", lambda text: text if text == "-" else instance_id(text))


@click.command()
@click.argument("ids", nargs=-1, metavar="ID...", type=_INSTANCE)
@database_options
@click.pass_context
def retry(ctx: click.Context, ids: Sequence[int | str]) -> None:
    """Have failed instances go on from their failed step, under the same id; `-` reads ids from stdin, one a line.

    Attempts begin again; the step is shown the signals it was shown before. Exit code 1 if one could not be retried.
    """
    session: Session = ctx.obj
    wanted: list[int] = []
    for entry in ids:
        wanted += [entry] if isinstance(entry, int) else lines_of_stdin(instance_id)
    if not wanted:
        raise CommandError("give ids of failed instances, or `-` to read them from stdin", USAGE)
    app = session.database()
    failed = False
    with connected(app) as connection:
        try:
            reports = (_retry_one(app, connection, entry) for entry in wanted)
            if session.as_json:
                seen = list(reports)
                print_json(seen)
                failed = not all(report["retried"] for report in seen)
            else:
                for report in reports:
                    failed |= not report["retried"]
                    say(f"{report['id']}: {report['outcome']}")
        finally:
            app.close()
    ctx.exit(FAILED if failed else 0)


def _retry_one(app: Durable, connection: Connection, wanted: int) -> dict[str, Any]:
    report: dict[str, Any] = {"id": wanted, "retried": False}
    try:
        if app.retry(wanted):
            return {**report, "retried": True, "outcome": "goes on"}
    except DuplicateError as error:
        return {**report, "outcome": f"not retried: {error}"}
    found = run(connection, app.sql, instances.snapshot(wanted))
    return {**report, "outcome": "not found" if found is None else f"not failed: {found.status}"}
