"""Exit codes, and what each error says and ends with."""

from __future__ import annotations

import click
import psycopg

from durable.errors import (
    ConfigError,
    DatabaseUnavailableError,
    DefinitionError,
    DurableError,
    EmbeddedServerError,
    SchemaError,
    UnknownTaskError,
    ValidationError,
)
from durable.storage.session import describe

OK = 0
FAILED = 1
"""The operation failed: the task did, the id isn't there, it took too long."""
USAGE = 2
"""The command line is wrong; nothing was done."""
CONFIG = 3
"""The app, the DSN, the database or the schema is not as it must be; nothing was done."""
HEALTHY = 0
UNHEALTHY = 1
"""What `healthcheck` ends with: no worker, a silent or stuck one, no database. Container runtimes know these two."""
INTERRUPTED = 130

_USAGE_ERRORS = (ValidationError, UnknownTaskError)
_CONFIG_ERRORS = (ConfigError, SchemaError, DefinitionError, DatabaseUnavailableError, EmbeddedServerError)
EXPECTED = (click.ClickException, psycopg.Error, DurableError, OSError)
"""What ends a command in one line; anything else is a bug and keeps its traceback."""


class CommandError(DurableError):
    """A command ends with this line and this code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def explain(error: BaseException) -> tuple[str, int]:
    """Return what an expected error says, and its exit code."""
    match error:
        case CommandError():
            return str(error), error.code
        case click.UsageError():
            hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""
            return error.format_message().rstrip(".") + hint, USAGE
        case click.ClickException():
            return error.format_message(), error.exit_code
        case psycopg.Error():
            return f"the database answered: {describe(error)}", FAILED
        case OSError() if error.strerror:
            return error.strerror + (f": {error.filename}" if error.filename else ""), FAILED
    if isinstance(error, _CONFIG_ERRORS):
        return str(error), CONFIG
    return str(error) or type(error).__name__, USAGE if isinstance(error, _USAGE_ERRORS) else FAILED
