"""The steps of a start: make the data directory, clear away what a dead server left, hand over to a keeper.

All are called by Server with `lock` held, and none decides whether a start is due.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from durable.embedded import binaries, processes
from durable.embedded.client import SOCKET, USER
from durable.embedded.layout import Account, Layout, as_account, clean_environment, require_passage
from durable.embedded.settings import command
from durable.errors import EmbeddedServerError

logger = logging.getLogger(__name__)

DEFAULT_LINGER = 10.0
INITDB_TIMEOUT = 180.0
SPAWN_TIMEOUT = 60.0
LOG_LIMIT = 10_000_000  # bytes; a longer log is moved to log.1 at the next start


def data_major(layout: Layout) -> int | None:
    """The major version that made the data; None if there is none."""
    try:
        return int(processes.read_small(layout.data / "PG_VERSION"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise EmbeddedServerError(f"cannot read {layout.data}/PG_VERSION: {exc}") from exc


def linger() -> float:
    """Seconds that an unused server stays up."""
    given = os.environ.get("DURABLE_SERVER_LINGER", "")
    try:
        seconds = float(given) if given else DEFAULT_LINGER
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise EmbeddedServerError(f"DURABLE_SERVER_LINGER={given!r} must be a number of seconds, 0 or more")
    return seconds


def start(layout: Layout, found: Path, settings: Mapping[str, str]) -> None:
    """Start a server with the programs in `found`. Returns when its keeper runs, before it answers."""
    linger()  # a wrong value is refused before anything is made
    account = layout.account()
    require_passage(account, layout.home)
    bindir = binaries.usable_by(account, found)
    if data_major(layout) is None:
        _initdb(layout, account, bindir)
    have, needed = binaries.major(bindir), data_major(layout)
    if have != needed:
        raise EmbeddedServerError(
            f"{layout.data} was made by PostgreSQL {needed}, and {bindir} is PostgreSQL {have}: use programs of"
            f" version {needed} (DURABLE_PG_BIN), or move the data with pg_dump and restore, or pg_upgrade"
        )
    socket_dir = layout.make_socket_dir(account)
    require_passage(account, socket_dir)
    _remove_stale(layout, account, socket_dir)
    logger.info("starting the embedded Postgres %s from %s on %s", have, bindir, layout.data)
    identity = [str(account.uid), str(account.gid)] if account is not None else ["-1", "-1"]
    _spawn_keeper(layout, ["0", *identity, *command(bindir, layout.data, socket_dir, settings)])


def adopt(layout: Layout, pid: int) -> None:
    """Give a running server, whose keeper was killed, another keeper."""
    _spawn_keeper(layout, [str(pid), "-1", "-1"])


def log_tail(layout: Layout) -> str:
    """For the end of an error's message."""
    try:
        with open(layout.log, "rb") as log:
            log.seek(max(0, layout.log.stat().st_size - 2000))
            return f"; the end of {layout.log}:\n{os.fsdecode(log.read())}"
    except OSError:
        return ""


def _initdb(layout: Layout, account: Account | None, bindir: Path) -> None:
    if layout.data.is_dir() and any(layout.data.iterdir()):
        raise EmbeddedServerError(f"{layout.data} is not empty and has no PG_VERSION, so it is not ours: move it away")
    layout.make_data_new(account)
    argv = [str(bindir / "initdb"), "-D", str(layout.data_new), "-U", USER, "-E", "UTF8", "-k", "--no-instructions"]
    argv += ["--auth-local=trust", "--auth-host=reject", "--locale=C"]
    if binaries.major(bindir) >= 17:
        # Letters by Unicode from Postgres itself; the host's libc must not decide it, or its upgrade spoils indexes.
        argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    ran = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        timeout=INITDB_TIMEOUT,
        env=clean_environment(),
        check=False,
        **as_account(account),
    )
    if ran.returncode:
        raise EmbeddedServerError(f"initdb failed:\n{os.fsdecode(ran.stdout)[-2000:]}")
    # A killed initdb leaves only data.new; the fsync, so that a power cut cannot undo the rename under used data.
    os.rename(layout.data_new, layout.data)
    home = os.open(layout.home, os.O_RDONLY)
    try:
        os.fsync(home)
    finally:
        os.close(home)


def _remove_stale(layout: Layout, account: Account | None, socket_dir: Path) -> None:
    """What a dead server left: Postgres would not start over its own zombie, nor over a recycled pid."""
    if not processes.HAVE_PROC:
        return  # nothing proves it dead; let Postgres decide
    directories = {socket_dir}
    last = processes.pid_file(layout.data)
    if last is not None and last.socket_dir is not None and layout.is_private(last.socket_dir, account):
        directories.add(last.socket_dir)
    for directory in directories:
        (directory / SOCKET).unlink(missing_ok=True)
        (directory / f"{SOCKET}.lock").unlink(missing_ok=True)
    (layout.data / "postmaster.pid").unlink(missing_ok=True)


def _spawn_keeper(layout: Layout, arguments: list[str]) -> None:
    """Returns when a keeper holds its lock, or has ended already (the log says why)."""
    if not sys.executable:
        raise EmbeddedServerError("sys.executable is empty, so the embedded server's keeper cannot be started")
    if layout.log.exists() and layout.log.stat().st_size > LOG_LIMIT:
        layout.log.replace(layout.log.with_name("log.1"))
    keeper = Path(__file__).with_name("keeper.py").absolute()
    log = os.open(layout.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", str(keeper), str(layout.home), str(linger()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,  # the terminal's Ctrl-C is for the worker, not for its database
            timeout=SPAWN_TIMEOUT,
            env=clean_environment(),
            check=False,  # what counts is whether the lock is held
        )
    finally:
        os.close(log)
