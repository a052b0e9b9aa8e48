"""What is around us: the settings of the server and of our role on it, and poolers on the way to it.

`durable doctor` looks at it, and so do `durable worker` and `beat` before they start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import psycopg

from durable import Durable
from durable import dsn as dsn_module
from durable.config import Config
from durable.embedded.binaries import OLDEST_MAJOR
from durable.storage import doctor as looks
from durable.storage.session import describe

ERROR, WARNING = "error", "warning"
SHORT = 1.0
"""Seconds that a statement or a transaction of ours may take on a busy server, or wait for a lock."""
_TIMEOUTS = {
    "statement_timeout": "a statement of a step on ctx.connection may take longer",
    "lock_timeout": "the outcome of a step with ctx.connection may wait longer for rows that a migration holds",
    "transaction_timeout": "a step with ctx.connection is in a transaction for all of its time",
    "idle_in_transaction_session_timeout": "a step with ctx.connection is in a transaction for all of its time",
}


class Finding(NamedTuple):
    """One thing that is wrong. `severity`: an error is felt now, a warning will be."""

    severity: str
    finding: str
    cause: str
    remedy: str


class Ways(NamedTuple):
    """Where the DSNs lead: the mode of the pooler on the way, None for the server itself.

    deaf  why nothing can listen on listen_dsn, None when it can or there is none
    """

    mode: str | None
    listen_mode: str | None = None
    deaf: str | None = None


def settings(found: Mapping[str, str], conf: Config) -> Iterator[Finding]:
    """Yield what is wrong with settings as `looks.settings` returns them."""

    def finding(severity: str, cause: str, remedy: str) -> Finding:
        return Finding(severity, "settings", cause, remedy)

    if int(found["server_version_num"]) < OLDEST_MAJOR * 10_000:
        older = f"the server is PostgreSQL {found['server_version']}, older than {OLDEST_MAJOR}"
        yield finding(ERROR, f"{older}: statements of ours fail there", "upgrade it")
    if found["default_transaction_read_only"] == "on":
        cause = "default_transaction_read_only is on for this role or database: nothing can be claimed or committed"
        yield finding(ERROR, cause, "ALTER ROLE ... RESET default_transaction_read_only")
    if found["server_encoding"] != "UTF8":
        cause = f"the database's encoding is {found['server_encoding']}: texts and payloads that it lacks are refused"
        yield finding(WARNING, cause, "make a database with ENCODING 'UTF8'")
    if found["standard_conforming_strings"] != "on":
        cause = "standard_conforming_strings is off: a backslash in a string means something else then"
        yield finding(WARNING, cause, "ALTER ROLE ... SET standard_conforming_strings = on")
    if found["synchronous_commit"] == "off":
        cause = "synchronous_commit is off: a crash of the server loses what was acknowledged just before it"
        yield finding(WARNING, cause, "ALTER ROLE ... SET synchronous_commit = on")
    for name, why in _TIMEOUTS.items():
        seconds = int(found.get(name, "0")) / 1000  # not every version has each
        if 0 < seconds < max(SHORT, conf.flush_delay):
            reason = why.format(batch=conf.outcomes_per_commit, delay=conf.flush_delay)
            yield finding(
                WARNING,
                f"{name} is {seconds * 1000:g} ms for this role, and {reason}; it is then done again",
                f"ALTER ROLE ... SET {name} = '30s', or 0",
            )


def ways(app: Durable, title: str) -> Ways:
    """Follow the DSNs, leaving nothing in a pooler's sessions. Raises psycopg.OperationalError, ConfigError."""
    conf = app.conf
    mode = looks.pooler_mode(app.database.dsn(), title, app.sql, conf.connect_timeout)
    if conf.listen_dsn is None:
        return Ways(mode)
    listen = dsn_module.check(conf.listen_dsn, "listen_dsn")
    try:
        listen_mode = looks.pooler_mode(listen, title, app.sql, conf.connect_timeout)
    except psycopg.OperationalError as error:
        return Ways(mode, deaf=f"listen_dsn can't be reached: {describe(error)}")
    if listen_mode == "transaction":
        cause = "listen_dsn leads through a pooler in transaction mode, where LISTEN does not hold"
        return Ways(mode, listen_mode, cause)
    return Ways(mode, listen_mode)


def poolers(found: Ways, conf: Config) -> Iterator[Finding]:
    """Yield what does not fit the settings `pooler`, `listen_dsn` and `notify`."""
    if found.mode == "transaction" and not conf.pooler:
        yield Finding(
            ERROR,
            "pooler",
            "the DSN leads through a pooler in transaction mode, and the setting pooler is off: "
            "settings of a session and LISTEN do not hold",
            "set pooler=True, and listen_dsn to a DSN past the pooler",
        )
    elif found.mode == "session" and not conf.pooler:
        yield Finding(
            WARNING,
            "pooler",
            "the DSN leads through a pooler in session mode: each of our connections keeps one of its own",
            "let workers connect to the server itself, or use transaction mode with pooler=True",
        )
    elif found.mode is None and conf.pooler:
        yield Finding(
            WARNING,
            "pooler",
            "the setting pooler is on, but the DSN leads to the server itself: statements are not prepared",
            "set pooler=False",
        )
    if found.mode == "transaction" and conf.pooler and conf.notify and conf.listen_dsn is None:
        yield Finding(
            WARNING,
            "listen_dsn",
            f"behind a transaction pooler nothing can LISTEN: work starts up to {conf.poll_interval:g} s late",
            "set listen_dsn to a DSN past the pooler, or notify=False if polling is meant",
        )
    if found.deaf is not None:
        yield Finding(ERROR, "listen_dsn", found.deaf, "set listen_dsn to a DSN past the pooler")
