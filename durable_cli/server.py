"""`durable server`: the embedded Postgres. It runs as long as somebody holds it; `start` is such a somebody."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from dataclasses import asdict

import click

from durable.embedded import Server
from durable.runtime.shared import Bell
from durable_cli.exits import FAILED, CommandError
from durable_cli.output import flush, note, print_json, print_pairs, say
from durable_cli.session import Session, plain_options

LOOK_EVERY = 0.5


@click.group(invoke_without_command=True)
@click.pass_context
def server(ctx: click.Context) -> None:
    """The embedded Postgres, which serves apps that have no DSN."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@server.command()
@plain_options
@click.pass_obj
def start(session: Session) -> None:
    """Start or join it and hold it until Ctrl-C; prints its DSN."""
    embedded = Server()
    dsn = embedded.ensure()
    pid = embedded.status().pid
    if session.as_json:
        print_json({"dsn": dsn, "pid": pid})
    else:
        say(dsn)
        note("The embedded server runs until Ctrl-C, and 10 s beyond its last user.")
    flush()
    try:
        _hold(embedded, pid)
    finally:
        embedded.release()


def _hold(embedded: Server, pid: int | None) -> None:
    """Return when told to stop. Raises CommandError when the server ends before."""
    bell = Bell()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: bell.ring())
    poll = select.poll()
    poll.register(bell.reader, select.POLLIN)
    while not poll.poll(LOOK_EVERY * 1000):
        if pid is not None and not _alive(pid):
            pid = embedded.status().pid  # a user may have started it again
            if pid is None:
                raise CommandError("the embedded server was stopped", FAILED)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@server.command()
@click.option(
    "--mode", type=click.Choice(["smart", "fast", "immediate"]), default="fast", show_default=True,
    help="Wait for sessions to end; end them; or leave a recovery to the next start.",
)  # fmt: skip
@plain_options
@click.pass_obj
def stop(session: Session, mode: str) -> None:
    """Stop it, whoever started it."""
    embedded = Server()
    in_use = embedded.status().holders
    if in_use:
        note("Warning: other processes use the server; those that reconnect start it again")
    stopped = embedded.stop(mode)
    if session.as_json:
        print_json({"stopped": stopped, "in_use": in_use})
    else:
        say("stopped" if stopped else "it was not running")


@server.command()
@plain_options
@click.pass_obj
def status(session: Session) -> None:
    """Show whether and where it runs."""
    embedded = Server()
    seen = embedded.status()
    document = {**asdict(seen), "dsn": embedded.dsn()}
    if session.as_json:
        print_json(document)
    else:
        print_pairs((name.replace("_", " "), None if value is None else str(value)) for name, value in document.items())


@server.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
@click.pass_context
def psql(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Run psql on it, with any arguments of psql."""
    embedded = Server()
    embedded.ensure()
    argv, environment = embedded.psql_argv("durable", arguments)
    # A child, not exec: this process holds the server meanwhile. Ctrl-C is psql's own, to cancel a query.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = subprocess.call(argv, env=environment, preexec_fn=_default_interrupt)
    finally:
        embedded.release()
    ctx.exit(code if code >= 0 else 128 - code)


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
