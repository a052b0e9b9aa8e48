"""The checker of the history rejects what it must: one doctored commit at a time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.doctored import LATE, broken_history, executing, finish, insert, live, over, update

PARKED = {"status": "awaiting_signal", "token": "1", "version": "1", "awaits": "{go}", "shown": "{}"}


def signal(number: int = 5, target: int = 1, **columns: Any) -> dict[str, Any]:
    row = {"id": str(number), "target_id": str(target), "name": "go", "dedup_key": None, "consumed": "f"}
    return {**row, **columns}


def sent(**columns: Any) -> list[tuple[str, str, dict[str, Any]]]:
    return [("I", "signals", signal(**columns))]


def schedule(next_at: str, fired: int) -> list[tuple[str, str, dict[str, Any]]]:
    return [("U", "schedules", {"name": "tick", "next_at": next_at, "fired": str(fired), "skipped": "0"})]


def bucket(full_at: str, kind: str = "U") -> list[tuple[str, str, dict[str, Any]]]:
    return [(kind, "buckets", {"bucket": "mail:1", "shard": "0", "full_at": full_at})]


FAMILY = (
    insert(live()),
    update(executing()),
    [
        *update(live(token="1", version="1", status="awaiting_children", children_round="1")),
        *insert(live(2, parent_id="1", parent_round="1")),
        *update(live(token="1", version="1", status="awaiting_children", children_round="1", children_pending="1")),
    ],
    update(executing(2, parent_id="1", parent_round="1")),
)
LEFT = finish(over(2, parent_id="1", parent_round="1"))
GOES_ON = update(live(token="1", version="1", children_round="1"))
RATED = {"rate_limit": "mail:1", "weight": "2"}


@pytest.mark.parametrize(
    "commits",
    [
        (insert(live()), update(executing()), update(executing(version=1)), finish(over(version=2))),
        (
            insert(live()),
            update(executing()),
            update(live(token="1", crashes="1")),
            update(executing(token=2, crashes="1")),
        ),
        (insert(live()), update(executing()), update(live(**PARKED)), [*sent(), *update(live(token="1", version="1"))]),
        (
            insert(live()),
            update(executing()),
            [*sent(), *update(live(**PARKED)), *update(live(token="1", version="1"))],
        ),
        (*FAMILY, [*LEFT, *GOES_ON]),
        (
            schedule("1970-01-01 00:00:01+00", 0),
            [*insert(live(machine="tick")), *schedule("1970-01-01 00:00:02+00", 1)],
        ),
        (
            bucket("1970-01-12 13:46:40+00", "I"),
            insert(live(**RATED)),
            [*update(executing(**RATED)), *bucket("1970-01-12 13:46:42.05+00")],
        ),
        (
            insert(live()),
            update(live(status="cancelled", cancel_requested="t")),
            finish(over(token=0, version=0, status="cancelled")),
        ),
    ],
    ids=["inline", "reaped", "woken", "signalled-first", "joined", "tick", "bucket", "cancelled"],
)
def test_what_is_allowed_is_no_violation(commits: Any) -> None:
    assert broken_history(*commits) == set()


KEYED = {"concurrency_key": "acct:1"}
GATED = {"concurrency_key": "vendor:1", "gate_shard": "0"}
DOCTORED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "a row is deleted without an end": ("I-1", (insert(live()), [("D", "instances", {"id": "1"})])),
    "a row is inserted twice": ("I-7", (insert(live()), insert(live()))),
    "a row begins in the middle": ("I-7", (insert(live(version="2")),)),
    "a row is changed that is not there": ("I-7", (update(live()),)),
    "a parked row is claimed": (
        "I-7",
        (insert(live()), update(executing()), update(live(**PARKED)), update(executing(token=2, version=1))),
    ),
    "a runnable row is parked without an outcome": (
        "I-7",
        (insert(live()), update(live(status="awaiting_children", children_round="1"))),
    ),
    "a version is skipped": ("I-8", (insert(live()), update(executing()), update(live(token="1", version="2")))),
    "a token is skipped": ("I-8", (insert(live()), update(executing(token=2)))),
    "a token falls": ("I-8", (insert(live()), update(executing()), update(live(token="0")))),
    "claim and outcome in one step": ("I-8", (insert(live()), update(executing(version=1)))),
    "an outcome of a row that nobody executes": ("I-11", (insert(live()), update(live(version="1")))),
    "an outcome after the reap": (
        "I-11",
        (
            insert(live()),
            update(executing()),
            update(live(token="1", crashes="1")),
            update(live(token="1", version="1")),
        ),
    ),
    "an end by another worker": ("I-11", (insert(live()), update(executing()), finish(over(worker_id="8")))),
    "an end of an older token": (
        "I-11",
        (
            insert(live()),
            update(executing()),
            update(live(token="1")),
            update(executing(token=2)),
            finish(over(token=1)),
        ),
    ),
    "an inline hop to another worker": (
        "I-11",
        (insert(live()), update(executing()), update(executing(version=1, worker_id="8"))),
    ),
    "an end without its version": ("I-8", (insert(live()), update(executing()), finish(over(version=0)))),
    "an end of what never lived": ("I-7", ([("I", "history", over())],)),
    "attempts by themselves": ("I-16", (insert(live()), update(live(attempt="1")))),
    "attempts in twos": (
        "I-16",
        (insert(live()), update(executing()), update(live(token="1", version="1", attempt="2"))),
    ),
    "crashes of who did not execute": ("I-16", (insert(live()), update(live(crashes="1")))),
    "crashes that an outcome keeps": (
        "I-16",
        (insert(live()), update(executing(crashes="1")), update(live(token="1", version="1", crashes="1"))),
    ),
    "given up after one crash": (
        "I-17",
        (insert(live()), update(executing()), update(live(status="failed", token="1", crashes="1"))),
    ),
    "a claim after the cancel": ("I-18", (insert(live(cancel_requested="t")), update(executing()))),
    "an outcome that ignores the cancel": (
        "I-18",
        (insert(live()), update(executing(cancel_requested="t")), update(live(token="1", version="1"))),
    ),
    "a finished row that goes on": ("I-18", (insert(live()), update(live(status="cancelled")), update(live()))),
    "a claim before its time": ("I-20", (insert(live(eligible_at=LATE)), update(executing()))),
    "two of a key": (
        "I-27",
        (insert(live(**KEYED)), insert(live(2, **KEYED)), update(executing(**KEYED)), update(executing(2, **KEYED))),
    ),
    "four of a gate of three": (
        "I-28",
        (
            [row for n in range(1, 5) for row in insert(live(n, **GATED))],
            *(update(executing(n, **GATED)) for n in range(1, 5)),
        ),
    ),
    "tokens that nobody paid": (
        "I-30",
        (
            bucket("1970-01-12 13:46:40+00", "I"),
            insert(live(**RATED)),
            [*update(executing(**RATED)), *bucket("1970-01-12 13:46:40+00")],
        ),
    ),
    "more tokens than the burst": ("I-30", (bucket("1970-01-12 13:46:41+00", "I"),)),
    "a signal consumed by no outcome": ("I-33", (insert(live()), sent(), [("D", "signals", {"id": "5"})])),
    "a signal consumed twice": (
        "I-33",
        (
            insert(live()),
            sent(dedup_key="k"),
            [("U", "signals", signal(dedup_key="k", consumed="t"))],
            [("U", "signals", signal(dedup_key="k", consumed="t"))],
        ),
    ),
    "a redelivery that is stored": ("I-34", (insert(live()), sent(dedup_key="k"), sent(number=6, dedup_key="k"))),
    "a lost wakeup": ("I-35", (insert(live()), update(executing()), update(live(**PARKED)), sent())),
    "a park over a signal": ("I-35", (insert(live()), sent(), update(executing()), update(live(**PARKED)))),
    "a child that is not counted": ("I-37", (*FAMILY, LEFT)),
    "a barrier that is raised too high": (
        "I-37",
        (
            *FAMILY,
            update(live(token="1", version="1", status="awaiting_children", children_round="1", children_pending="2")),
        ),
    ),
    "a child without its parent's park": ("I-38", (insert(live()), insert(live(2, parent_id="1", parent_round="1")))),
    "the history is shortened": (
        "I-36",
        (insert(live()), update(executing()), finish(over()), [("D", "history", over())]),
    ),
    "a tick that nobody fired": ("I-41", (insert(live(machine="tick")),)),
    "a schedule that stands still": (
        "I-41",
        (
            schedule("1970-01-01 00:00:01+00", 0),
            [*insert(live(machine="tick")), *schedule("1970-01-01 00:00:01+00", 1)],
        ),
    ),
    "a schedule fired into the void": (
        "I-41",
        (schedule("1970-01-01 00:00:01+00", 0), schedule("1970-01-01 00:00:02+00", 1)),
    ),
}


@pytest.mark.parametrize("what", DOCTORED)
def test_a_doctored_history_is_rejected(what: str) -> None:
    rule, commits = DOCTORED[what]
    assert rule in broken_history(*commits)
