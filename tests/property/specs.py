"""What the machines draw: events, specs of instances, and the programs they run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from tests.property.program import SPEC

NAMES = ("go", "go", "stop")
KEYS = ("k1", "k2")
LIMITS = ("solo", "gate:1")


def events(table: Sequence[tuple[int, str, dict[str, Any]]]) -> st.SearchStrategy[Any]:
    """Events by weight, each a method's name and its arguments.

    Drawn by one rule: of many rules hypothesis leaves most out of each example, so that little comes together.
    """
    given = {name: st.tuples(st.just(name), st.fixed_dictionaries(arguments)) for _, name, arguments in table}
    names = [name for weight, name, _ in table for _ in range(weight)]
    return st.sampled_from(names).flatmap(lambda name: given[name])


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    """The usual value, or half of the time another."""
    return st.sampled_from([*[usual] * len(others), *others])


def spec(kind: str, todo: Any = (), **options: Any) -> dict[str, Any]:
    """A spec without a tag."""
    return SPEC | {"kind": kind, "todo": todo, **options}


# Few choices, each of a whole thing: hypothesis ends an example after so many.
_WORK, _AT_LAST, _HOPELESS = spec("work", 7), spec("shaky", 1), spec("shaky", 3)
_SLEEPER = spec("walk", [["await", ["go"], 1, None, 0]])
_TIMED = spec("walk", [["await", ["go", "stop"], 2, 60, 1], ["stop"]])
_FAILURES = [
    spec("walk", [["raise"]]),
    spec("walk", [["next", 0, True], ["stop"]]),
    spec("walk", [["retry", 1, 0], ["raise"]], key="k1", scope=["failed"]),
    spec("walk", [["spawn", [spec("walk", [["stop"]]), _SLEEPER]]]),
]
_FAMILIES = [
    [],
    [_WORK],
    [_WORK, _WORK, _HOPELESS],
    [_SLEEPER],
    [spec("walk", [["raise"]]), spec("walk", [["stop"]], key="k2", scope=["failed"]), _SLEEPER],
    [_WORK | {"key": "k1", "scope": ["done"]}, _SLEEPER],
    [_WORK | {"key": "k1"}, _WORK | {"key": "k1"}, _WORK | {"key": "k2", "delay": 60}],
    [spec("walk", [["next", 0, True], ["spawn", [_WORK, _SLEEPER]]]), _AT_LAST],
    [spec("walk", [["spawn", [_TIMED]], ["stop"]], key="k2"), _WORK | {"limit": "solo"}],
]
_AWAITS = [
    ["await", ["go"], 1, None, 0],
    ["await", ["go", "stop"], 1, 60, 0],
    ["await", ["go"], 2, None, 2],
    ["await", ["go", "stop"], 2, 120, 1],
]
_NEXTS = [["next", 0, False], ["next", 0, True], ["next", 60, True]]
_HOPS = [
    *([hop] for hop in (*_NEXTS, *_AWAITS, ["retry", 2, 60])),
    *([awaits, follows] for awaits in _AWAITS[:2] for follows in (*_NEXTS[:2], ["retry", 1, 0]) for _ in range(2)),
    *([["spawn", family]] for family in _FAMILIES),
]
_PROGRAMS = st.builds(
    lambda hops, end, rerun: spec("walk", [*itertools.chain(*hops), *end], rerun=rerun),
    st.lists(st.sampled_from(_HOPS), min_size=1, max_size=3),
    mostly([], [["stop"]], [["raise"]]),
    mostly(False, True),
)
_KINDS = st.one_of(_PROGRAMS, _PROGRAMS, _PROGRAMS, st.sampled_from([_WORK, _AT_LAST, _HOPELESS, *_FAILURES]))
_OPTIONS = [
    *({"key": key, "scope": scope} for key in KEYS for scope in (None, None, [], ["done"], ["failed", "cancelled"])),
    *({"limit": limit} for limit in (*LIMITS, *LIMITS)),
    {"limit": "solo", "queue": "other"},
    {"queue": "other", "priority": -1},
    {"key": "k1", "delay": 120, "expires": 240, "priority": 5},
    {"delay": 60},
    {"expires": 60},
]
"""What a limited row is claimed for is not all foretold, so that none may expire unseen."""


def specs() -> st.SearchStrategy[dict[str, Any]]:
    """Specs without tags."""
    return st.builds(lambda drawn, options: drawn | options, _KINDS, mostly({}, *_OPTIONS))


def tagged(spec: dict[str, Any], tags: Any) -> dict[str, Any]:
    """A spec with tags of its own, its children too."""
    if spec["kind"] != "walk":
        return spec | {"tag": next(tags)}
    todo = [["spawn", [tagged(child, tags) for child in op[1]]] if op[0] == "spawn" else op for op in spec["todo"]]
    return spec | {"tag": next(tags), "todo": todo}
