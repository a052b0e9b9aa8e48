"""What is decided from the logs and the final tables. Each rule is a pure function of a record: see RULES."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from tests.chaos.application import CANARY, MAX_CRASHES, PASSWORD, TICKS
from tests.chaos.effects import Effect
from tests.chaos.model import expected
from tests.chaos.record import TERMINAL, Record, Violation, key_of
from tests.chaos.recorder import Row

ORPHANED = 5.0
"""Seconds in which the kernel must have killed the children of a dead parent, and we have seen it."""
Rule = Callable[[Record], Iterator[Violation]]


def nothing_lost(record: Record) -> Iterator[Violation]:
    """I-1, I-3: what was acknowledged is there; a marker is there exactly when its neighbour is."""
    ids = {row["id"] for row in record.rows}
    keys = {key_of(row) for row in record.rows}
    markers = set(record.markers)
    for call, spec, instance_id in record.inserts():
        if instance_id is not None and instance_id not in ids:
            yield Violation("I-1", f"insert of {spec['key']} was acknowledged as {instance_id}, which is not there")
        if call.asked.get("marked") and (spec["key"] in markers) != (spec["key"] in keys):
            yield Violation("I-3", f"{spec['key']}: its row and its caller's are not there together")
        if call.asked.get("marked") and call.outcome == "ok" and call.asked["rolled_back"] == (spec["key"] in keys):
            yield Violation("I-3", f"{spec['key']}: rolled back is {call.asked['rolled_back']}, and yet")


def nothing_invented(record: Record) -> Iterator[Violation]:
    """I-2: every row was asked for, by a call that did not fail, or is a child or a tick."""
    asked = {spec["key"] for call, spec, _ in record.inserts() if call.outcome != "fail"}
    for row in record.rows:
        if row["parent_id"] is None and row["machine"] not in TICKS and key_of(row) not in asked:
            yield Violation("I-2", f"instance {row['id']} ({row['machine']}, {key_of(row)}) was asked for by nobody")


def retries_make_one_row(record: Record) -> Iterator[Violation]:
    """I-4, I-5: one row per name of a client's, however often it asked."""
    rows = Counter(key_of(row) for row in record.rows if row["parent_id"] is None and row["machine"] not in TICKS)
    for key, count in rows.items():
        if count > 1:
            yield Violation("I-5", f"{key} has {count} rows")
    for call in record.calls:
        if call.op == "insert" and len(call.asked["specs"]) > 1:
            there = sum(spec["key"] in rows for spec in call.asked["specs"])
            if there not in (0, len(call.asked["specs"])):
                yield Violation("I-4", f"{there} of a batch of {len(call.asked['specs'])} are there")


def _given(row: Row) -> dict[str, Any]:
    """What decides an instance's end: its state, or its task's arguments. (A chain's counter does not.)"""
    state = row["state"]
    if row["machine"] == "leaf":
        return {"k": state["args"][0], "n": state["args"][1]}
    return state.get("kwargs") or {} if "k" not in state else state  # type: ignore[no-any-return]


