"""A server of the test's own, an ordinary role on it, and what its log says."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from durable.embedded import Server
from tests.fix_db import FAST

ROLE = "app"


class OwnServer:
    """A server that a test may starve, reconfigure or stop.

    admin  DSN of a superuser, who is let in when nobody else is
    dsn    DSN of the role `app`, which owns what it makes
    """

    def __init__(self, home: Path | None = None, **settings: object) -> None:
        self.home = home or Path(tempfile.mkdtemp(prefix="durable-around-"))
        self.home.chmod(0o755)
        self.server = Server(self.home, settings={**FAST, **{name: str(value) for name, value in settings.items()}})
        self.admin = self.server.ensure()
        self.dsn = make_conninfo(self.admin, user=ROLE)

    def prepare(self) -> None:
        """Make the role, with nothing of its own yet."""
        self.run(f"CREATE ROLE {ROLE} LOGIN")
        self.run(f"GRANT CREATE ON DATABASE durable TO {ROLE}")

    def run(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser."""
        with psycopg.connect(self.admin, autocommit=True, application_name="the test") as connection:
            cursor = connection.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def recycle(self) -> int:
        """End every session of the role; return how many."""
        ended = self.run("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = %s", ROLE)
        return int(ended[0][0])

    def said(self, *texts: str) -> int:
        """Count the lines of its log that hold one of these texts."""
        lines = (self.home / "log").read_text(errors="replace").splitlines()
        return sum(any(text in line for text in texts) for line in lines)

    def close(self) -> None:
        """Stop it, and remove what it kept."""
        self.server.release()
        self.server.stop("immediate")
        shutil.rmtree(self.home, ignore_errors=True)
