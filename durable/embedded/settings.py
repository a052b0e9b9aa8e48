"""The command line that a server is started with: our settings, the user's, and the ones nobody may change.

On the command line and not in a file: argv needs no quoting, and root need not write into the account's directory. It
also overrides postgresql.conf and ALTER SYSTEM, so that the server cannot be talked out of its private socket.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from durable.embedded.layout import PORT
from durable.errors import EmbeddedServerError

DEFAULTS = {"max_connections": "200"}

# Where the server is and who may reach it: ours.
RESERVED = frozenset(
    {
        "config_file",
        "data_directory",
        "external_pid_file",
        "hba_file",
        "ident_file",
        "listen_addresses",
        "port",
        "unix_socket_directories",
        "unix_socket_group",
        "unix_socket_permissions",
    }
)


def checked(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings with lower-case names. Postgres itself judges whether it knows them and their values."""
    result = {}
    for given, value in settings.items():
        name = given.lower().replace("-", "_")
        if not re.fullmatch(r"[a-z_][a-z0-9_.]*", name):
            raise EmbeddedServerError(f"{given!r} is not the name of a Postgres setting")
        if name in RESERVED:
            raise EmbeddedServerError(f"the embedded server sets {name} itself; run your own Postgres to change it")
        if "\0" in str(value):
            raise EmbeddedServerError(f"the Postgres setting {name} must not contain NUL")
        result[name] = str(value)
    return result


def command(bindir: Path, data: Path, socket_dir: Path, settings: Mapping[str, str]) -> list[str]:
    """argv of the server. `settings` as `checked` returns them."""
    effective = {
        **DEFAULTS,
        **settings,
        "listen_addresses": "",  # no TCP: the 0700 directory of the socket is the whole access rule
        "unix_socket_directories": str(socket_dir),
        "unix_socket_permissions": "0700",
        "port": str(PORT),
    }
    argv = [str(bindir / "postgres"), "-D", str(data)]
    for name, value in effective.items():
        argv += ["-c", f"{name}={value}"]
    return argv
