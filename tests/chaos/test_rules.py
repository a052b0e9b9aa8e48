"""The checker rejects what it must: each rule on a record doctored to break it, and only it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.application import CANARY, PASSWORD
from tests.chaos.doctored import (
    BEGIN,
    call,
    effects_of,
    final,
    good,
    rules_broken,
    spec,
)
from tests.chaos.history_rules import replay
from tests.chaos.record import Record


def test_a_run_in_which_all_is_well_has_no_violations() -> None:
    record = good()
    assert rules_broken(record) == set()
    model = replay(record)
    assert (len(model.outcomes), model.claims, model.reaps) == (2, 2, 0)


def lose(record: Record) -> None:
    record.calls.append(call("insert", value=[2], specs=[spec("b")]))


def lose_from_the_tables(record: Record) -> None:
    record.rows.clear()
    record.calls.clear()


def invent(record: Record) -> None:
    record.rows.append(final(2, "nobody"))
    record.history.clear()


def insert_what_failed(record: Record) -> None:
    record.calls[0] = replace(record.calls[0], outcome="fail")


def double(record: Record) -> None:
    record.rows.append(final(2, "a"))


def half_a_batch(record: Record) -> None:
    record.calls[0] = call("insert", "unknown", specs=[spec("a"), spec("b")])


def marker_alone(record: Record) -> None:
    record.calls.append(call("insert", "unknown", specs=[spec("m")], marked=True, rolled_back=False))
    record.markers.append("m")


def row_of_a_rolled_back_transaction(record: Record) -> None:
    record.calls[0] = call("insert", value=[1], specs=[spec("a")], marked=True, rolled_back=True)


def wrong_result(record: Record) -> None:
    record.rows[0]["result"] = {"k": "a", "n": 3}


def too_many_outcomes(record: Record) -> None:
    record.rows[0]["state"] = {"k": "a", "n": 1}
    record.rows[0]["result"] = {"k": "a", "n": 1}


def cancelled_by_nobody(record: Record) -> None:
    record.rows[0]["status"] = "cancelled"


def done_after_its_cancel(record: Record) -> None:
    record.calls.append(call("cancel", value=True, target=1))


def given_up_too_early(record: Record) -> None:
    record.rows[0].update(status="failed", error={"type": "WorkerLost"}, crashes=1)


def poison_that_ends(record: Record) -> None:
    record.rows[0].update(machine="poison", state={"kwargs": {"k": "a"}, "args": []})


def left_behind(record: Record) -> None:
    record.rows[0]["status"] = "awaiting_signal"


def slot_in_use(record: Record) -> None:
    record.gates["vendor:1"] = 1


def seen_otherwise(record: Record) -> None:
    record.calls[1] = call("look", value="failed", target=1)


def ledger(record: Record, *written: tuple[int, int, int]) -> None:
    record.rows[0]["machine"] = "ledger"
    record.ledger.extend(written)


def counter_behind(record: Record) -> None:
    record.effects[2] = replace(record.effects[2], mark="i0")


def entered_twice(record: Record) -> None:
    record.effects += effects_of(1, 1, 2, 20.0)


def poison_without_end(record: Record) -> None:
    for token in range(1, 6):
        record.effects += effects_of(2, 0, token, 20.0 + token, machine="poison", mark="-")


def overlap(record: Record) -> None:
    record.effects += effects_of(1, 0, 1, 20.0, mark="acct:1", machine="keyed", pid=1)
    record.effects += effects_of(2, 0, 1, 20.005, mark="acct:1", machine="keyed", pid=2)
    record.effects.sort(key=lambda one: one.at)


def orphans(record: Record) -> None:
    killed = {"kind": "kill-supervisor", "bitten": True, "orphans_for": 0.1, "pids": [99]}
    record.faults.append({**killed, "t": 5, "end": 9})


def slow_orphans(record: Record) -> None:
    killed = {"kind": "kill-supervisor", "bitten": True, "orphans_for": 6.0, "pids": [1]}
    record.faults.append({**killed, "t": 5, "end": 9})


def bad_exit(record: Record) -> None:
    record.exits["worker-0"] = -9


def bad_exit_at_a_deploy(record: Record) -> None:
    record.faults.append({"kind": "deploy-restart", "bitten": True, "exit": 1, "t": 5, "end": 9})


def payload_in_a_log(record: Record) -> None:
    record.logs["worker.log"] += f"\nrunning with {CANARY}"


def password_in_a_title(record: Record) -> None:
    record.logs["process titles"] = f"postgresql://durable:{PASSWORD}@localhost"


def our_own_bug(record: Record) -> None:
    record.logs["worker.log"] += "\nTraceback (most recent call last):\nKeyError: 12"


def signal_lost(record: Record) -> None:
    record.calls.append(call("signal", value=True, target=1, dedup="go-0"))


def committed_by_nobody(record: Record) -> None:
    del record.effects[3]


def ran_ahead(record: Record) -> None:
    record.effects += effects_of(1, 5, 9, 20.0)


def ran_too_early(record: Record) -> None:
    record.effects[2] = replace(record.effects[2], wall=BEGIN)


def end_unlike_its_history(record: Record) -> None:
    record.rows[0]["version"] = 3


DOCTORED: list[tuple[Any, str]] = [
    (lose, "I-1"), (lose_from_the_tables, "I-1"), (invent, "I-2"), (insert_what_failed, "I-2"), (double, "I-5"),
    (half_a_batch, "I-4"), (marker_alone, "I-3"), (row_of_a_rolled_back_transaction, "I-3"), (wrong_result, "I-19"),
    (too_many_outcomes, "I-9"), (cancelled_by_nobody, "I-18"), (done_after_its_cancel, "I-18"),
    (given_up_too_early, "I-17"), (poison_that_ends, "I-19"), (left_behind, "I-25"), (slot_in_use, "I-29"),
    (seen_otherwise, "I-19"), (counter_behind, "I-9"), (entered_twice, "I-15"), (poison_without_end, "I-17"),
    (overlap, "I-27"), (orphans, "I-43"), (slow_orphans, "I-43"), (bad_exit, "I-42"), (bad_exit_at_a_deploy, "I-42"),
    (payload_in_a_log, "I-49"), (password_in_a_title, "I-49"), (our_own_bug, "I-50"), (signal_lost, "I-32"),
    (committed_by_nobody, "I-14"), (ran_ahead, "I-10"), (ran_too_early, "I-10"), (end_unlike_its_history, "I-6"),
]  # fmt: skip


@pytest.mark.parametrize(("doctor", "rule"), DOCTORED, ids=lambda value: getattr(value, "__name__", value))
def test_a_doctored_record_is_rejected_by_its_rule(doctor: Any, rule: str) -> None:
    record = good()
    doctor(record)
    assert rule in rules_broken(record)


def test_a_ledger_is_rejected_when_a_write_is_doubled_missing_or_stale() -> None:
    whole = good()
    ledger(whole, (1, 0, 1), (1, 1, 2))
    assert rules_broken(whole) == set()
    for rule, written in {"I-12": [(1, 0, 1)], "I-13": [(1, 2, 3)]}.items():
        doubled = good()
        ledger(doubled, (1, 0, 1), (1, 1, 2), *written)
        assert rule in rules_broken(doubled)
    missing = good()
    ledger(missing, (1, 0, 1))
    assert "I-13" in rules_broken(missing)


def test_what_faults_explain_is_no_violation() -> None:
    record = good()
    entered_twice(record)
    record.restarts.append((15.0, 16.0))  # the claim was forgotten with the server's last milliseconds, and made again
    assert rules_broken(record) == set()
    zombies = good()
    overlap(zombies)
    zombies.faults.append({"kind": "stop-command", "bitten": True, "t": 18.0, "end": 22.0})
    assert "I-27" not in rules_broken(zombies)
