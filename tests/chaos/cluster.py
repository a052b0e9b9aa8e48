"""The server under test, and the processes that work on it. Signals only processes that it started, by pid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

from durable import Durable
from durable.embedded import Server
from durable.storage import migrations
from tests.chaos.application import PASSWORD, SCHEMA, TASKS_PY, build
from tests.chaos.proxy import Proxy
from tests.chaos.recorder import publish
from tests.fix_app import FAST_SETTINGS, Command

ROOT = Path(__file__).resolve().parents[2]
LEASE = float(FAST_SETTINGS["DURABLE_LEASE_TTL"])
SETTINGS = {
    "wal_level": "logical",
    "synchronous_commit": "on",
    "fsync": "off",  # what crashes here is the server, not the machine: what it has written is there
    "deadlock_timeout": "50ms",
    "log_min_messages": "warning",
    "max_wal_size": "4GB",
    "shared_buffers": "128MB",
}
POOLS = ("prefork", "threads", "asyncio")
CHILD, AGENT = "durable:default", "durable:agent"
MIGRATION = """-- breaking: no
ALTER TABLE {{schema}}.instances ADD COLUMN release_{n} text;
ALTER TABLE {{schema}}.history ADD COLUMN release_{n} text;
"""


class SmallDisk:
    """A tmpfs for the tables, small enough to be filled. Needs root and mount(2)."""

    def __init__(self, where: Path, size: str = "400m") -> None:
        self.path = where
        where.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "chaos", str(where)],
                       check=True, capture_output=True, text=True)  # fmt: skip

    @contextmanager
    def full(self) -> Iterator[None]:
        """Leave no room for the block."""
        filler = self.path / "filler"
        try:
            with filler.open("wb") as file:
                size = 0
                for piece in (2**22, 2**16, 2**12):
                    with suppress(OSError):  # no room for one more of that size
                        while True:
                            os.posix_fallocate(file.fileno(), size, piece)
                            size += piece
            yield
        finally:
            filler.unlink()

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self.path)], check=True, capture_output=True)


class Postgres:
    """A server that may be crashed: an embedded one in a home of its own.

    small_disk  its tables are on a disk that may be filled
    """

    def __init__(self, small_disk: bool = False) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="durable-chaos-"))
        self.home.chmod(0o755)
        self._server = Server(self.home, settings=SETTINGS)
        self.dsn = psycopg.conninfo.make_conninfo(self._server.ensure(), password=PASSWORD)
        self.lock = threading.Lock()
        """Held by the fault that is done to it."""
        self.disk: SmallDisk | None = None
        if small_disk:
            self.disk = SmallDisk(self.home / "small")
            account = (self.home / "data").stat()
            os.chown(self.disk.path, account.st_uid, account.st_gid)
            with self.connect() as connection:
                connection.execute(f"CREATE TABLESPACE small LOCATION '{self.disk.path}'")
                connection.execute("ALTER DATABASE durable SET default_tablespace = small")

    def crash(self, away: float) -> None:
        """Stop it as a power cut of its processes would, and start it again after some seconds."""
        with self.lock:
            self._server.stop("immediate")
            time.sleep(away)
            self._server.ensure()

    def connect(self) -> psycopg.Connection[Any]:
        """Connect past every proxy. Raises psycopg.OperationalError."""
        return psycopg.connect(self.dsn, autocommit=True, application_name="chaos", connect_timeout=5)

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    def close(self) -> None:
        """Stop it and remove what it kept."""
        self._server.release()
        self._server.stop("immediate")
        if self.disk is not None:
            self.disk.close()
        shutil.rmtree(self.home, ignore_errors=True)


class Place:
    """Where one command runs: started, started again when it has ended, by whatever death."""

    def __init__(self, name: str, folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.lock = threading.Lock()
        """Held by the fault that is done to it."""
        self.extra: dict[str, str] = {}
        """Environment of the next start."""
        self.over = False
        self.ended: list[tuple[float, int]] = []
        """When each of its commands ended, and with which code."""
        self._folder, self._arguments, self._environment = folder, arguments, environment
        self.command = self._start()

    def _start(self) -> Command:
        return Command(self._folder, self._arguments, {**self._environment, **self.extra})

    def moves_to(self, release: Path) -> None:
        """Have its next command run the code of a release."""
        self._environment["PYTHONPATH"] = f"{release}{os.pathsep}{self._environment['PYTHONPATH']}"

    def children(self, title: str = "durable:") -> list[int]:
        """Pids of its living children whose process name begins so; cheap, since faults look often."""
        return family(self.command.pid, title)

    def tend(self) -> None:
        """Start it again if it has ended, unless that was meant."""
        code = self.command.process.poll()
        if code is not None and not self.over:
            self.ended.append((time.monotonic(), code))
            self.command = self._start()


class Fleet:
    """Worker commands, beats and producers. Every second worker and beat and every producer goes through the proxy.

    homes  which command each process belonged to, by pid
    """

    def __init__(
        self,
        folder: Path,
        postgres: Postgres,
        seed: int,
        workers: int,
        children: int,
        pools: Sequence[str],
    ) -> None:
        self.homes: dict[int, str] = {}
        self.folder, self.seed = folder, seed
        self.effects, self.clients = folder / "effects", folder / "clients"
        for made in (self.effects, self.clients):
            made.mkdir()
        self.proxy = Proxy(postgres.dsn)
        self.generation = 1
        self._releases, self._releasing = 0, threading.Lock()
        self._dsn, self._through = postgres.dsn, psycopg.conninfo.make_conninfo(
            postgres.dsn, host="127.0.0.1", port=self.proxy.port, sslmode="disable", gssencmode="disable"
        )  # fmt: skip
        self._producers_started = 0
        self.deploy()
        arguments = ["worker", "-c", str(children), "-l", "info"]
        self.workers = [
            Place(
                f"worker-{n}",
                folder,
                [*arguments, "-P", pools[(n + seed) % len(pools)], "-n", f"w{n}"],
                self._environment(n % 2 == 1),
            )
            for n in range(workers)
        ]
        self.beats = [Place(f"beat-{n}", folder, ["beat", "-n", f"b{n}"], self._environment(n == 1)) for n in range(2)]
        self.producers: list[subprocess.Popen[bytes]] = []
        self.producers = [self._producer(n) for n in range(2)]
        self.tending = True
        self._tender = threading.Thread(target=self._tend, daemon=True, name="tender")
        self._tender.start()

    @property
    def places(self) -> list[Place]:
        return [*self.workers, *self.beats]

    def deploy(self) -> int:
        """Write the next version of the code; who is reloaded loads it."""
        written = self.folder / "tasks.py.new"
        written.write_text(TASKS_PY.format(generation=self.generation))
        written.rename(self.folder / "tasks.py")
        self.generation += 1
        return self.generation - 1

    def release(self) -> Path:
        """Make the package's next release: the code as it is, and one more migration, which breaks nothing."""
        with self._releasing:
            self._releases += 1
            made = self.folder / f"release-{self._releases}"
            for package in ("durable", "durable_cli"):
                shutil.copytree(ROOT / package, made / package, ignore=shutil.ignore_patterns("__pycache__"))
            newest = migrations.known()[-1].id
            for n in range(1, self._releases + 1):
                file = made / "durable" / "sql" / "migrations" / f"{newest + n:04}_release_{n}.sql"
                file.write_text(MIGRATION.format(n=n))
            return made

    def migrate(self, release: Path) -> int:
        """Run `durable migrate` of a release; return its exit code."""
        path = f"{release}{os.pathsep}{self._environment(False)['PYTHONPATH']}"
        with (self.folder / f"migrate-{release.name}.log").open("wb") as output:
            return subprocess.run(
                [sys.executable, "-m", "durable_cli", "migrate", "--schema", SCHEMA],
                cwd=self.folder, env={**os.environ, "DURABLE_DSN": self._dsn, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=120, check=False,
            ).returncode  # fmt: skip

    def kill_producer(self, n: int) -> int:
        """SIGKILL one and start another; return the pid of the dead."""
        victim = self.producers[n]
        victim.kill()
        victim.wait()
        self.producers[n] = self._producer(n)
        return victim.pid

    def stop_producers(self) -> None:
        for producer in self.producers:
            producer.terminate()
        for producer in self.producers:
            producer.wait(60)

    def stop(self, places: list[Place]) -> dict[str, int]:
        """SIGTERM these, once they work, for good; return exit codes by name."""
        until = time.monotonic() + 60
        while not all(map(working, places)) and time.monotonic() < until:
            time.sleep(0.1)
        for place in places:
            place.over = True
        for place in places:
            if place.command.process.poll() is None:
                place.command.process.send_signal(signal.SIGTERM)
        return {place.name: place.command.process.wait(60) for place in places}

    def kill(self) -> None:
        """End whatever is left, at once."""
        self.tending = False
        self._tender.join()
        for process in [*self.producers, *(place.command.process for place in self.places)]:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.proxy.close()

    def logs(self) -> Iterator[Path]:
        """What its processes have printed."""
        yield from sorted(self.folder.glob("*.log"))

    def _environment(self, through: bool) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {
            "DURABLE_DSN": self._through if through else self._dsn,
            "CHAOS_EFFECTS": str(self.effects),
            "PYTHONPATH": path,
            "DURABLE_DRAIN_TIMEOUT": "5",
            "DURABLE_CALL_TIMEOUT": "5",
        }

    def _producer(self, n: int) -> subprocess.Popen[bytes]:
        self._producers_started += 1
        name = f"p{n}.{self._producers_started}"
        log = self.clients / f"{name}.jsonl"
        with (self.folder / f"producer-{name}.log").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.client", name, f"{self.seed}:producer:{name}", str(log)],
                cwd=ROOT, env={**os.environ, **self._environment(True)},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _tend(self) -> None:
        while self.tending:
            for place in self.places:
                place.tend()
                self.homes.update(dict.fromkeys(place.children(), place.name))
            time.sleep(0.2)


def prepare(postgres: Postgres) -> Durable:
    """Make the schema, the tables of the load, and the slot that keeps the history; return an app for the harness."""
    os.environ["DURABLE_DSN"] = postgres.dsn
    app = build()
    app.migrate()
    with postgres.connect() as connection:
        connection.execute("CREATE TABLE public.ledger (instance bigint, version int, token int)")
        connection.execute("CREATE TABLE public.markers (key text)")
        publish(connection)
    return app


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """SIGSTOP processes for the block; those that die meanwhile are gone."""
    for pid in pids:
        _signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has died meanwhile
        os.kill(pid, number)


def working(place: Place) -> bool:
    """Whether its command heeds signals already: a worker has children, a beat has said that it starts."""
    return bool(place.children()) or " starts" in place.command.output()


def family(parent: int, title: str) -> list[int]:
    """Pids of a process's living children whose name begins with `title`."""
    found = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            pids = task.read_text().split()
        except OSError:
            continue  # that thread has ended
        for pid in pids:
            try:
                name = Path(f"/proc/{pid}/comm").read_text(errors="replace")
            except OSError:
                continue
            if name.startswith(title) and alive(int(pid)):
                found.append(int(pid))
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def dump(path: Path, rows: Any) -> None:
    """Write rows as JSON, for people."""
    path.write_text(json.dumps(rows, default=str, indent=0))
