"""Creating and upgrading the schema.

`sql/migrations/NNNN_words.sql`, forward only. All that are missing are applied in one transaction under an advisory
lock; each leaves its number and checksum in `migrations`. A released file never changes. A file's head says
`-- breaking: yes` when older workers can't run on what it makes.

A new table, sequence or function is named in `grants`, with what each kind of role may do with it
(`tests/security/test_privileges.py`). A new column of `instances` is added to `history` in the same place, and carried
by every statement that moves or ends a row (`tests/storage/test_columns.py`).

Whoever waits for a table's lock makes all that comes after wait too. So an attempt gives up soon, and is made again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from dataclasses import dataclass
from functools import cache

from psycopg import errors as pg_errors
from psycopg import sql

from durable.errors import SchemaError
from durable.sql import Statements, packaged, quote_literal
from durable.storage import grants, maintenance, partitions
from durable.storage.session import Connection, patient, run

log = logging.getLogger(__name__)

LOCK_TIMEOUT = "1s"
PATIENCE = 60.0
"""Seconds in which an upgrade must come by its locks."""
LONGEST_STATEMENT = 3600.0
"""Seconds that one statement of an upgrade may take: it may rewrite a table, or wait for another upgrade."""
PAUSE = 1.0
"""Seconds between attempts, for those who waited behind the last one."""

_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of sql/migrations."""

    id: int
    name: str
    text: str
    breaking: bool

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@cache
def known() -> tuple[Migration, ...]:
    """Return every migration this code has, oldest first."""
    found = []
    for file in packaged("migrations"):
        match = _FILE.fullmatch(file.name)
        if match:
            text = file.read_text(encoding="utf-8")
            found.append(Migration(int(match[1]), match[2], text, "-- breaking: yes" in text))
    return tuple(sorted(found, key=lambda migration: migration.id))


def applied(connection: Connection, schema: str) -> dict[int, tuple[str, bool]]:
    """Return id -> (checksum, breaking) of the migrations the database has; empty when the schema isn't there."""
    table = sql.Identifier(schema, "migrations").as_string(connection)
    there = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (table,)).fetchone()
    if there is None or not there[0]:
        return {}
    rows = connection.execute(
        sql.SQL("SELECT id, checksum, breaking FROM {}").format(sql.Identifier(schema, "migrations"))
    ).fetchall()
    return {row[0]: (row[1], row[2]) for row in rows}


def pending(connection: Connection, schema: str) -> list[Migration]:
    """Return the migrations the database lacks."""
    have = applied(connection, schema)
    return [migration for migration in known() if migration.id not in have]


def script(schema: str) -> str:
    """Return the whole schema as SQL text, for people who apply it by hand."""
    statements = Statements(schema)
    parts = ["BEGIN;", _head(statements)]
    for migration in known():
        parts.append(statements.render(migration.text))
        parts.append(statements.render(_record(migration)))
    return "\n".join([*parts, "COMMIT;", "-- `durable migrate` also makes the history's partitions, 14 days ahead."])


# CREATE SCHEMA IF NOT EXISTS wants CREATE on the database even when the schema exists: the owner of a schema that
# somebody else made for it does not have that.
_HEAD = """DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = {name}) THEN CREATE SCHEMA {schema}; END IF;
END $$;
CREATE TABLE IF NOT EXISTS {schema}.migrations (
    id integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    breaking boolean NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);"""


def _head(statements: Statements) -> str:
    return statements.render(_HEAD).replace("{name}", quote_literal(statements.schema))


def _record(migration: Migration) -> str:
    # Numbers, names and checksums are our own files'; nothing of a user's is in this text.
    return (
        "INSERT INTO {schema}.migrations (id, name, checksum, breaking) "  # noqa: S608
        f"VALUES ({migration.id}, '{migration.name}', '{migration.checksum}', {str(migration.breaking).lower()});"
    )


def migrate(connection: Connection, schema: str, patience: float = PATIENCE) -> list[Migration]:
    """Bring the schema to this code's version, partitions included; return what was applied.

    Any number of processes may call it at once: one does the work, the others find it done. Workers and producers wait
    for a lock of it for a second at most. Raises SchemaError when an applied migration differs from this code's, and
    when other sessions have held the tables for `patience` seconds.
    """
    statements = Statements(schema)
    until, told = time.monotonic() + patience, False
    while True:
        try:
            missing = _migrate(connection, statements)
            break
        except pg_errors.LockNotAvailable as error:
            held = f"schema {schema!r} can't be upgraded while its tables are in use by {_holders(connection, schema)}"
            if time.monotonic() >= until:
                raise SchemaError(f"{held}; end their transactions, then run `durable migrate` again") from error
            if not told:
                log.warning("%s; trying on for %g s", held, patience)
                told = True
        time.sleep(PAUSE)
    partitions.ensure(connection, statements)
    return missing


def _migrate(connection: Connection, statements: Statements) -> list[Migration]:
    schema = statements.schema
    with patient(connection, LONGEST_STATEMENT), connection.transaction():
        connection.execute(f"SET LOCAL statement_timeout = '{LONGEST_STATEMENT:.0f}s'")
        grants.lock_schema(connection, schema)
        have = applied(connection, schema)
        _refuse_other_texts(have, schema)
        missing = [migration for migration in known() if migration.id not in have]
        if not have:
            connection.execute(_head(statements).encode())
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        for migration in missing:
            connection.execute(statements.render(migration.text).encode())
            connection.execute(statements.render(_record(migration)).encode())
        grants.restore(connection, statements)
    return missing


def _holders(connection: Connection, schema: str) -> str:
    rows = run(connection, Statements(schema), maintenance.table_holders(schema))
    return ", ".join(
        f"session {pid} ({name or 'no name'}, in a transaction for {age:.0f} s)" for pid, name, age in rows
    )


def _refuse_other_texts(have: dict[int, tuple[str, bool]], schema: str) -> None:
    for migration in known():
        if migration.id in have and have[migration.id][0] != migration.checksum:
            raise SchemaError(
                f"migration {migration.id} of schema {schema!r} was applied with another text than this code has; "
                "the code and the database are of different builds"
            )


def check(connection: Connection, schema: str) -> str | None:
    """Raise SchemaError unless this code can run on the schema; return a warning when the schema is newer."""
    have = applied(connection, schema)
    if not have:
        raise SchemaError(f"schema {schema!r} isn't there; run `durable migrate`")
    missing = [migration.id for migration in known() if migration.id not in have]
    if missing:
        raise SchemaError(f"schema {schema!r} lacks migration {missing[0]}; run `durable migrate`")
    _refuse_other_texts(have, schema)
    newest = known()[-1].id
    newer = {number: breaking for number, (_, breaking) in have.items() if number > newest}
    if any(newer.values()):
        raise SchemaError(f"this code is older than schema {schema!r} ({newest} < {max(newer)}); upgrade the code")
    return f"schema {schema!r} is newer than this code ({max(newer)} > {newest}), harmlessly" if newer else None
