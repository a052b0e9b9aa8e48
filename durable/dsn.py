"""Where the database is: an explicit DSN, `DURABLE_DSN`, or the embedded server, in that order."""

from __future__ import annotations

import os
import re
import threading

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from durable.embedded import Server
from durable.errors import ConfigError

VARIABLE = "DURABLE_DSN"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PLACES = ("PGSERVICE", "PGHOST", "PGHOSTADDR", "PGDATABASE")
"""Environment variables of libpq, one of which must be set for a DSN that names nothing itself."""
_PORTS = re.compile(r"[0-9,]*")


class Database:
    """Resolves the DSN once; for the embedded server each resolving also starts it again if it died.

    explicit  what the app was given, or None
    """

    def __init__(self, explicit: str | None) -> None:
        if explicit is not None:
            check(explicit, "dsn")
        self._explicit = explicit
        self._server: Server | None = None
        self._lock = threading.Lock()

    @property
    def embedded(self) -> bool:
        """Whether there is no DSN, so that the embedded server serves."""
        return self._explicit is None and not os.environ.get(VARIABLE)

    def dsn(self) -> str:
        """Return the DSN; starts or joins the embedded server when there is none.

        Raises ConfigError for a wrong `DURABLE_DSN`, EmbeddedServerError when the embedded server can't be had.
        """
        if self._explicit is not None:
            return self._explicit
        from_environment = os.environ.get(VARIABLE)
        if from_environment:
            return check(from_environment, VARIABLE)
        with self._lock:
            if self._server is None:
                self._server = Server()
            return self._server.ensure()


def check(dsn: str, source: str) -> str:
    """Return a DSN that names a Postgres database. Raises ConfigError, which never shows it: it may hold a password."""
    scheme = _SCHEME.match(dsn)
    if scheme and scheme[1] not in ("postgresql", "postgres"):
        raise ConfigError(f"{source} must start with postgresql://, got {scheme[1]}://...")
    try:
        parts = conninfo_to_dict(dsn)
    except ProgrammingError:
        raise ConfigError(
            f"{source} is no valid Postgres DSN (postgresql://user:password@host:port/database)"
        ) from None
    # libpq ends the user part at the first @ or /: the rest of such a password would be shown as a host or a port.
    if scheme and ("@" in str(parts.get("host", "")) or not _PORTS.fullmatch(str(parts.get("port", "")))):
        raise ConfigError(f"{source}: write @ as %40, / as %2F and : as %3A in its password; its host or port is none")
    if not parts and not (scheme and any(os.environ.get(name) for name in _PLACES)):
        raise ConfigError(
            f"{source} is empty; give postgresql://user:password@host:port/database, or postgresql:// and where it is "
            f"in the environment ({', '.join(_PLACES)})"
        )
    return dsn
