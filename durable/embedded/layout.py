"""Where the server's files are, who owns them, and as which account Postgres runs.

home/           ours, 0700 (root: 0711, the account must pass through)
    data/       the account's, 0700
    s/          the account's, 0700: the socket; a path too long for a socket gives a directory elsewhere
    lock, holders, keeper    see locks.py
    log         the server's and the keeper's output

Root cannot run Postgres, so it lends it an existing account, which gets `data` and `s` and nothing else: in a directory
of its own it could plant symlinks that root then writes through. Never adds an account, never changes the mode of
a directory that it did not make. Starts nothing.
"""

import hashlib
import logging
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable.errors import EmbeddedServerError

logger = logging.getLogger(__name__)

PORT = 5432
# A socket's path may have 107 bytes on Linux, 103 on macOS.
SOCKET_PATH_LIMIT = 100


@dataclass(frozen=True)
class Account:
    """The account that Postgres runs as when we are root."""

    name: str
    uid: int
    gid: int


def as_account(account: Account | None) -> dict[str, Any]:
    """Arguments for subprocess: run as `account` (None: as ourselves), in a directory that everybody may enter."""
    if account is None:
        return {"cwd": "/"}
    return {"cwd": "/", "user": account.uid, "group": account.gid, "extra_groups": []}


def clean_environment() -> dict[str, str]:
    """What Postgres may know of our environment: no PG* variables, no foreign locale, no secrets of root's."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return {"PATH": os.defpath, **kept, "LC_ALL": "C"}


def default_home() -> Path:
    if given := os.environ.get("DURABLE_HOME"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/durable/pg")  # never below root's home, which other accounts cannot enter
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".local" / "share"
        except RuntimeError as exc:
            raise EmbeddedServerError(
                "this user has no home directory for the embedded server's data; name a directory in DURABLE_HOME"
            ) from exc
    return base / "durable" / "pg"


class Layout:
    """The paths below one home. Makes directories only where a method says so."""

    def __init__(self, home: Path | None = None) -> None:
        # The real path: however a process spells it, the name of a socket directory elsewhere must come out the same.
        self.home = Path(os.path.realpath(home if home is not None else default_home()))
        self.data = self.home / "data"
        self.data_new = self.home / "data.new"
        self.lock = self.home / "lock"
        self.holders = self.home / "holders"
        self.keeper = self.home / "keeper"
        self.log = self.home / "log"

    def make_home(self) -> None:
        """Make `home` and its missing parents, or check that the existing one is ours alone."""
        root = os.geteuid() == 0
        try:
            if not self.home.exists():
                missing = [path for path in self.home.parents if not path.exists()]
                for path in reversed(missing):
                    path.mkdir(exist_ok=True)
                    if root:
                        path.chmod(0o755)  # ours, and root's umask may have shut the account out
                self.home.mkdir(mode=0o700, exist_ok=True)
                if root:
                    self.home.chmod(0o711)
            found = self.home.stat()
        except OSError as exc:
            raise EmbeddedServerError(
                f"cannot make {self.home} for the embedded server ({exc.strerror}); name another in DURABLE_HOME"
            ) from exc
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise EmbeddedServerError(
                f"{self.home} is not a directory of uid {os.geteuid()} but belongs to uid {found.st_uid}:"
                " run as that user, or name another directory in DURABLE_HOME"
            )
        if found.st_mode & 0o022:
            raise EmbeddedServerError(
                f"{self.home} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}): run"
                f" `chmod go-w` on it, or name another directory in DURABLE_HOME"
            )

    def account(self) -> Account | None:
        """Whom Postgres runs as; None for ourselves. The owner of existing data wins over any preference."""
        if os.geteuid() != 0:
            return None
        try:
            owner = self.data.stat().st_uid
        except FileNotFoundError:
            return _preferred_account()
        try:
            entry = pwd.getpwuid(owner)
        except KeyError as exc:
            raise EmbeddedServerError(f"{self.data} belongs to uid {owner}, which has no account") from exc
        if owner == 0:
            raise EmbeddedServerError(
                f"{self.data} belongs to root, and Postgres refuses to run as root: chown -R it to another account"
            )
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)

    def make_data_new(self, account: Account | None) -> None:
        """An empty `data.new` for initdb; what a killed initdb left is removed."""
        if self.data_new.exists():
            shutil.rmtree(self.data_new)
        self.data_new.mkdir(mode=0o700)
        if account is not None:
            os.lchown(self.data_new, account.uid, account.gid)

    def socket_dir(self, account: Account | None) -> Path:
        """Where a server that is started now shall listen. A running one may be elsewhere: ask its pid file."""
        near = self.home / "s"
        if _fits(near):
            return near
        uid = os.geteuid() if account is None else account.uid
        runtime = os.environ.get("XDG_RUNTIME_DIR", "") if account is None else ""  # root's is closed to the account
        base = runtime if os.path.isabs(runtime) and os.path.isdir(runtime) else tempfile.gettempdir()
        far = Path(base) / f"durable-{uid}-{hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]}"
        if not _fits(far):
            raise EmbeddedServerError(f"no usable path for a socket: {near} and {far} are too long or contain a comma")
        return far

    def make_socket_dir(self, account: Account | None) -> Path:
        """Make the directory, or refuse one that somebody else laid ready in a shared temporary directory."""
        path = self.socket_dir(account)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
        # Still root's: just made, or by a process that was killed right here.
        if account is not None and stat.S_ISDIR(found.st_mode) and found.st_uid == 0:
            os.lchown(path, account.uid, account.gid)
        if not self.is_private(path, account):
            owner = os.geteuid() if account is None else account.uid
            raise EmbeddedServerError(
                f"{path} must be a directory of uid {owner} with mode 0700 to hold the server's socket; remove it"
            )
        return path

    def is_private(self, path: Path, account: Account | None) -> bool:
        """Whether `path` is a directory that only the account (or we) can use. A socket elsewhere may be anybody's."""
        try:
            found = path.lstat()
        except OSError:
            return False
        owner = os.geteuid() if account is None else account.uid
        return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o077


def require_passage(account: Account | None, *paths: Path) -> None:
    """Raise, naming the directory, if `account` cannot enter one of `paths` or a parent of theirs."""
    if account is None:
        return
    steps = [str(step) for path in paths for step in (*reversed(path.parents), path)]
    # The account itself tries, since mode bits do not tell everything (ACLs).
    script = 'for step; do cd -- "$step" 2>/dev/null || { printf %s "$step"; exit 1; }; done'
    tried = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *steps],
        capture_output=True,
        env=clean_environment(),
        check=False,
        **as_account(account),
    )
    if tried.returncode:
        raise EmbeddedServerError(
            f"the account {account.name!r}, which Postgres runs as when started by root, may not enter"
            f" {os.fsdecode(tried.stdout)}: name a home in DURABLE_HOME whose parents it can enter"
        )


def _fits(directory: Path) -> bool:
    # libpq takes a comma for the end of one host and the beginning of the next.
    return len(os.fsencode(directory / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_LIMIT and "," not in str(directory)


def _preferred_account() -> Account:
    for name in ("durable", "postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid == 0:
            continue
        if name == "nobody":
            logger.warning("the embedded Postgres runs as nobody, as other services may; add an account named durable")
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedServerError(
        "root needs an account to run Postgres as: none of durable, postgres, nobody exists; add one, or run as a user"
    )
