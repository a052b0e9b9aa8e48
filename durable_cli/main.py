"""The group of all commands. START HERE: which commands there are, and how every one of them ends.

Errors that can happen end in one line on stderr and an exit code (exits.py); a traceback means a bug, or --debug.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import click
from click.shell_completion import get_completion_class

from durable import __version__
from durable_cli import (
    cancelling,
    checking,
    cluster,
    database,
    doctor,
    health,
    inspecting,
    instances,
    limits,
    retrying,
    run,
    schedules,
    server,
    steering,
)
from durable_cli.exits import EXPECTED, FAILED, INTERRUPTED, OK, explain
from durable_cli.output import clean, scrub
from durable_cli.session import Session, app_option, debug_option

PROGRAM = "durable"
COMPLETE = "_DURABLE_COMPLETE"

EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 wrong app, DSN, database or schema.
Shell completion: eval "$(_DURABLE_COMPLETE=bash_source durable)" in ~/.bashrc
(zsh_source, fish_source; or `durable completion SHELL` prints the script)."""


class Commands(click.Group):
    """Ends every command in order: errors in one line, stdout flushed, a closed pipe in silence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of registration, not of the alphabet."""
        return list(self.commands)

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit."""
        session = Session()
        extra.update(prog_name=PROGRAM, complete_var=COMPLETE, standalone_mode=False, obj=session)
        try:
            code = super().main(*args, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _forget_stdout()
            code = FAILED
        except click.Abort as aborted:
            interrupted = isinstance(aborted.__cause__, KeyboardInterrupt)
            _complain("Interrupted" if interrupted else "Aborted")
            code = INTERRUPTED if interrupted else FAILED
        except EXPECTED as error:
            message, code = explain(error)
            _complain(f"Error: {message}")
            if session.debug:
                _complain(traceback.format_exc(), lines=True)
            _forget_stdout(error)
        sys.exit(code if isinstance(code, int) else OK)


def _complain(text: str, *, lines: bool = False) -> None:
    with contextlib.suppress(OSError):
        click.echo(clean(scrub(text), lines=lines), err=True)


def _forget_stdout(error: BaseException | None = None) -> None:
    """Keep the interpreter from failing once more at exit with what could not be written."""
    if error is not None and not isinstance(error, OSError):
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@click.group(
    PROGRAM,
    cls=Commands,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@app_option
@debug_option
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Durable tasks on nothing but Postgres."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def demo(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """See it work: real input, real workers, one of them killed on the way."""
    # Imported when asked for: the demo makes its app on import, from settings that may be wrong.
    command: click.Command = importlib.import_module("durable_cli.demo").demo
    command.main(list(arguments), prog_name=f"{PROGRAM} demo", standalone_mode=False, obj=ctx.obj)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these three"
    click.echo(kind(cli, {}, PROGRAM, COMPLETE).source())


for _command in (
    run.worker, run.beat, database.migrate, server.server, demo,
    instances.call, instances.signal, instances.result, instances.show, instances.list_, cancelling.cancel,
    retrying.retry, instances.purge,
    cluster.status, cluster.queues, cluster.workers, steering.pause, steering.resume, inspecting.inspect,
    limits.limits, schedules.schedules, health.healthcheck, doctor.doctor, checking.check,
    completion,
):  # fmt: skip
    cli.add_command(_command)
cluster.queues.add_command(steering.set_queue)
cluster.workers.add_command(steering.stop)
cluster.workers.add_command(steering.reload)


def main() -> NoReturn:
    """Entry point of `durable` and `python -m durable_cli`."""
    # A descriptor that the caller closed would be given to the next socket, and prints would go there.
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    cli.main()