def every_end_is_right(record: Record) -> Iterator[Violation]:
    """I-9, I-19, I-37: each ended as its spec says, after as many outcomes; cancelled or given up with reason."""
    cancels = {call.asked["target"] for call in record.calls if call.op == "cancel" and call.outcome != "fail"}
    ending = {call.asked["target"] for call in record.calls if call.op == "cancel" and call.value is True}
    for row in record.rows:
        if row["status"] not in TERMINAL:
            continue  # I-25
        who = f"instance {row['id']} ({row['machine']}, {key_of(row)})"
        error = row["error"] or {}
        if row["status"] == "cancelled":
            if row["id"] not in cancels:
                yield Violation("I-18", f"{who} is cancelled, and nobody asked")
            continue
        if row["id"] in ending:
            yield Violation("I-18", f"{who} ended {row['status']} after its cancel was acknowledged")
        if row["status"] == "failed" and error.get("type") == "WorkerLost":
            if row["crashes"] < MAX_CRASHES:
                yield Violation("I-17", f"{who} is given up after {row['crashes']} crashes")
            continue
        if row["machine"] in TICKS:
            if row["status"] != "done":
                yield Violation("I-19", f"{who} ended {row['status']}: {error}")
            continue
        given = _given(row)
        if row["machine"] == "leaf":
            bad = given["n"] % 7 == 6
            right = row["status"] == ("failed" if bad else "done") and (bad or row["result"] == given["n"])
            version = 1
        else:
            end = expected(row["machine"], given)
            right = row["status"] == end.status and (end.status == "failed" or row["result"] == end.result)
            right = right or end.status is None
            right = right and row["machine"] != "poison"  # that one has been seen above
            version = row["version"] if end.version is None else end.version
        if not right and not _below_a_loss(row, record):
            yield Violation("I-19", f"{who} ended {row['status']} with {row['result']}, {error}")
        elif right and row["version"] != version:
            yield Violation("I-9", f"{who} took {row['version']} outcomes instead of {version}")


def _below_a_loss(row: Row, record: Record) -> bool:
    """Whether a fan's sum differs because a child of its was given up with its workers."""
    family, lost = {row["id"]}, False
    for other in record.rows:  # by id: parents come first
        if other["parent_id"] in family:
            family.add(other["id"])
            lost = lost or (other["error"] or {}).get("type") == "WorkerLost"
    return lost


def everything_ends(record: Record) -> Iterator[Violation]:
    """I-25, I-29: the faults are over, all signals are sent: nothing may be left, no slot may be in use."""
    for row in record.rows:
        if row["status"] not in TERMINAL:
            yield Violation(
                "I-25",
                f"instance {row['id']} ({row['machine']}, {key_of(row)}) is {row['status']} at {row['step']}"
                f" version {row['version']} lane {row['lane']} reason {row['reason']}",
            )
    for key, used in record.gates.items():
        yield Violation("I-29", f"gate {key} has {used} slots in use at the end")


def what_was_read_stays(record: Record) -> Iterator[Violation]:
    """I-19: an end that a client saw is the end."""
    ends = {row["id"]: row["status"] for row in record.rows}
    for call in record.calls:
        if (
            call.op == "look"
            and call.outcome == "ok"
            and call.value in TERMINAL
            and call.value != ends[call.asked["target"]]
        ):
            yield Violation(
                "I-19", f"instance {call.asked['target']} was {call.value}, and is {ends[call.asked['target']]}"
            )


def writes_are_exactly_once(record: Record) -> Iterator[Violation]:
    """I-12, I-13: of each outcome of a ledger one write in its own transaction, none of a stale one."""
    written = Counter((instance, version) for instance, version, _ in record.ledger)
    for (instance, version), count in written.items():
        if count > 1:
            yield Violation("I-12", f"ledger {instance} wrote {count} times as version {version}")
    for row in record.rows:
        if row["machine"] == "ledger" and row["status"] == "done":
            missing = [version for version in range(row["version"]) if (row["id"], version) not in written]
            if missing:
                yield Violation("I-13", f"ledger {row['id']} committed versions {missing} without their writes")
    versions = {row["id"]: row["version"] for row in record.rows}
    for instance, version in written:
        if version >= versions.get(instance, 0):
            yield Violation("I-13", f"ledger {instance} wrote as version {version}, which never was")


def effects_have_their_counter(record: Record) -> Iterator[Violation]:
    """I-9: the counter in the state of a chain is the number of its committed outcomes, at every step."""
    for effect in record.effects:
        if (
            effect.kind == "in"
            and effect.mark[0] == "i"
            and effect.mark[1:].isdigit()
            and int(effect.mark[1:]) != effect.version
        ):
            yield Violation("I-9", f"instance {effect.instance} ran step {effect.mark} at version {effect.version}")


