"""Five thousand tasks through a storm: whoever can die dies on the way, and nothing is lost or committed twice."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.embedded import Server
from tests.acceptance.storm import Storm, blow, lines
from tests.fix_app import Command
from tests.fix_db import FAST

COUNT = 5000
TASKS = """
    import os, time

    @app.task(name="work")
    def work(n):
        time.sleep(0.002)
        with open(os.environ["EFFECTS"], "a") as file: file.write(f"{n}\\n")
        return n
"""


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that the test may crash."""
    home = Path(tempfile.mkdtemp(prefix="durable-storm-"))
    home.chmod(0o755)
    server = Server(home, settings={**FAST, "fsync": "on", "full_page_writes": "on"})
    yield server
    server.release()
    server.stop("immediate")
    shutil.rmtree(home, ignore_errors=True)


def test_a_storm_of_deaths_loses_nothing_and_commits_nothing_twice(
    own_server: Server, durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    dsn = own_server.ensure()
    app = Durable("storm", dsn=dsn, schema="storm", connect_timeout=30)
    app.migrate()
    effects = tmp_path / "effects"
    head = f"from durable import Durable\napp = Durable('storm', dsn={dsn!r}, schema='storm')\n"
    (tmp_path / "tasks.py").write_text(head + TASKS.replace("\n    ", "\n"))
    work = app.task(name="work")(_never)
    environment = {"EFFECTS": str(effects)}
    storm = Storm(lambda: durable_worker("worker", "-c", "2", **environment))
    beat = durable_worker("beat", **environment)
    with app.batch():
        results = [work.delay(n) for n in range(COUNT)]

    def restart_beat() -> None:
        nonlocal beat
        beat.process.kill()
        beat.process.wait()
        beat = durable_worker("beat", **environment)

    def restart_postgres() -> None:
        own_server.stop("immediate")
        own_server.ensure()

    faults: list[Callable[[], None]] = [
        lambda: storm.kill_child(0),
        lambda: storm.kill_child(1),
        lambda: storm.kill_command(0),
        restart_postgres,
        restart_beat,
        lambda: storm.kill_agent(1),
        lambda: storm.kill_child(1),
        restart_postgres,
    ]
    blow(faults, lambda: len(lines(effects)), COUNT)

    assert [result.get(timeout=60) for result in results] == list(range(COUNT))
    with psycopg.connect(dsn) as connection:
        rows: list[Any] = connection.execute(
            "SELECT count(*), count(DISTINCT id), min(version), max(version), sum(crashes) FROM storm.history"
        ).fetchall()
        left = connection.execute("SELECT count(*) FROM storm.instances").fetchone()
    assert rows[0][:4] == (COUNT, COUNT, 1, 1)
    assert left == (0,)
    # Effects at least once; twice only where a process died, or the database did, in between.
    ran = effects.read_text().split()
    assert {int(n) for n in ran} == set(range(COUNT))
    assert len(ran) - COUNT < COUNT / 10
    app.close()


def _never(n: int) -> int:
    raise AssertionError("runs on workers only")
