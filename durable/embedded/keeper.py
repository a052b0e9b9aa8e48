"""The keeper: one small detached process per server, its parent, which stops it when nobody uses it.

Run as a file by an isolated interpreter (`python -I -S keeper.py ...`), so it imports nothing but the standard library,
works wherever durable was imported from, and stays small. It starts Postgres or adopts one whose keeper was killed;
once a second it tries to lock `holders`, which works only when no process uses the server. After `linger` seconds of
that it stops the server and ends. It never restarts one: that is for the next process that needs it (server.py).

SIGTERM means: do not linger. Processes that use the server still keep it, so a worker stopped by the same service
manager can finish its steps.
"""

import fcntl
import os
import select
import signal
import sys
import time

STOP_TIMEOUT = 60.0  # a fast stop writes a checkpoint; then the immediate stop, which loses nothing but time


class Postgres:
    """The process we keep: our own child, or an adopted one."""

    def __init__(self, pid: int, owned: bool) -> None:
        self.pid = pid
        self.owned = owned
        self.pidfd = open_pidfd(pid)

    def exited(self, within: float) -> bool:
        if self.pidfd is None:
            time.sleep(within)
        elif not select.select([self.pidfd], [], [], within)[0]:
            return False
        if self.owned:
            return os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        if self.pidfd is not None:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def send(self, number: signal.Signals) -> None:
        try:
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def stop(self) -> None:
        self.send(signal.SIGINT)
        deadline = time.monotonic() + STOP_TIMEOUT
        while not self.exited(0.1):
            if time.monotonic() > deadline:
                say(f"postgres did not stop within {STOP_TIMEOUT:.0f} s, stopping it immediately")
                self.send(signal.SIGQUIT)
                deadline = float("inf")


class Keeper:
    """Decides when nobody needs the server any more."""

    def __init__(self, home: str, linger: float) -> None:
        self.linger = linger
        self.asked_to_leave = False
        self.idle_since: float | None = None
        self.lock = open_lock(os.path.join(home, "lock"))
        self.holders = open_lock(os.path.join(home, "holders"))

    def leave(self, *_: object) -> None:
        self.asked_to_leave = True

    def keep(self, postgres: Postgres) -> None:
        tick = min(1.0, max(0.05, self.linger / 4))
        while not postgres.exited(tick):
            # Busy means that somebody starts, stops or looks: no time to judge.
            if not try_lock(self.lock):
                continue
            try:
                if self.is_over():
                    # With `lock` held: whoever wants the server now waits, and does not join a dying one.
                    say("nobody uses the server, stopping it")
                    postgres.stop()
                    return
            finally:
                fcntl.flock(self.lock, fcntl.LOCK_UN)
        say("postgres has ended")

    def is_over(self) -> bool:
        if not try_lock(self.holders):
            self.idle_since = None
            return False
        fcntl.flock(self.holders, fcntl.LOCK_UN)
        now = time.monotonic()
        if self.idle_since is None:
            self.idle_since = now
        return self.asked_to_leave or now - self.idle_since >= self.linger


def open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or gone already, which Postgres.exited finds out
        return None


def open_lock(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S %Z"), f"[{os.getpid()}] keeper: {text}", file=sys.stderr, flush=True)


def start(command: list[str], uid: int, gid: int) -> Postgres:
    """Fork and exec, without subprocess: its import would be most of this process's memory."""
    pid = os.fork()
    if pid:
        return Postgres(pid, owned=True)
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would pass that on
            signal.signal(number, signal.SIG_DFL)
        if uid >= 0:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        os.execv(command[0], command)  # noqa: S606
    except BaseException as exc:
        say(f"cannot run {command[0]}: {exc}")
    finally:
        os._exit(127)


def adopt(pid: int, home: str) -> Postgres | None:
    """Take over a running server; None if that pid is no longer it."""
    postgres = Postgres(pid, owned=False)
    if os.path.exists("/proc/self/cwd"):
        # Asked after the pidfd was opened: from here on it cannot come to mean another process.
        try:
            if not os.path.samefile(f"/proc/{pid}/cwd", os.path.join(home, "data")):
                return None
        except OSError:
            return None
    return postgres


def main(home: str, linger: str, adopted: str, uid: str, gid: str, *command: str) -> None:
    """Arguments are text: `adopted` is a pid or 0, `uid` and `gid` are -1 to stay who we are."""
    # What we were started by may have blocked or ignored signals that we need.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir("/")
    # Locked before the fork: when the process that was started returns, either a keeper has the lock or there is none.
    keeper_lock = open_lock(os.path.join(home, "keeper"))
    fcntl.flock(keeper_lock, fcntl.LOCK_EX)
    if os.fork():
        os._exit(0)  # so that the keeper is nobody's child, and nobody's zombie later
    os.ftruncate(keeper_lock, 0)
    os.write(keeper_lock, b"%d\n" % os.getpid())
    keeper = Keeper(home, float(linger))
    postgres = adopt(int(adopted), home) if int(adopted) else start(list(command), int(uid), int(gid))
    if postgres is None:
        return
    # After the fork of Postgres, which must not inherit them.
    signal.signal(signal.SIGTERM, keeper.leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    keeper.keep(postgres)


if __name__ == "__main__":
    main(*sys.argv[1:])
