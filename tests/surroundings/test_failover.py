"""A standby that is promoted in mid-load because the primary is gone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.surroundings.load import Load
from tests.surroundings.server import OwnServer


@pytest.fixture
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[OwnServer], OwnServer]]:
    """Start a standby of a server, from a base backup."""
    started: list[OwnServer] = []

    def start(primary: OwnServer) -> OwnServer:
        running = primary.server.status()
        assert running.binaries is not None
        program = running.binaries / "pg_basebackup"
        if not program.exists():
            pytest.skip(f"no pg_basebackup in {running.binaries}")
        home = primary.home.with_name(f"{primary.home.name}-standby")
        home.mkdir()
        home.chmod(0o755)
        owner = (primary.home / "data").stat()
        (home / "data").mkdir(mode=0o700)
        os.chown(home / "data", owner.st_uid, owner.st_gid)
        by = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        subprocess.run(
            [program, "-D", home / "data", "-d", primary.admin, "-X", "stream", "-c", "fast", "-R"],
            check=True, capture_output=True, cwd="/", env={"LC_ALL": "C"}, **by,
        )  # type: ignore[call-overload]  # fmt: skip
        started.append(OwnServer(home))
        return started[-1]

    yield start
    for server in started:
        server.close()


def either(*servers: OwnServer) -> str:
    """A DSN that leads to whichever of these takes writes."""
    parts = [conninfo_to_dict(server.dsn) for server in servers]
    hosts, ports = (",".join(str(part[name]) for part in parts) for name in ("host", "port"))
    return make_conninfo(servers[0].dsn, host=hosts, port=ports, target_session_attrs="read-write")


def test_a_synchronous_standby_takes_over_and_nothing_that_was_acknowledged_is_lost(
    own_server: Callable[..., OwnServer],
    standby: Callable[[OwnServer], OwnServer],
    load: Callable[..., Load],
    durable_worker: Callable[..., Command],
    tmp_path: Path,
) -> None:
    primary = own_server()
    second = standby(primary)
    primary.run("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.run("SELECT pg_reload_conf()")
    state = "SELECT sync_state FROM pg_stat_replication"
    wait_until(lambda: primary.run(state) == [("sync",)], what="a synchronous standby")
    producing = load(either(primary, second), second.admin, timeout=2.0)
    worker = durable_worker("worker", "-c", "3", **producing.environment)
    before = worker.started(count=4)
    producing.start()
    producing.finished(50)

    # The standby receives nothing more, so that what is acknowledged from now on would be lost.
    ((receiver,),) = second.run("SELECT pid FROM pg_stat_wal_receiver")
    os.kill(receiver, signal.SIGSTOP)
    waiting = "SELECT count(*) >= 2 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    wait_until(lambda: primary.run(waiting) == [(True,)], what="commits that wait for the standby")
    primary.server.stop("immediate")
    os.kill(receiver, signal.SIGCONT)
    wait_until(lambda: "the database can't be reached" in worker.output(), what="workers that miss it")
    wait_until(lambda: len(producing.errors) >= 2, what="producers that are told so")
    last = max(producing.acknowledged)
    assert second.run("SELECT pg_is_in_recovery()") == [(True,)]
    second.run("SELECT pg_promote()")

    producing.progress()
    producing.finished()
    assert max(producing.acknowledged) > last
    assert worker.children() == before
    producing.settle()
    assert "the database is back" in worker.output()
    assert worker.stop() == 0
