"""What the benchmarks compute from their runs, where a mistake would be a wrong figure in the docs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.figures import FLOOR, OURS, Measure, Series, Target, interleave, interleave_many, percentile, ratio
from benchmarks.peers.base import Finished


def test_the_median_of_an_even_number_of_runs_lies_between_the_middle_ones() -> None:
    assert Series("x", [4.0, 1.0, 3.0, 100.0]).median == 3.5


def test_a_series_without_runs_has_no_median_and_says_why() -> None:
    with pytest.raises(ValueError, match=r"oban has no runs: not installed: oban"):
        _ = Series("oban", missing="not installed: oban").median


def test_a_ratio_compares_the_runs_of_one_round() -> None:
    """The second round was disturbed, for both alike; medians of each side would say 1.5."""
    assert ratio(Series("a", [20.0, 5.0, 30.0]), Series("b", [10.0, 2.5, 15.0])) == 2.0
    assert ratio(Series("a", [1.0, 3.0, 9.0]), Series("b", [1.0, 1.0, 9.0])) == 1.0


def test_rounds_of_different_length_are_not_compared() -> None:
    with pytest.raises(ValueError):
        ratio(Series("a", [1.0, 2.0]), Series("b", [1.0]))


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def run(name: str, value: float) -> float:
        order.append(name)
        return value

    series = interleave(2, {"a": lambda: run("a", 1.0), "b": lambda: run("b", 2.0)})
    assert order == ["a", "b", "a", "b"]
    assert [(one.name, one.runs) for one in series] == [("a", [1.0, 1.0]), ("b", [2.0, 2.0])]


def test_runs_of_several_figures_are_sorted_by_figure() -> None:
    found = interleave_many(2, {"a": lambda: {"p50": 1.0, "p99": 2.0}, "b": lambda: {"p50": 3.0}})
    assert {figure: {one.name: one.runs for one in series} for figure, series in found.items()} == {
        "p50": {"a": [1.0, 1.0], "b": [3.0, 3.0]},
        "p99": {"a": [2.0, 2.0]},
    }


@pytest.mark.parametrize(("percent", "expected"), [(50, 50.0), (99, 99.0), (100, 100.0), (1, 1.0)])
def test_a_percentile_is_one_of_the_values(percent: int, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], percent) == expected


def test_a_percentile_of_few_values_is_the_largest() -> None:
    assert percentile([3.0, 1.0], 99) == 3.0


@pytest.mark.parametrize(
    ("target", "reached", "met"),
    [
        (Target(OURS, 0.65, FLOOR), 0.6, False),
        (Target(OURS, 0.6, FLOOR), 0.6, True),
        (Target(OURS, 50, None, True), 60.0, False),
        (Target(OURS, 60, None, True), 60.0, True),
        (Target(OURS, 2, "oban"), None, None),
        (Target("pgqueuer", 2), None, None),
    ],
)
def test_a_target_is_met_missed_or_not_measured(target: Target, reached: float | None, met: bool | None) -> None:
    measure = Measure("x", "y", [Series(FLOOR, [100.0]), Series(OURS, [60.0]), Series("oban", missing="why")], [target])
    assert (measure.reached(target), measure.met(target)) == (reached, met)


def test_table_and_json_say_the_figure_the_ratio_the_verdict_and_what_is_missing(tmp_path: Path) -> None:
    measure = Measure(
        "drain",
        "jobs/s",
        [
            Series(FLOOR, [100.0, 200.0]),
            Series(OURS, [80.0, 160.0]),
            Series("oban", setting="limit 100", missing="not installed: oban"),
        ],
        [Target(OURS, 0.65, FLOOR), Target(OURS, 8, "oban")],
    )
    console = Console(width=120, record=True, file=io.StringIO())
    report.show(console, {"PostgreSQL": "18.6"}, [measure])
    report.write_json(tmp_path / "figures.json", {"PostgreSQL": "18.6"}, [measure])
    text = console.export_text()
    for expected in (
        "120 (80 to 160)",
        "0.80",
        "limit 100",
        "not installed: oban",
        "not measured",
        "PostgreSQL 18.6",
    ):
        assert expected in text
    document = json.loads((tmp_path / "figures.json").read_text())
    assert document["surroundings"] == {"PostgreSQL": "18.6"}
    (written,) = document["measures"]
    assert written["series"][1] == {
        "name": OURS, "runs": [80.0, 160.0], "setting": "", "missing": "", "median": 120.0,
    }  # fmt: skip
    assert "median" not in written["series"][2]
    assert [target["met"] for target in written["targets"]] == [True, None]


def test_what_had_ended_before_the_first_look_is_not_in_a_peers_rate() -> None:
    assert Finished(100, 10.0, 12.0).rate() == 50.0
    assert Finished(100, 10.0, 12.0, before=40).rate() == 30.0


@pytest.mark.parametrize("found", [Finished(100, 10.0, 10.0), Finished(100, 10.0, 12.0, before=50)])
def test_a_peer_that_was_over_at_the_first_look_has_no_rate(found: Finished) -> None:
    with pytest.raises(ValueError, match="100 tasks that end in one moment tell no rate"):
        found.rate()
