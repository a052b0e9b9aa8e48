"""What may be true at the end of a meeting, decided from the database; and where the end may be neither serial one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import product

from durable.instance import LIVE, TERMINAL
from tests.races.pairs.world import EXECUTING, NEW, OWNER, TOKEN, VERSION, Row, State

EDGES: Mapping[str | None, frozenset[str | None]] = {
    None: frozenset({"runnable", "scheduled"}),
    "scheduled": frozenset({"scheduled", "runnable", "cancelled"}),
    "runnable": frozenset({"runnable", "executing", "cancelled"}),
    "executing": LIVE | TERMINAL,
    "awaiting_signal": frozenset({"awaiting_signal", "runnable", "cancelled"}),
    "awaiting_children": frozenset({"awaiting_children", "runnable", "cancelled"}),
    "done": frozenset({None}),
    "failed": frozenset({None, "runnable"}),
    "cancelled": frozenset({None}),
}
"""Where a row may go from a status within the live table; None: not there. Live rows that leave it: see the rule."""


def violations(state: State) -> list[str]:
    """Return what is wrong in a state, whatever the operations were."""
    return [f"{rule.__doc__} {wrong}" for rule in _RULES for wrong in rule(state)]


def _one_place(state: State) -> Iterator[object]:
    """Every instance is in one place (live or history), and none is lost."""
    yield from (row for row, count in Counter(row["id"] for row in state.rows).items() if count != 1)
    known = {row["id"] for row in state.rows}
    for change in state.changes:
        # Swept, or purged before its first step.
        forgotten = change["was"] in TERMINAL or (
            change["was"] in ("runnable", "scheduled") and not change["versions"][0]
        )
        if change["became"] is None and change["id"] not in known and not forgotten:
            yield change


def _purged(change: Row) -> bool:
    return change["was"] in ("runnable", "scheduled") and change["versions"][0] == 0


def _edges(state: State) -> Iterator[object]:
    """Statuses change along the graph (I-7)."""
    for change in state.changes:
        if change["became"] is None and change["was"] not in TERMINAL:
            after = next((row for row in state.rows if row["id"] == change["id"]), None)
            if change["was"] == "executing" and after is not None and after["place"] == "history":
                continue
            if not _purged(change):
                yield change
        elif change["became"] not in EDGES[change["was"]]:
            yield change


def _counters(state: State) -> Iterator[object]:
    """The version rises by one with an outcome, the token by one with a claim, and never otherwise (I-8)."""
    for change in state.changes:
        (token, new_token), (version, new_version) = change["tokens"], change["versions"]
        if change["was"] is None or change["became"] is None:
            continue
        if new_token - token != (change["was"] == "runnable" and change["became"] == "executing"):
            yield change
        if new_version - version not in (0, 1) or (new_version > version and change["was"] != "executing"):
            yield change


def _fence(state: State) -> Iterator[object]:
    """An outcome is of the claim that it was made for (I-11), and there is one at most (I-12)."""
    outcomes = [
        change
        for change in state.changes
        if change["id"] == EXECUTING
        and change["was"] == "executing"
        and (change["became"] is None or change["versions"][1] > change["versions"][0])
    ]
    made_for = (OWNER, TOKEN, VERSION)
    yield from (c for c in outcomes if (c["worker"], c["tokens"][0], c["versions"][0]) != made_for)
    yield from outcomes[1:]


def _wakeups(state: State) -> Iterator[object]:
    """Nobody sleeps over a signal (I-35)."""
    for row in state.rows:
        if row["status"] == "awaiting_signal":
            yield from (
                signal
                for signal in state.signals
                if (signal["target_id"], signal["consumed"]) == (row["id"], False)
                and signal["name"] in row["awaits"]
                and signal["id"] not in (row["shown"] or ())
            )


def _inboxes(state: State) -> Iterator[object]:
    """A row whose inbox holds something says so; a finished one of every signal that came meanwhile."""
    newest: dict[int, int] = {}
    for signal in state.signals:
        if not signal["consumed"]:
            newest[signal["target_id"]] = max(signal["id"], newest.get(signal["target_id"], 0))
    for row in state.rows:
        signal_id = newest.get(row["id"], 0)
        if (row["status"] in LIVE or signal_id >= NEW) and signal_id > (row["inbox"] or 0):
            yield row
    for row in state.rows:
        if (row["inbox"] or 0) >= NEW and newest.get(row["id"], 0) < row["inbox"]:
            yield "an accepted signal is gone", row


def _barriers(state: State) -> Iterator[object]:
    """A parent waits for as many children as live (I-37)."""
    for parent in state.live:
        if parent["status"] == "awaiting_children":
            born = (parent["id"], parent["children_round"])
            live = [r for r in state.live if (r["parent_id"], r["parent_round"]) == born and r["status"] in LIVE]
            if not 0 < parent["children_pending"] == len(live):
                yield parent["id"], parent["children_pending"], [row["id"] for row in live]


def _slots(state: State) -> Iterator[object]:
    """As many slots are drawn as instances execute on them (I-29), never more than there are (I-28)."""
    drawn = Counter(
        (row["concurrency_key"], row["gate_shard"])
        for row in state.live
        if row["status"] == "executing" and row["gate_shard"] is not None
    )
    used = Counter({(gate["key"], gate["shard"]): gate["used"] for gate in state.gates})
    if drawn != +used:
        yield drawn, used
    yield from (gate for gate in state.gates if not 0 <= gate["used"] <= gate["capacity"])


def _holders(state: State) -> Iterator[object]:
    """A key has one holder: of a concurrency key without a gate (I-27), of a correlation key (I-40)."""
    executing = [row for row in state.live if row["status"] == "executing" and row["gate_shard"] is None]
    exclusive = Counter(row["concurrency_key"] for row in executing if row["concurrency_key"])
    occupied = Counter(
        row["correlation_key"]
        for row in state.live
        if row["correlation_key"] and row["status"] in (row["correlation_scope"] or LIVE)
    )
    yield from (key for counts in (exclusive, occupied) for key, count in counts.items() if count > 1)


def _lanes(state: State) -> Iterator[object]:
    """A lane in which rows are parked has somebody to open it."""
    limits = {(limit["kind"], limit["name"]) for limit in state.limits}
    for lane in {row["lane"] for row in state.live if row["lane"]}:
        kind, name = lane.split(" ", 1)
        column = "concurrency_key" if kind == "key" else "rate_limit"
        mine = [row for row in state.live if row[column] == name]
        candidates = [row for row in mine if row["status"] == "runnable" and row["lane"] is None]
        if kind == "key":
            attended = any(row["status"] == "executing" for row in mine)
        else:
            opens = any(bucket["bucket"] == name and bucket["opens_at"] is not None for bucket in state.buckets)
            attended = opens or ("rate", name.partition(":")[0]) not in limits
        if not attended and not candidates:
            yield lane


_RULES: tuple[Callable[[State], Iterator[object]], ...] = (
    _one_place,
    _edges,
    _counters,
    _fence,
    _wakeups,
    _inboxes,
    _barriers,
    _slots,
    _holders,
    _lanes,
)

_LIMITED = ("limited claim", "limited claim, no gate", "limited claim, tokens")
_CLAIMS = ("claim", "claim of one", "claim of a suspect", "claim by the owner", *_LIMITED)

PASS_BY: Mapping[str, str] = {
    **dict.fromkeys(_CLAIMS, "a claim leaves what somebody holds to the next claim"),
    **dict.fromkeys(
        ("promote", "time out", "open token lanes", "ageing", "bury what has expired"), "the clock comes round again"
    ),
    "purge": "it says that there are more",
    **dict.fromkeys(
        ("sweep of kept rows", "sweep of limits", "sweep of signals", "sweep of workers"),
        "what is left will be swept another day",
    ),
}
"""Operations that wait for no row: they pass by what somebody holds; and why that loses nothing."""

MAY_WAIT = {
    ("bury", "claim by the owner"),
    ("drop of an old day", "sweep of signals"),
    ("thinning of an old day", "sweep of signals"),
}
"""But a claim waits for who ends its lease, and gets nothing; and a sweep reads the history, whose table DDL locks."""

TAKE_TURNS: Mapping[str, str] = {
    **PASS_BY,
    **dict.fromkeys(
        ("reclaim", "reclaim, the last time", "give up"),
        "if its outcome was not committed, a row is still there next time",
    ),
    "claimed again": "the claim in it passes by",
    "repair of limits": "it mends what it sees at the time",
}
"""Operations that come round again, and why an end is right that takes another turn of theirs."""

ODD: Mapping[tuple[str, str], str] = dict.fromkeys(
    product(_LIMITED, ("release", "claimed again", "give up", "reclaim")),
    "a row that comes back while a claim looks around is not among its candidates: its slot goes to the next in line",
)
"""Pairs whose end may be neither serial one, whatever turns are taken, and why that is right."""
