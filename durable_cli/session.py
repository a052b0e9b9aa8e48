"""Session: what the options that all commands share have said; the app, and connections to its database.

`-A`, `--dsn`, `--schema`, `--json` and `--debug` are taken before and after the command's name alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from durable import Durable, validation
from durable.dsn import VARIABLE as DSN_VARIABLE
from durable.dsn import Database
from durable.storage import migrations
from durable.storage.session import Connection, Operation, connect, run, translated
from durable_cli import loading, logs
from durable_cli.exits import USAGE, CommandError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Session:
    """One run of the command line. Attributes are named as the options."""

    app_path: str | None = None
    dsn: str | None = None
    schema: str | None = None
    as_json: bool = False
    debug: bool = False

    def app(self) -> Durable:
        """Return the app with its tasks. Raises CommandError."""
        app = loading.find(self.app_path)
        logs.configure("warning")
        return app

    def database(self) -> Durable:
        """Return an app for its database alone: the one of --dsn and --schema if given, else the app.

        Without either, DURABLE_DSN is enough. Raises CommandError.
        """
        if self.dsn is not None or self.schema is not None:
            if self.app_path is not None:
                raise CommandError("give either -A or --dsn and --schema, not both", USAGE)
            return self._bare()
        try:
            return self.app()
        except loading.NoAppError:
            if os.environ.get(DSN_VARIABLE):
                return self._bare()
            raise

    def _bare(self) -> Durable:
        logs.configure("warning")
        schema = "durable" if self.schema is None else validation.schema(self.schema)
        database = Database(self.dsn)
        # Resolved here, so that looking at a schema of the embedded server does not make it.
        dsn = database.dsn() if database.embedded else self.dsn
        return Durable("cli", dsn=dsn, schema=schema)


@contextmanager
def connected(app: Durable, dsn: str | None = None, *, schema_needed: bool = True) -> Iterator[Connection]:
    """Lend one connection of its own, so that a database away is told at once.

    dsn            instead of the app's
    schema_needed  whether the schema must be there and fit this code
    Raises SchemaError, DatabaseUnavailableError, EmbeddedServerError.
    """
    title, conf = f"durable {app.name} cli", app.conf
    with translated(app.schema):
        opened = connect(
            app.dsn() if dsn is None else dsn,
            title,
            pooler=conf.pooler,
            timeout=conf.connect_timeout,
            patience=conf.call_timeout,
        )
        with closing(opened) as connection:
            if schema_needed:
                migrations.check(connection, app.schema)
            yield connection


def ask(app: Durable, operation: Operation[T]) -> T:
    """Run one storage operation on a connection of its own. Raises as `connected`."""
    with connected(app) as connection:
        return run(connection, app.sql, operation)


def _keep(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def keep(ctx: click.Context, _: click.Parameter, value: Any) -> Any:
        if value is not None and value is not False:
            setattr(ctx.ensure_object(Session), name, value)
        return value

    return keep


app_option = click.option(
    "-A", "--app", metavar="MODULE:APP", expose_value=False, callback=_keep("app_path"),
    help="The app; else DURABLE_APP, else tasks.py or app.py here.",
)  # fmt: skip
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_keep("debug"), help="Show tracebacks of errors."
)
json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_keep("as_json"), help="Print one JSON document."
)
dsn_option = click.option(
    "--dsn", metavar="DSN", expose_value=False, callback=_keep("dsn"),
    help="A database instead of an app's (DURABLE_DSN keeps a password out of `ps`).",
)  # fmt: skip
schema_option = click.option(
    "--schema", metavar="NAME", expose_value=False, callback=_keep("schema"), help="The schema in it, else durable."
)


def app_options(command: F) -> F:
    """Options of commands that need the app's tasks."""
    return app_option(json_option(debug_option(command)))


def database_options(command: F) -> F:
    """Options of commands that need no more than a database and a schema."""
    return app_option(dsn_option(schema_option(json_option(debug_option(command)))))


def plain_options(command: F) -> F:
    """Options of commands that need neither."""
    return json_option(debug_option(command))
