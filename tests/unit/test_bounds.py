"""The checker of the mixed load sees what is wrong in a log, and nothing where nothing is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.acceptance.bounds import Firing, Grant, Inside, most_at_once, not_once, too_fast, wrongly_fired


def at(seconds: float) -> datetime:
    return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def inside(*spans: tuple[float, float | None]) -> list[Inside]:
    return [Inside(at(began), None if ended is None else at(ended)) for began, ended in spans]


@pytest.mark.parametrize(
    ("spans", "most"),
    [
        ([], 0),
        ([(0, 1), (1, 2), (2, 3)], 1),
        ([(0, 1), (0.999999, 2)], 2),
        ([(0, 5), (1, 2), (3, 4)], 2),
        ([(0, 9), (1, 8), (2, 7), (7.5, 9)], 3),
        ([(0, None)], 1),
        ([(0, 2), (1, None)], 2),
        ([(0, 2), (1, 1), (1.5, 3)], 2),
        ([(0, None), (0, 2)], 1),
        ([(0, 1), (1, None), (1, 2)], 1),
    ],
    ids=str,
)
def test_an_overlap_of_a_microsecond_is_seen_and_touching_is_none(
    spans: list[tuple[float, float | None]], most: int
) -> None:
    assert most_at_once(inside(*spans)) == most


def grants(*moments: float, took: float = 0.0, weight: int = 1) -> list[Grant]:
    return [Grant(at(moment - took), at(moment), weight) for moment in moments]


def test_a_rate_is_kept_to_its_burst_and_then_to_its_time() -> None:
    assert too_fast(grants(0, 0, 0, 0.1, 0.2), 10.0, 3) == []
    assert too_fast(grants(0, 0, 0, 0), 10.0, 3) == ["4 within 0.000 s"]
    assert too_fast(grants(0, 0, 0, 0.1, 0.19), 10.0, 3) == ["5 within 0.190 s"]


def test_a_burst_in_the_middle_of_a_quiet_log_is_seen() -> None:
    assert "2 within 0.000 s" in too_fast(grants(0, 10, 10, 20), 0.1, 1)


def test_a_claim_that_took_long_may_have_happened_at_its_beginning() -> None:
    assert too_fast(grants(0.05, 0.1, took=0.05), 10.0, 1) == []
    assert too_fast(grants(0.05, 0.1, took=0.04), 10.0, 1) == ["2 within 0.090 s"]


def test_heavy_rows_count_as_what_they_weigh() -> None:
    assert too_fast(grants(0, 0.3, weight=3), 10.0, 3) == []
    assert too_fast(grants(0, 0.2, weight=3), 10.0, 3) == ["6 within 0.200 s"]


def test_effects_that_are_missing_doubled_or_unheard_of_are_seen() -> None:
    expected = [(1, "a"), (1, "b"), (2, "a")]
    assert not_once(expected, reversed(expected)) == {}
    assert not_once(expected, [(1, "a"), (2, "a"), (2, "a"), (3, "a")]) == {(1, "b"): 0, (2, "a"): 2, (3, "a"): 1}


def test_occurrences_that_are_left_out_doubled_or_not_inserted_are_seen() -> None:
    second = timedelta(seconds=1)
    fired = [Firing(at(0), at(1), 1), Firing(at(1), at(3), 2)]
    assert wrongly_fired(fired, second, 3) == []
    assert len(wrongly_fired(fired, second, 4)) == 1
    assert len(wrongly_fired([Firing(at(0), at(2), 1)], second, 1)) == 1
    assert len(wrongly_fired([fired[0], Firing(at(2), at(3), 1)], second, 2)) == 1
    assert len(wrongly_fired([fired[0], fired[0]], second, 2)) == 1
