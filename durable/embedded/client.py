"""The server seen as a client sees it: its address, whether it answers, which databases it has.

Every answer is checked to come from the server on our data, in a directory that nobody else could have laid ready.
Starts and stops nothing, takes no locks.
"""

import enum
import os
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from durable.embedded import processes
from durable.embedded.layout import PORT, Layout
from durable.errors import EmbeddedServerError

USER = "durable"  # initdb's superuser; the directory of the socket decides who may be it
SOCKET = f".s.PGSQL.{PORT}"
MAX_NAME = 63  # bytes; Postgres cuts a longer name off, and would cut two to the same


class Answer(enum.Enum):
    """What came back when we connected."""

    NONE = "no server, or not ours, or not ready"
    FULL = "ours, but every connection is taken"
    OURS = "ours"


def check_name(database: str) -> None:
    if not database or "\0" in database or len(os.fsencode(database)) > MAX_NAME:
        raise EmbeddedServerError(f"{database!r} is no database name: it must have 1 to {MAX_NAME} bytes and no NUL")


class Client:
    """Connects to the server of one layout, once per question."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def socket_dir(self) -> Path:
        """Where the running server listens: its starter may have had another TMPDIR. Else where one would."""
        account = self.layout.account()
        last = processes.pid_file(self.layout.data)
        if last is None or last.socket_dir is None or not (last.socket_dir / SOCKET).exists():
            return self.layout.socket_dir(account)
        # Only a private one counts: the file may be stale, and in a shared directory somebody may have replaced it.
        return last.socket_dir if self.layout.is_private(last.socket_dir, account) else self.layout.socket_dir(account)

    def dsn(self, database: str) -> str:
        host = quote(os.fsencode(self.socket_dir()), safe="")
        return f"postgresql://{USER}@/{quote(database, safe='')}?host={host}&port={PORT}"

    def probe(self, database: str) -> Answer:
        """Whether the server on our data answers, and has `database`."""
        directory = self.socket_dir()
        if not (directory / SOCKET).exists() or not self.layout.is_private(directory, self.layout.account()):
            return Answer.NONE
        try:
            with self._connect(database) as connection:
                row = connection.execute("SHOW data_directory").fetchone()
            return Answer.OURS if row and os.path.samefile(str(row[0]), self.layout.data) else Answer.NONE
        except psycopg.OperationalError as exc:
            # English for sure: the server was made and started with LC_ALL=C. libpq gives no SQLSTATE here.
            full = "too many clients" in str(exc) and processes.postmaster(self.layout.data) is not None
            return Answer.FULL if full else Answer.NONE
        except OSError:
            return Answer.NONE

    def pid(self) -> int | None:
        """The server's pid, also when it does not answer because it is full or still starting."""
        found = processes.postmaster(self.layout.data)
        if found is not None and not processes.HAVE_PROC and self.probe("postgres") is Answer.NONE:
            return None
        return found

    def version(self) -> str | None:
        try:
            with self._connect("postgres") as connection:
                row = connection.execute("SHOW server_version").fetchone()
        except psycopg.Error:
            return None
        return str(row[0]) if row else None

    def create(self, database: str) -> None:
        """Make `database` unless it is there. With `lock` held, or two would make it at once."""
        try:
            with self._connect("postgres") as connection:
                if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
                    # From template0, which nobody can be connected to.
                    statement = sql.SQL("CREATE DATABASE {} TEMPLATE template0")
                    connection.execute(statement.format(sql.Identifier(database)))
        except psycopg.Error as exc:
            raise EmbeddedServerError(f"cannot create the database {database!r}: {exc}") from exc

    def _connect(self, database: str) -> "psycopg.Connection[tuple[object, ...]]":
        return psycopg.connect(
            host=str(self.socket_dir()), port=PORT, user=USER, dbname=database, connect_timeout=5, autocommit=True
        )