def effects_run_once_per_claim(record: Record) -> Iterator[Violation]:
    """I-15, I-17: one entry per claim, unless the server crashed in between and forgot the claim; few per version."""
    entries: dict[tuple[int, int, int], list[Effect]] = defaultdict(list)
    for effect in record.effects:
        if effect.kind == "in":
            entries[effect.instance, effect.version, effect.token].append(effect)
    for (instance, version, token), found in entries.items():
        for one, other in pairwise(found):
            # A step that lost a connection which it writes or reads its children on runs again, where it was.
            again = one.machine in ("ledger", "fan") and one.pid == other.pid
            if not again and not any(b <= other.at and e >= one.at - 1 for b, e in record.restarts):
                yield Violation("I-15", f"instance {instance} entered version {version} twice on token {token}")
    crashed = Counter(one.instance for found in entries.values() for one in found if one.machine == "poison")
    for instance, count in crashed.items():
        if count > MAX_CRASHES + len(record.restarts):
            yield Violation("I-17", f"poison {instance} was entered {count} times")


def exclusive_effects(record: Record) -> Iterator[Violation]:
    """I-27 as the world saw it: steps of one key do not overlap, unless one's claim had been taken away meanwhile."""
    spans: dict[str, list[tuple[float, float, Effect]]] = defaultdict(list)
    open_: dict[tuple[int, int, int, int], Effect] = {}
    for effect in record.effects:
        if effect.mark.startswith("acct:"):
            name = (effect.instance, effect.version, effect.token, effect.pid)
            if effect.kind == "in":
                open_[name] = effect
            elif name in open_:
                begun = open_.pop(name)
                spans[effect.mark].append((begun.at, effect.at, begun))
    pauses = [
        (fault["t"], fault["end"])
        for fault in record.faults
        if fault["kind"].startswith(("stop", "net", "crash", "lock", "kill", "disk"))
    ]
    for key, of_key in spans.items():
        of_key.sort(key=lambda span: span[0])
        for (_, ended, one), (began, _, other) in pairwise(of_key):
            zombie = any(b <= ended + 1 and e >= one.at - 1 for b, e in [*pauses, *record.restarts])
            if began < ended and not zombie:
                yield Violation("I-27", f"{key}: instances {one.instance} and {other.instance} ran at once")


def no_orphans(record: Record) -> Iterator[Violation]:
    """I-43: the children of a killed parent die with it, and do nothing more."""
    for fault in record.faults:
        if fault["kind"] == "kill-supervisor" and fault["bitten"]:
            if fault["orphans_for"] > ORPHANED:
                yield Violation("I-43", f"children lived {fault['orphans_for']:.1f} s after their parent")
            late = [
                one for one in record.effects if one.pid in fault["pids"] and fault["end"] < one.at < fault["end"] + 60
            ]
            if late:
                yield Violation("I-43", f"{len(late)} effects of children of a dead parent")


def drained(record: Record) -> Iterator[Violation]:
    """I-42: a command that is told to stop exits with 0."""
    ends = [*record.exits.items(), *(("deploy", fault["exit"]) for fault in record.faults if "exit" in fault)]
    for name, code in ends:
        if code != 0:
            yield Violation("I-42", f"{name} exited with {code}")


def no_secrets(record: Record) -> Iterator[Violation]:
    """I-49: no payload and no password in any log or process title."""
    for name, text in record.logs.items():
        for secret in (CANARY, PASSWORD):
            if secret in text:
                yield Violation("I-49", f"{secret!r} is in {name}")


def no_crashes_of_ours(record: Record) -> Iterator[Violation]:
    """Whatever happens to processes and connections, our own code raises nothing that nobody expected."""
    for name, text in record.logs.items():
        for line in text.splitlines():
            if line.startswith(("AssertionError", "KeyError", "AttributeError", "TypeError", "IndexError")):
                yield Violation("I-50", f"{name}: {line}")


RULES: list[Rule] = [
    nothing_lost, nothing_invented, retries_make_one_row, every_end_is_right, everything_ends, what_was_read_stays,
    writes_are_exactly_once, effects_have_their_counter, effects_run_once_per_claim, exclusive_effects, no_orphans,
    drained, no_secrets, no_crashes_of_ours,
]  # fmt: skip
