"""A real PgBouncer in front of a server's socket, as whatever account that server runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.fix_db import wait_until

PORT = 6500


class PgBouncer:
    """One PgBouncer for the database that `dsn` names, on a socket in a folder of its own.

    settings  of its configuration file, besides where it is and whom it trusts
    """

    def __init__(self, dsn: str, mode: str, **settings: object) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            pytest.skip("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
        server = conninfo_to_dict(dsn)
        self._program = program
        self._owner = Path(str(server["host"])).stat().st_uid
        self.folder = Path(tempfile.mkdtemp(prefix="durable-pgb-"))
        os.chown(self.folder, self._owner, -1)
        self._ini = self.folder / "pgbouncer.ini"
        given = {"pool_mode": mode, **settings}
        self._ini.write_text(
            f"[databases]\n{server['dbname']} = user={server['user']} host={server['host']} port={server['port']}\n"
            f"[pgbouncer]\nlisten_port = {PORT}\nunix_socket_dir = {self.folder}\nlisten_addr =\n"
            "auth_type = any\nauth_file =\nadmin_users = anybody\nlogfile =\npidfile =\n"
            + "".join(f"{name} = {value}\n" for name, value in given.items())
        )
        self.dsn = make_conninfo("", host=str(self.folder), port=PORT, dbname=str(server["dbname"]), user="anybody")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # It refuses to run as root, as Postgres does.
        user: dict[str, Any] = {"user": self._owner} if os.geteuid() == 0 and self._owner != 0 else {}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([self._program, str(self._ini)], stdout=log, stderr=log, **user)
        wait_until(lambda: self._answers() or self.process.poll() is not None, what="PgBouncer")
        assert self.process.poll() is None, self.log()

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def reload(self) -> None:
        """Have it read its configuration anew."""
        self.process.send_signal(signal.SIGHUP)

    def order(self, command: str) -> list[tuple[Any, ...]]:
        """Give an order on its console, or look there."""
        console = make_conninfo(self.dsn, dbname="pgbouncer")
        with psycopg.connect(console, autocommit=True, prepare_threshold=None) as connection:
            cursor = connection.execute(command)
            return cursor.fetchall() if cursor.description else []

    def log(self) -> str:
        """What it has said so far."""
        return (self.folder / "log").read_text(errors="replace")

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            psycopg.connect(make_conninfo(self.dsn, dbname="pgbouncer"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


@pytest.fixture
def pgbouncer() -> Iterator[Callable[..., PgBouncer]]:
    """Start one for a DSN in a pool mode; ended with the test."""
    started: list[PgBouncer] = []

    def start(dsn: str, mode: str = "transaction", **settings: object) -> PgBouncer:
        started.append(PgBouncer(dsn, mode, **settings))
        return started[-1]

    yield start
    for one in started:
        one.close()
