"""`durable schedules list|enable|disable|run`: periodic work as it stands in the database."""

from __future__ import annotations

import re
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import click

from durable.storage import schedules as stored
from durable.storage.schedules import Listed
from durable.storage.session import run, run_repeatedly
from durable_cli.exits import FAILED, CommandError
from durable_cli.output import print_json, print_table, say
from durable_cli.session import Session, ask, connected, database_options
from durable_cli.values import SCHEDULE


@click.group()
def schedules() -> None:
    """Periodic work: see it, switch it on and off, run it now."""


@schedules.command("list")
@database_options
@click.pass_obj
def list_(session: Session) -> None:
    """Show every schedule, with its next occurrence in its own time zone."""
    found = ask(session.database(), stored.listing())
    if session.as_json:
        print_json([entry._asdict() for entry in found])
    elif found:
        columns = ("name", "runs", "when", "zone", "next", "last", "instance", "misfire", "overlap", "fired", "skipped")
        print_table(columns, [_row(entry) for entry in found], ("instance", "fired", "skipped"))
    else:
        say("no schedule is declared; a beat or a worker declares those of its app when it starts")


@schedules.command()
@click.argument("name", type=SCHEDULE)
@database_options
@click.pass_obj
def enable(session: Session, name: str) -> None:
    """Switch a schedule on; it begins with its next occurrence."""
    _switch(session, name, True)


@schedules.command()
@click.argument("name", type=SCHEDULE)
@database_options
@click.pass_obj
def disable(session: Session, name: str) -> None:
    """Switch a schedule off, until it is enabled again."""
    _switch(session, name, False)


@schedules.command("run")
@click.argument("name", type=SCHEDULE)
@database_options
@click.pass_obj
def run_(session: Session, name: str) -> None:
    """Insert a schedule's instance now; its next occurrence stays as it is."""
    app = session.database()
    with connected(app) as connection:
        ran = run_repeatedly(connection, app.sql, lambda: stored.run_by_hand(name))
        if ran is None:
            raise _unknown(name)
        instance_id, new = ran
        if instance_id is None:
            raise CommandError(f"correlation key {new.correlation_key!r} is occupied; nothing was inserted", FAILED)
        for wakeup in app.wakeups.after_insert((new,)):
            run(connection, app.sql, wakeup)
    if session.as_json:
        print_json({"schedule": name, "id": instance_id})
    else:
        say(f"{name}: instance {instance_id}")


def _switch(session: Session, name: str, enabled: bool) -> None:
    app = session.database()
    with connected(app) as connection:
        changed = run_repeatedly(connection, app.sql, lambda: stored.switch(name, enabled))
        if changed is None:
            raise _unknown(name)
        for wakeup in app.wakeups.due_sooner():
            run(connection, app.sql, wakeup)
    state = "enabled" if enabled else "disabled"
    if session.as_json:
        print_json({"schedule": name, "enabled": enabled, "changed": changed})
    else:
        say(f"{name}: {state}" if changed else f"{name}: {state} already")


def _unknown(name: str) -> CommandError:
    return CommandError(f"no schedule {name!r}; `durable schedules list` shows those there are", FAILED)


def _row(entry: Listed) -> tuple[Any, ...]:
    return (
        entry.name,
        entry.machine,
        _when(entry.schedule),
        entry.tz,
        _local(entry.next_at, entry.tz) if entry.enabled else "disabled",
        _local(entry.last_at, entry.tz),
        entry.last_id,
        entry.misfire,
        entry.overlap,
        entry.fired,
        entry.skipped,
    )


def _when(text: str) -> str:
    match = re.fullmatch(r"every (\d+) us", text)
    return f"every {int(match[1]) / 1_000_000:g} s" if match else text


def _local(moment: datetime | None, tz: str) -> str | None:
    if moment is None:
        return None
    try:
        zone: tzinfo = ZoneInfo(tz)
    except (KeyError, ValueError, OSError):  # one that this machine does not know: another's may
        return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    return f"{moment.astimezone(zone):%Y-%m-%d %H:%M:%S}"
