"""Every operation that changes rows meets every other at each of its statements, in both orders.

The first is held before each of its statements after the first and before its COMMIT; there the second runs until it is
through or waits for a lock; then the first commits, or rolls back. Whatever happened, it must be as if one had come
after the other: the same rows, signals, counters and answers. Where it is not, `allowed` says why that is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

import pytest

from tests.races.pairs.allowed import MAY_WAIT, ODD, PASS_BY, TAKE_TURNS, violations
from tests.races.pairs.meeting import Ended, Pair, Turns
from tests.races.pairs.operations import OPERATIONS, SEVERAL
from tests.races.pairs.world import EXECUTING, PARENT, PARKED, RUNNABLE, Traits

PAIRS = list(
    dict.fromkeys(
        pair for one, two in combinations_with_replacement(OPERATIONS, 2) for pair in ((one, two), (two, one))
    )
)
# Where both are about one and the same row, whichever it is.
TARGETS = (EXECUTING, PARKED)


@pytest.fixture(scope="module")
def pair(database: str) -> Iterator[Pair]:
    pair = Pair(database)
    yield pair
    pair.close()


def traits(first: str, second: str) -> Traits:
    needs = OPERATIONS[first].needs | OPERATIONS[second].needs
    return needs - {"keyed"} if "gated" in needs else needs


def targets(first: str, second: str) -> tuple[int, ...]:
    about = [OPERATIONS[name].about for name in (first, second)]
    chosen = next((row for row in about if row is not None), None)
    return TARGETS if chosen is None else (chosen,)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_that_meet_end_as_if_one_had_come_after_the_other(pair: Pair, first: str, second: str) -> None:
    odd = [
        where
        for target in targets(first, second)
        for where in _meet_everywhere(pair, traits(first, second), target, first, second)
    ]
    assert bool(odd) == ((first, second) in ODD), "\n".join(odd)


@pytest.mark.parametrize(("first", "second"), list(product(SEVERAL, repeat=2)))
def test_two_that_lock_several_rows_do_not_deadlock_in_the_middle_of_them(pair: Pair, first: str, second: str) -> None:
    for row in (PARENT, EXECUTING, RUNNABLE, PARKED):
        for target in targets(first, second):
            ended = pair.behind(traits(first, second), target, first, second, row)
            assert violations(ended.state) == [], f"{first!r}, then {second!r}, while row {row} was held"


def _meet_everywhere(pair: Pair, world: Traits, target: int, first: str, second: str) -> Iterator[str]:
    """Yield where they ended as neither order would have it."""
    one, two = (first, 0), (second, 1)
    both: tuple[Turns, ...] = ((one, two), (two, one))
    alone: tuple[Turns, ...] = ((two,),)
    for order in (*both, *alone):
        assert violations(pair.one_after_the_other(world, target, order).state) == [], order
    names = pair.statements(world, target, first)
    for at in range(1, len(names) + 1):
        for commits in (True, False) if at == len(names) else (True,):
            point = f"before {names[at]}" if at < len(names) else "before its COMMIT"
            where = f"{first!r} was held {point}, {second!r} met it (row {target})"
            where += "" if commits else "; it was rolled back"
            ended = pair.meet(world, target, first, second, at, commits)
            assert violations(ended.state) == [], where
            if ended.waited:
                assert second not in PASS_BY or (first, second) in MAY_WAIT, f"{where} and waited for it"
            orders = both if commits else alone
            serials = [pair.one_after_the_other(world, target, order) for order in orders]
            if any(same(ended, serial) for serial in serials):
                continue
            turns = tuple(turn for turn in (two, one) if turn[0] in TAKE_TURNS and (commits or turn == two))
            if turns:
                after = pair.settle(world, target, turns)
                if any(after == pair.settled(world, target, order, turns) for order in orders):
                    continue
            yield f"{where}: turns of {[name for name, _ in turns]} don't mend it\n" + differences(ended, serials)


def same(one: Ended, other: Ended) -> bool:
    return one.state.shape() == other.state.shape() and one.answers == other.answers


def differences(ended: Ended, serials: list[Ended]) -> str:
    lines = []
    for serial in serials:
        lines.append(f"answers {ended.answers} instead of {serial.answers}")
        mine, theirs = ended.state.shape(), serial.state.shape()
        for name in mine:
            lines += [f"  {name} has {row}" for row in mine[name] if row not in theirs[name]]
            lines += [f"  {name} lacks {row}" for row in theirs[name] if row not in mine[name]]
    return "\n".join(lines)
