"""The policy of --autoscale."""

from __future__ import annotations

import pytest

from durable.runtime.autoscale import FREE_FOR, WAITED, Autoscale

LATE = WAITED + 0.1


@pytest.mark.parametrize(
    ("wanted", "serving", "free", "oldest", "expected"),
    [
        (2, 2, 0, LATE, 3),
        (2, 2, 0, WAITED - 0.1, 2),
        (2, 2, 0, None, 2),
        (2, 2, 1, LATE, 2),  # somebody is free: the row is about to be taken
        (3, 2, 0, LATE, 3),  # the one asked for before has yet to begin
        (5, 5, 0, LATE, 5),
        (9, 9, 0, None, 5),
        (1, 1, 0, None, 2),
    ],
    ids=["late", "young", "nothing waits", "one is free", "one is on its way", "the most", "too many", "too few"],
)
def test_one_more_when_work_waits_while_nobody_is_free(
    wanted: int, serving: int, free: int, oldest: float | None, expected: int
) -> None:
    assert Autoscale(2, 5).next(0.0, wanted, serving, free, oldest) == expected


def test_one_less_each_time_somebody_was_free_for_long_and_never_below_the_least() -> None:
    policy, wanted = Autoscale(2, 5), 5
    seen = []
    for second in range(45):
        wanted = policy.next(float(second), wanted, wanted, 1, None)
        seen.append(wanted)
    assert seen[int(FREE_FOR) - 1 : int(FREE_FOR) + 1] == [5, 4]
    assert (seen[int(2 * FREE_FOR)], seen[int(3 * FREE_FOR)], seen[-1]) == (3, 2, 2)


def test_a_moment_in_which_all_are_busy_starts_the_wait_anew() -> None:
    policy = Autoscale(1, 5)
    assert policy.next(0.0, 3, 3, 1, None) == 3
    assert policy.next(FREE_FOR - 1, 3, 3, 0, None) == 3
    assert policy.next(FREE_FOR + 1, 3, 3, 1, None) == 3
    assert policy.next(2 * FREE_FOR + 1, 3, 3, 1, None) == 2
