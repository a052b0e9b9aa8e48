"""Every sub-command runs, at the smallest size, and says and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner, Result

from benchmarks import idle, steady
from benchmarks.__main__ import main
from benchmarks.catalogue import BENCHMARKS
from benchmarks.database import Database
from benchmarks.figures import Measure
from benchmarks.peers import measure
from benchmarks.peers.base import Finished, Peer
from benchmarks.peers.catalogue import PEERS
from benchmarks.registry import Benchmark, Size

SMALL = {
    "enqueue": 20,
    "drain": 30,
    "steps": 5,
    "latency": 2,
    "signals": 8,
    "fanout": 5,
    "limits": 20,
    "backlog": 100,
    "snapshot": 20,
    "idle": 1,
    "memory": 40,
    "peers": 20,
}


class Absent(Peer):
    """A peer that nobody can install."""

    name = "absent"
    setting = "none"
    distributions: ClassVar[tuple[str, ...]] = ("durable-no-such-distribution",)

    def prepare(self) -> None:
        raise AssertionError

    def fill(self, count: int) -> None:
        raise AssertionError

    def pace(self, count: int, interval: float) -> None:
        raise AssertionError

    def work(self, processes: int) -> None:
        raise AssertionError

    def finished(self) -> Finished:
        raise AssertionError


def invoke(database: str, *arguments: str) -> Result:
    """Run `python -m benchmarks` in this process, on this test's database."""
    return CliRunner().invoke(main, arguments, env={"BENCH_DSN": database, "COLUMNS": "200"}, catch_exceptions=False)


def test_every_command_of_the_catalogue_is_run_here() -> None:
    assert {one.name for one in BENCHMARKS} == set(SMALL) == set(main.commands) - {"compare"}


@pytest.mark.parametrize("name", list(SMALL))
def test_a_command_says_and_writes_what_it_found(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(idle, "SETTLE", 0.0)
    monkeypatch.setattr(measure, "PEERS", (Absent,))
    file = tmp_path / "figures.json"
    options = ["--count", str(SMALL[name]), "--processes", "1", "--runs", "1", "--json", str(file)]
    ran = invoke(database, name, *options)
    assert ran.exit_code == 0, ran.output
    assert "PostgreSQL" in ran.output
    assert "durable" in ran.output
    document = json.loads(file.read_text())
    assert {"PostgreSQL", "Python", "fsync"} <= set(document["surroundings"])
    assert document["measures"]
    for one in document["measures"]:
        for series in one["series"]:
            assert len(series["runs"]) == 1 or series["missing"], (one["what"], series)
    if name == "peers":
        assert "not installed: durable-no-such-distribution" in ran.output


def test_the_bare_command_runs_all_with_their_targets(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, on one schema: what one leaves there is in nobody's way."""
    monkeypatch.setattr(idle, "SETTLE", 0.0)
    monkeypatch.setattr(measure, "PEERS", (Absent,))
    monkeypatch.setattr(steady, "unavailable", lambda kind: "left out of this test")
    file = tmp_path / "figures.json"
    ran = invoke(database, "--scale", "0.0001", "--runs", "1", "--json", str(file))
    assert ran.exit_code == 0, ran.output
    ours = [one for one in json.loads(file.read_text())["measures"] if not one["what"].startswith("peers")]
    assert {len(series["runs"]) for one in ours for series in one["series"] if not series["missing"]} == {1}
    targets = [target for one in ours for target in one["targets"]]
    assert len(targets) == 27
    assert all(isinstance(target["met"], bool) for target in targets)


def test_what_was_measured_outlives_a_benchmark_that_fails(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(place: Database, size: Size) -> list[Measure]:
        raise RuntimeError("no figure today")

    (good,) = (one for one in BENCHMARKS if one.name == "enqueue")
    two = (Benchmark("broken", broken, 1, "nothing"), good)
    monkeypatch.setattr("benchmarks.__main__.BENCHMARKS", two)
    file = tmp_path / "figures.json"
    ran = invoke(database, "--scale", "0.0001", "--runs", "1", "--json", str(file))
    assert ran.exit_code == 1
    assert "no figure today" in ran.output
    assert "of 2 benchmarks 1 failed: broken" in ran.output
    assert len(json.loads(file.read_text())["measures"]) == 2


def test_a_picture_is_drawn(database: str, tmp_path: Path) -> None:
    picture = tmp_path / "figures.svg"
    ran = invoke(database, "enqueue", "--count", "20", "--runs", "1", "--plot", str(picture))
    assert ran.exit_code == 0, ran.output
    assert "<svg" in picture.read_text()


def test_a_picture_without_matplotlib_is_refused_before_anything_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.plot.available", lambda: False)
    ran = invoke("postgresql:///nowhere?host=/nonexistent", "enqueue", "--plot", str(tmp_path / "x.svg"))
    assert ran.exit_code == 2
    assert "durable-pg[bench]" in ran.output


def test_every_peer_says_how_it_is_run_and_what_it_needs() -> None:
    assert len({kind.name for kind in PEERS}) == len(PEERS) == 11
    assert all(kind.setting and kind.distributions and 0 < kind.share <= 1 for kind in PEERS)
    assert set(measure.TIMES) <= {kind.name for kind in PEERS}
