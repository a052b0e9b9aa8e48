"""`durable doctor --fix`: rows that contradict each other, as nothing of ours leaves them, are mended."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from durable import Durable
from durable.storage import doctor as looks
from durable.storage.doctor import Damage
from durable.storage.session import Connection, run, run_repeatedly
from durable_cli.exits import USAGE, CommandError
from durable_cli.surroundings import ERROR, WARNING, Finding

SLACK = 60.0
"""Seconds beyond the settings' that reapers and collectors get before they are missed."""
FIX = "durable doctor --fix"


def damage(app: Durable, connection: Connection) -> Damage:
    """Return the rows that contradict each other."""
    return run(connection, app.sql, looks.damage(app.conf.retention, 2 * app.conf.gc_interval + SLACK))


def findings(found: Damage) -> Iterator[Finding]:
    """Yield what is wrong with rows, and that it can be mended."""
    if found.parents:
        lost = found.parents[0]
        cause = f"{counted(len(found.parents), lost.id)} report to a parent that is gone ({lost.parent_id})"
        yield Finding(WARNING, "lost parent", cause, f"{FIX}: they then report to nobody")
    if found.barriers:
        barrier, others = found.barriers[0], _others(found.barriers)
        cause = f"instance {barrier.id}{others} waits for {barrier.pending} children, and {barrier.unfinished} are left"
        yield Finding(ERROR, "wrong barrier", cause, f"{FIX}: they are counted again")
    if found.unheard:
        row, others = found.unheard[0], _others(found.unheard)
        cause = f"instance {row.id}{others} is not shown {row.signals} of its signals"
        yield Finding(ERROR, "unheard signal", cause, f"{FIX}: it is shown them")
    if found.letters:
        cause = f"{found.letters:,} signals are for instances that are over, or gone (id {found.addressee})"
        remedy = f"start a beat or a worker with gc=True, or {FIX}: they are deleted"
        yield Finding(WARNING, "dead letters", cause, remedy)


def repair(app: Durable, connection: Connection, *, yes: bool) -> list[dict[str, Any]]:
    """Mend what is found, after asking unless `yes`; return what was done. Raises CommandError when it can't ask."""
    found = damage(app, connection)
    causes = [finding.cause for finding in findings(found)]
    if not causes:
        return []
    what = f"repair what is wrong: {'; '.join(causes)}"
    where = f"schema {app.schema!r}, database {connection.info.dbname!r}"
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise CommandError(f"this would {what} ({where}); say --yes to do it", USAGE)
        click.confirm(f"{what[0].upper()}{what[1:]} ({where})?", abort=True, err=True)
    done = run_repeatedly(connection, app.sql, lambda: looks.repair(found))
    for wakeup in app.wakeups.became_ready(done.ready):
        run(connection, app.sql, wakeup)
    reports = [
        _report("reports to nobody any more", done.detached),
        _report("children counted again", done.recounted),
        _report("shown its signals", done.heard),
    ]
    if done.deleted:
        reports.append({"repair": "signals of what is over deleted", "ids": [], "count": done.deleted})
    return [report for report in reports if report["count"]]


def _report(repair: str, ids: Sequence[int]) -> dict[str, Any]:
    return {"repair": repair, "ids": list(ids), "count": len(ids)}


def _others(rows: Sequence[object]) -> str:
    return f" (and {len(rows) - 1:,} more like it)" if rows[1:] else ""


def counted(count: int, example: int) -> str:
    """Return `3 instances (id 7)`."""
    return f"{count:,} instance{'' if count == 1 else 's'} (id {example})"
