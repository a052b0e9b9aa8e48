"""Two hosts, of which one loses the network without a word: no FIN, no RST. Hosts are network namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from durable import Durable
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.fix_proxy import CountingProxy
from tests.surroundings.load import SCHEMA
from tests.surroundings.server import OwnServer

TASKS = """
import os, time
from durable import Durable
app = Durable("around", schema={schema!r})

@app.task(name="where")
def where(n): return os.uname().nodename

@app.task(name="hold")
def hold():
    me = os.uname().nodename
    with open(f"entered-{{me}}", "a") as file: file.write("x")
    while not os.path.exists(f"go-{{me}}"): time.sleep(0.01)
    with open(f"ended-{{me}}", "a") as file: file.write("x")
    return me
"""


class Host:
    """A network namespace with a name of its own, and one link to us."""

    def __init__(self, name: str, number: int) -> None:
        slot = os.getpid() % 4096 * 16 + number * 4  # addresses that are set aside for measurements
        self.address, self._theirs = (f"198.18.{slot >> 8}.{(slot & 255) + n}" for n in (1, 2))
        self.name = name
        self._space, self._link = f"durable-{os.getpid()}-{name}", f"dur{os.getpid()}{name}"
        ip("netns", "add", self._space)

    def connect(self) -> None:
        """Make the link."""
        ip("link", "add", self._link, "type", "veth", "peer", "name", "up0", "netns", self._space)
        ip("addr", "add", f"{self.address}/30", "dev", self._link)
        ip("link", "set", self._link, "up")
        ip("-n", self._space, "addr", "add", f"{self._theirs}/30", "dev", "up0")
        ip("-n", self._space, "link", "set", "up0", "up")
        ip("-n", self._space, "link", "set", "lo", "up")

    @property
    def inside(self) -> list[str]:
        """What executes a command there."""
        name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self._space, *name]

    def link(self, state: str) -> None:
        """Pull the cable, at our end, or put it back."""
        ip("link", "set", self._link, state)

    def close(self) -> None:
        ip("netns", "delete", self._space)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("network namespaces need root, ip (iproute2), unshare and hostname")
    with ExitStack() as stack:
        try:
            moon, mars = (stack.enter_context(closing(Host(name, n))) for n, name in enumerate(("moon", "mars")))
            moon.connect()
            mars.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield moon, mars


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _never(*_: object) -> str:
    raise AssertionError("runs on workers only")


def test_a_host_that_is_cut_off_loses_its_claims_commits_nothing_of_them_and_works_on_when_it_is_back(
    own_server: Callable[..., OwnServer],
    hosts: tuple[Host, Host],
    durable_worker: Callable[..., Command],
    tmp_path: Path,
) -> None:
    server, (moon, mars) = own_server(), hosts
    (tmp_path / "tasks.py").write_text(TASKS.format(schema=SCHEMA))
    app = Durable("around", dsn=server.dsn, schema=SCHEMA)
    where, hold = app.task(name="where")(_never), app.task(name="hold")(_never)
    proxies = {host: CountingProxy(server.dsn, host.address) for host in hosts}

    def worker(host: Host, processes: int) -> Command:
        return durable_worker("worker", "-c", f"{processes}", inside=host.inside, DURABLE_DSN=proxies[host].dsn)

    zombie = worker(moon, 2)
    before = zombie.started(count=3)
    held = [hold.delay(), hold.delay()]
    wait_until(lambda: read(tmp_path / "entered-moon") == "xx", what="both steps on the moon")
    other = worker(mars, 4)
    other.started(count=5)

    moon.link("down")
    (tmp_path / "go-moon").touch()
    with app.batch():
        results = [where.delay(n) for n in range(200)]
    assert {result.get(timeout=30) for result in results} == {"mars"}
    wait_until(lambda: read(tmp_path / "entered-mars") == "xx", what="both steps anew on mars")
    assert read(tmp_path / "ended-moon") == "xx", "their outcomes are on their way, but the link is down"
    assert "ran out" in other.output()
    assert "lost its lease" not in zombie.output()
    moon.link("up")

    wait_until(lambda: zombie.output().count("lost its lease") == 2, 40, "a host that hears of its loss")
    wait_until(lambda: where.delay(1).get(timeout=30) == "moon", 40, "work of the host that is back")
    assert [result.status for result in held] == ["executing", "executing"]
    (tmp_path / "go-mars").touch()
    assert [result.get(timeout=30) for result in held] == ["mars", "mars"]
    assert zombie.children() == before
    assert server.run(f"SELECT DISTINCT version, status FROM {SCHEMA}.history") == [(1, "done")]
    assert (zombie.stop(), other.stop()) == (0, 0)
    app.close()
    for proxy in proxies.values():
        proxy.close()
