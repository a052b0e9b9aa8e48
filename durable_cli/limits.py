"""`durable limits list|set|reset`: what limits there are, what they govern now; changing them while workers run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from durable import ConcurrencyLimit, Durable, RateLimit
from durable.errors import ConfigError, NotFoundError
from durable.limits import limit_name
from durable.storage import limits as storage
from durable.storage.limits import CONCURRENCY, RATE, Limit, LimitUse
from durable.storage.session import run, run_repeatedly
from durable.validation import near
from durable_cli.exits import USAGE, CommandError
from durable_cli.output import print_json, print_table, say
from durable_cli.session import Session, ask, connected, database_options
from durable_cli.values import Checked

_PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RATE = re.compile(r"([0-9]{1,7})/([0-9]*\.?[0-9]*)([smhd])")


def _rate(text: str) -> tuple[int, float]:
    match = _RATE.fullmatch(text)
    if match is None or match[2] == ".":
        raise ValueError(f"{text!r} is no rate like 10/s, 100/60s, 5/m, 1000/h")
    return int(match[1]), float(match[2] or 1) * _PERIODS[match[3]]


LIMIT = Checked("name", limit_name)
RATE_VALUE = Checked("rate", _rate)
kind_option = click.option(
    "--kind", type=click.Choice([RATE, CONCURRENCY]), help="Which, where a rate and a concurrency limit share a name."
)


@click.group(invoke_without_command=True)
@click.pass_context
def limits(ctx: click.Context) -> None:
    """Rate limits and concurrency limits: see them, set them while workers run."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@limits.command("list")
@database_options
@click.pass_obj
def list_(session: Session) -> None:
    """Show every limit, who set it, and what it governs now."""
    found = ask(session.database(), storage.use())
    if session.as_json:
        print_json([state._asdict() for state in found])
    elif found:
        columns = ("name", "kind", "limit", "burst", "shards", "set by", "in use", "executing", "waiting")
        print_table(columns, [_row(state) for state in found], ("burst", "shards", "in use", "executing", "waiting"))
    else:
        say("no limits; an app configures them, or `durable limits set`")


def _row(state: LimitUse) -> tuple[Any, ...]:
    rate = state.kind == RATE
    waiting = f"{storage.MOST_COUNTED:,}+" if state.waiting >= storage.MOST_COUNTED else state.waiting
    return (
        state.name,
        state.kind,
        f"{state.allowed:,} in {state.period:g} s" if rate else f"{state.allowed:,} per key",
        state.burst,
        state.shards,
        "hand" if state.pinned else "app",
        f"{state.in_use} {'buckets' if rate else 'keys'}",
        None if rate else state.executing,
        waiting,
    )


@limits.command("set")
@click.argument("name", type=LIMIT)
@click.option("--rate", type=RATE_VALUE, metavar="N/PERIOD", help="Tokens in a period: 10/s, 100/60s, 5/m, 1000/h.")
@click.option("--burst", type=int, metavar="N", help="Tokens at once; else those of a period.")
@click.option("--concurrency", type=int, metavar="N", help="Executing instances of each key of this name.")
@click.option("--shards", type=int, default=1, show_default=True, help="Parts, for limits so busy that claims meet.")
@database_options
@click.pass_obj
def set_(
    session: Session,
    name: str,
    rate: tuple[int, float] | None,
    burst: int | None,
    concurrency: int | None,
    shards: int,
) -> None:
    """Set a rate limit or a concurrency limit. Apps leave it alone until `durable limits reset`.

    Workers follow at their next claim. A lowered concurrency limit interrupts nobody: it waits for slots to come back.
    """
    if (rate is None) == (concurrency is None):
        raise CommandError("give --rate or --concurrency", USAGE)
    if burst is not None and rate is None:
        raise CommandError("--burst belongs to --rate", USAGE)
    try:
        limit: Limit = (
            RateLimit(*rate, burst, shards) if rate is not None else ConcurrencyLimit(concurrency or 0, shards)
        )
    except ConfigError as error:
        raise CommandError(str(error), USAGE) from None
    kind = storage.kind_of(limit)
    app = session.database()
    with connected(app) as connection:
        ready = run_repeatedly(connection, app.sql, lambda: storage.put({(kind, name): limit}, pin=True))
        for wakeup in app.wakeups.promoted(ready):
            run(connection, app.sql, wakeup)
    _tell(session, kind, name, "set; apps leave it alone until `durable limits reset`")


@limits.command()
@click.argument("name", type=LIMIT)
@kind_option
@database_options
@click.pass_obj
def reset(session: Session, name: str, kind: str | None) -> None:
    """Give a limit back to the app: its value if the app has one, else the limit is deleted.

    Without an app at hand (--dsn) it keeps its value until an app that has one starts.
    """
    app = session.database()
    with connected(app) as connection:
        there = [row for row in run(connection, app.sql, storage.read()) if row.name == name]
        found = [row.kind for row in there if kind in (None, row.kind)]
        if not found:
            known = {row.name for row in run(connection, app.sql, storage.read())}
            raise NotFoundError(f"there is no {kind or ''} limit {name!r}".replace("  ", " ") + near(name, known))
        if len(found) > 1:
            raise CommandError(f"{name!r} is a rate and a concurrency limit: say which with --kind", USAGE)
        kind = found[0]
        configured = app.limit_rows.configured
        ready: Mapping[str, int] = {}
        run(connection, app.sql, storage.unpin(kind, name))
        if (kind, name) in configured:
            ready = run_repeatedly(connection, app.sql, lambda: storage.put({(kind, name): configured[kind, name]}))
            outcome = "as the app has it"
        elif _has_tasks(app):
            _, ready = run_repeatedly(connection, app.sql, lambda: storage.drop(kind, name))
            outcome = "deleted: the app has none of that name"
        else:
            outcome = "kept until an app that has one starts"
        for wakeup in app.wakeups.promoted(dict(ready)):
            run(connection, app.sql, wakeup)
    _tell(session, kind, name, outcome)


def _has_tasks(app: Durable) -> bool:
    """Whether this is an app and not only a database."""
    return bool(app.limit_rows.configured or app.tasks or app.machines)


def _tell(session: Session, kind: str, name: str, outcome: str) -> None:
    if session.as_json:
        print_json({"kind": kind, "name": name, "outcome": outcome})
    else:
        say(f"{kind} limit {name!r}: {outcome}")
