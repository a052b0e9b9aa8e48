"""A fixed set of short storms; the long ones are `python -m tests.chaos --seeds 1-10 --seconds 120`."""

from __future__ import annotations

import pytest

from tests.chaos import nemesis
from tests.chaos.run import run_seed
from tests.chaos.table import FAULTS, chosen

SECONDS = 30.0
OLDER = ("kill-*", "stop-*", "deploy-*", "terminate-backends", "crash-postgres", "lock-table", "disk-full",
         "skew-clock", "net-*")  # fmt: skip
FAULTS_OF_SEED = {
    1: tuple(chosen(OLDER)),
    2: ("crash-postgres", "net-lose-answer", "terminate-backends", "net-cut", "kill-child"),
    3: ("deploy-schema", "deploy-restart", "deploy-reload", "kill-supervisor", "kill-agent"),
}
"""All of the older ones; those after which nobody knows what was committed; old and new code on old and new schemas."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", FAULTS_OF_SEED)
def test_no_promise_is_broken_while_everything_breaks(seed: int) -> None:
    verdict = run_seed(seed, SECONDS, workers=2, children=2, only=FAULTS_OF_SEED[seed])
    print(verdict.line())
    assert verdict.violations == []
    assert verdict.injected >= 3, verdict.line()
    assert verdict.steps > 100, verdict.line()


def test_the_faults_of_a_seed_are_always_the_same() -> None:
    one, other = (nemesis.plan(7, 120.0)[0] for _ in range(2))
    assert one == other
    assert len(one) > 60
    assert nemesis.plan(8, 120.0)[0] != one
    assert {planned.fault.name for planned in nemesis.plan(7, 2000.0)[0]} <= {fault.name for fault in FAULTS}


def test_faults_are_chosen_by_pattern() -> None:
    assert chosen(["silent-*", "kill-child"]) == ["silent-one", "silent-share", "kill-child"]
    with pytest.raises(ValueError, match="no fault is called fork"):
        chosen(["fork"])
