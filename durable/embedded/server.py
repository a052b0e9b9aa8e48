"""Server: start or join the embedded Postgres, leave it, stop it, look at it.

Called by the app when it has no DSN, by whoever reconnects after an outage, and by `durable server`. Every decision
(is it there, does it start, does it stop) is made with `lock` held; the server lives as long as somebody holds
`holders`, and the keeper ends it. Does not restart a server by itself: `ensure` again does.

A Server may be used from several threads and after a fork: what it holds is one file descriptor, which children share.
A child that user code forks in a worker gives it up (forks.py); it gets its own when it asks for the server.
"""

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from durable import forks
from durable.embedded import binaries, launch, processes
from durable.embedded.client import Answer, Client, check_name
from durable.embedded.layout import Layout
from durable.embedded.locks import is_locked, locked, open_lock, try_lock, unlock
from durable.embedded.settings import checked
from durable.errors import EmbeddedServerError

START_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0
STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


@dataclass(frozen=True)
class ServerStatus:
    """What `Server.status` saw."""

    running: bool
    pid: int | None
    version: str | None
    data: Path
    socket_dir: Path
    binaries: Path | None
    log: Path
    holders: bool


class Server:
    """The embedded Postgres of one home. Making one does nothing yet.

    home      where it keeps everything; else DURABLE_HOME; else the user's data directory (root: /var/lib/durable/pg)
    bindir    the directory of postgres and initdb; else DURABLE_PG_BIN; else the wheel or the system's
    settings  Postgres settings by name; they count for a server that we start, not for one that we join
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        bindir: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._layout = Layout(home)
        self._client = Client(self._layout)
        self._bindir = bindir
        self._settings = checked(settings or {})
        self._holding: int | None = None
        forks.shared(self)

    def disown(self) -> None:
        """In a child that user code forks: hold nothing, since it may outlive its parent."""
        self.release()

    def ensure(self, database: str = "durable") -> str:
        """Start or join the server, make `database` if it is missing, and use the server from now on.

        Returns  the DSN
        Raises   EmbeddedServerError
        Cheap (one connection) while the server lives; call it again whenever a connection failed, in a forked child
        too. The hold ends with `release` or with the process.
        """
        check_name(database)
        if self._holds() and is_locked(self._layout.keeper) and self._client.probe(database) is not Answer.NONE:
            return self.dsn(database)
        self._layout.make_home()
        with locked(self._layout.lock):
            held = self._holds()
            if not held:
                self._hold()
            try:
                self._provide(database)
            except BaseException:
                if not held:
                    self.release()
                raise
        return self.dsn(database)

    def dsn(self, database: str = "durable") -> str:
        """The address of `database`, whether the server runs or not."""
        check_name(database)
        return self._client.dsn(database)

    def release(self) -> None:
        """Use the server no more. Does not stop it: the keeper does, once nobody uses it."""
        if self._holding is not None:
            # Closed, not unlocked: forked children go on holding it.
            os.close(self._holding)
            self._holding = None

    def stop(self, mode: str = "fast") -> bool:
        """Stop the server whoever started it, in use or not; False if it does not run.

        mode  "smart" waits for sessions to end, "fast" ends them, "immediate" leaves a recovery to the next start
        """
        if mode not in STOP_SIGNALS:
            raise EmbeddedServerError(f"{mode!r} is not a way to stop Postgres: choose from {', '.join(STOP_SIGNALS)}")
        if not self._layout.lock.exists():
            return False
        with locked(self._layout.lock):
            pid = self._client.pid()
            if pid is None:
                return False
            processes.send(pid, STOP_SIGNALS[mode], self._layout.data)
            if not processes.wait_gone(pid, self._layout.data, STOP_TIMEOUT):
                raise EmbeddedServerError(
                    f"the server (pid {pid}) did not stop within {STOP_TIMEOUT:.0f} s of a {mode} stop;"
                    f" see {self._layout.log}, or stop it in another mode"
                )
            return True

    def status(self) -> ServerStatus:
        """Look, and change nothing."""
        pid, others, server_version, bindir = None, False, None, None
        if self._layout.lock.exists():
            with locked(self._layout.lock):
                pid = self._client.pid()
                others = self._others_hold()
        if pid is not None:
            server_version, bindir = self._client.version(), _executed_from(pid)
        with suppress(EmbeddedServerError):  # no programs: that is what binaries=None says
            bindir = bindir or self._find_binaries()
            server_version = server_version or binaries.version(bindir)
        return ServerStatus(
            running=pid is not None,
            pid=pid,
            version=server_version,
            data=self._layout.data,
            socket_dir=self._client.socket_dir(),
            binaries=bindir,
            log=self._layout.log,
            holders=others,
        )

    def psql_argv(self, database: str, args: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
        """What to execute, and its environment, for a psql on `database`: the server's own, else the one on PATH."""
        psql = shutil.which("psql")
        with suppress(EmbeddedServerError):  # a server may run here whose programs we cannot find
            psql = shutil.which("psql", path=str(self._find_binaries())) or psql
        if psql is None:
            raise EmbeddedServerError(f"no psql found; {binaries.CURES}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return [psql, self.dsn(database), *args], environment

    # Holding

    def _holds(self) -> bool:
        """Whether our hold is on the file that is there now: somebody may have removed the home under us."""
        if self._holding is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._holding), os.stat(self._layout.holders))
        except OSError:
            return False

    def _hold(self) -> None:
        self.release()
        fd = open_lock(self._layout.holders)
        # Never waits: only the keeper and _others_hold take it exclusively, and both have `lock` then.
        fcntl.flock(fd, fcntl.LOCK_SH)
        self._holding = fd

    def _others_hold(self) -> bool:
        """Whether another holder is there; our forked children, who share our hold, do not count. With `lock` held."""
        if self._holding is not None and self._holds():
            try:
                return not try_lock(self._holding, fcntl.LOCK_EX)
            finally:
                # flock drops the old lock before it tries the new one; nobody sees it: the keeper needs `lock` to look.
                fcntl.flock(self._holding, fcntl.LOCK_SH)
        fd = open_lock(self._layout.holders)
        try:
            if not try_lock(fd, fcntl.LOCK_EX):
                return True
            unlock(fd)
            return False
        finally:
            os.close(fd)

    # Starting, all with `lock` held

    def _provide(self, database: str) -> None:
        if self._bring_up() is Answer.FULL:
            return  # nobody can connect to make anything; the caller's own attempt will say so
        try:
            self._client.create(database)
        except EmbeddedServerError:
            if self._client.probe("postgres") is not Answer.NONE:
                raise
            # It died in between; a second death in these milliseconds is an error.
            self._bring_up()
            self._client.create(database)

    def _bring_up(self) -> Answer:
        """Wait for a server that is on its way, else start one, until it answers; see that it has a keeper."""
        data, keeper = self._layout.data, self._layout.keeper
        deadline = time.monotonic() + START_TIMEOUT
        started = False
        while (answer := self._client.probe("postgres")) is Answer.NONE:
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"the embedded server did not answer within {START_TIMEOUT:.0f} s"
                    f" (its processes: {processes.servers(data)}){launch.log_tail(self._layout)}"
                )
            # A keeper means a server that starts, stops or died a moment ago; a process, one whose keeper was
            # killed, or backends that have not yet noticed the death of theirs. Both end in an answer or in nothing.
            if is_locked(keeper) or processes.servers(data):
                time.sleep(0.02)
            elif started:
                raise EmbeddedServerError(f"the embedded server ended while starting{launch.log_tail(self._layout)}")
            else:
                launch.start(self._layout, self._find_binaries(), self._settings)
                started = True
        if not is_locked(keeper) and (pid := processes.postmaster(data)) is not None:
            launch.adopt(self._layout, pid)
        return answer

    def _find_binaries(self) -> Path:
        return binaries.find(self._bindir, launch.data_major(self._layout))


def _executed_from(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).parent
    except OSError:
        return None
