"""The comparison of two revisions: its statistics by known values, its counts, and a tiny run of the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from benchmarks.__main__ import main
from benchmarks.verdict import Count, Pairs, interval
from benchmarks.wire import wire
from benchmarks.workers import ROOT


def compare(database: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["compare", *arguments], env={"BENCH_DSN": database, "COLUMNS": "200"}, catch_exceptions=False
    )


def pairs(*ratios: float, goal: float = 0.97, tail: bool = False) -> Pairs:
    return Pairs("x", "jobs/s", (100.0,) * len(ratios), tuple(100.0 * one for one in ratios), goal, tail=tail)


def test_equal_ratios_have_no_interval() -> None:
    assert interval([1.02] * 12) == (1.02, 1.02)


def test_interval_is_the_binomial_one() -> None:
    """Of 11 ratios the resampled median is at most the second with 0.8 % (binomial), at most the third with 5.0 %."""
    assert interval([float(n) for n in range(1, 12)]) == (3.0, 9.0)


def test_interval_is_the_same_every_time() -> None:
    ratios = [0.9, 1.1, 1.0, 0.95, 1.2, 0.99]
    assert interval(ratios) == interval(ratios)


def test_no_ratios_give_no_interval() -> None:
    with pytest.raises(ValueError, match="no ratios"):
        interval([])


@pytest.mark.parametrize(
    ("one", "holds"),
    [
        (pairs(*[0.97] * 12), True),
        (pairs(*[0.969] * 12), False),
        (pairs(*[0.94] * 4, *[1.0] * 8), True),
        (pairs(*[0.9] * 5, *[1.0] * 7), False),  # the median is 1, the lower end 0.9
        (pairs(*[0.9] * 5, *[1.0] * 7, tail=True), True),
        (pairs(*[0.9] * 12, tail=True), False),
        (pairs(*[0.9] * 12, goal=0.9), True),
        (replace(pairs(*[0.9] * 12), judged=False), True),
    ],
)
def test_goal_needs_median_and_lower_end(one: Pairs, holds: bool) -> None:
    assert one.holds is holds


def test_ratio_of_latencies_is_old_by_new() -> None:
    found = Pairs("p50", "ms", (4.0, 4.0), (2.0, 2.0), 0.97, lower_is_better=True)
    assert found.ratios == [2.0, 2.0]


@pytest.mark.parametrize(
    ("count", "holds"),
    [
        (Count("statements", 100, 105, 0.05), True),
        (Count("statements", 100, 106, 0.05), False),
        (Count("WAL", 1200, 1101, 0.05, limit=1100), False),
        (Count("WAL", 1061, 1061, 0.05, limit=1100), True),
        (Count("statements", 1, 9, 0.05, judged=False), True),
    ],
)
def test_counts_may_not_rise(count: Count, holds: bool) -> None:
    assert count.holds is holds


def test_wire_counts_statements_and_round_trips(database: str) -> None:
    with wire(database) as counter, psycopg.connect(counter.dsn, autocommit=True) as connection:
        for n in range(3):
            connection.execute("SELECT %s::int", [n], prepare=True)  # the first is prepared in a round trip
        connection.execute("SELECT 'simple'")
        assert (counter.statements["SELECT $1::int"], counter.statements.total()) == (3, 4)
        assert counter.round_trips == 5
        with connection.pipeline():
            for n in range(5):
                connection.execute("SELECT %s::int", [n], prepare=True)
        assert counter.statements["SELECT $1::int"] == 8
        assert counter.round_trips < 10


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the old side comes from git")
def test_same_revision_counts_the_same(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compare.COUNT_ROUNDS", 1)
    file = tmp_path / "compared.json"
    ran = compare(database, "HEAD", "--what", "drain", "--pairs", "2", "--seconds", "0.1", "--goal", "100",
                  "--json", str(file))  # fmt: skip
    assert ran.exit_code == 1
    assert "not reached: drain: no-op jobs" in ran.output
    document = json.loads(file.read_text())
    (figure,) = document["figures"]
    assert (len(figure["old"]), len(figure["new"]), len(figure["ratios"]), figure["holds"]) == (2, 2, 2, False)
    counts = {one["what"]: one for one in document["counts"]}
    assert len(counts) == 3
    wal = counts["drain: WAL, bytes per no-op job"]
    assert min(wal["old"], wal["new"]) > 1000  # more, when other tests write at the same time
    assert document["compared"]["old"] == document["compared"]["new"].removesuffix(
        " and changes that are not committed"
    )


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the old side comes from git")
def test_reached_goal_ends_with_zero(database: str) -> None:
    ran = compare(database, "HEAD", "--what", "enqueue", "--no-counts", "--pairs", "2", "--seconds", "0.1",
                  "--goal", "0.01")  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "enqueue: delay()" in ran.output
    assert "enqueue: delay() of 16 processes" in ran.output


def test_unknown_revision_is_refused_at_once() -> None:
    ran = compare("postgresql:///nowhere?host=/nonexistent", "no-such-revision", "--what", "drain")
    assert ran.exit_code == 2
    assert "no-such-revision" in ran.output
