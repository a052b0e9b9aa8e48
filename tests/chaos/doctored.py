"""Small records, whole by themselves, for the tests of the checker to doctor."""

from __future__ import annotations

from typing import Any

from tests.chaos.effects import Effect
from tests.chaos.harm_rules import HARM_RULES
from tests.chaos.history_rules import agrees, replay
from tests.chaos.record import Call, Record
from tests.chaos.recorder import Row, Transaction
from tests.chaos.rules import RULES

BEGIN = 1_000_000.0
EARLY = "1970-01-02 00:00:00+00"
LATE = "1999-01-01 00:00:00+00"


def rules_broken(record: Record) -> set[str]:
    """Names of the invariants that the checker finds violated."""
    model = replay(record)
    found = [one for rule in RULES for one in rule(record)]
    found += [one for rule in HARM_RULES for one in rule(record, model)]
    return {one.rule for one in [*found, *model.violations, *agrees(record, model)]}


def live(instance: int = 1, **columns: Any) -> Row:
    """A row of the live table as the recorder reads it: texts."""
    row: Row = {
        "id": str(instance), "status": "runnable", "token": "0", "version": "0", "attempt": "0", "crashes": "0",
        "worker_id": None, "concurrency_key": None, "rate_limit": None, "weight": "1", "gate_shard": None,
        "cancel_requested": "f", "parent_id": None, "parent_round": None, "children_pending": "0",
        "children_round": "0", "machine": "chain", "step": "hop", "eligible_at": EARLY, "finished_at": None,
        "awaits": None, "shown": None,
    }  # fmt: skip
    return {**row, **columns}


def executing(instance: int = 1, token: int = 1, version: int = 0, **columns: Any) -> Row:
    columns = {"worker_id": "7", **columns}
    return live(instance, status="executing", token=str(token), version=str(version), **columns)


def over(instance: int = 1, token: int = 1, version: int = 1, **columns: Any) -> Row:
    """A row of the history."""
    row: Row = {
        "id": str(instance), "finished_at": EARLY, "status": "done", "token": str(token), "version": str(version),
        "crashes": "0", "worker_id": "7", "parent_id": None, "parent_round": None, "machine": "chain",
    }  # fmt: skip
    return {**row, **columns}


def insert(row: Row) -> list[tuple[str, str, Row]]:
    return [("I", "instances", row)]


def update(*rows: Row) -> list[tuple[str, str, Row]]:
    return [("U", "instances", row) for row in rows]


def finish(row: Row) -> list[tuple[str, str, Row]]:
    return [("D", "instances", {"id": row["id"]}), ("I", "history", row)]


def history(*commits: list[tuple[str, str, Row]]) -> list[Transaction]:
    """Commits a second apart."""
    return [Transaction(n + 1, BEGIN + n, changes) for n, changes in enumerate(commits)]


def broken_history(*commits: list[tuple[str, str, Row]]) -> set[str]:
    """Names of the invariants that a history alone violates."""
    return {one.rule for one in replay(Record(history=history(*commits))).violations}


def effects_of(instance: int, version: int, token: int, at: float, **fields: Any) -> list[Effect]:
    """Entry and end of a step, 10 ms apart."""
    one = {
        "instance": instance, "version": version, "token": token, "step": "hop", "machine": "chain", "attempt": 0,
        "pid": 99, "generation": 1, "wall": BEGIN + 50.0, "mark": f"i{version}", **fields,
    }  # fmt: skip
    return [Effect("in", at=at, **one), Effect("out", at=at + 0.01, **one)]


def spec(key: str, **fields: Any) -> dict[str, Any]:
    return {"key": key, "kind": "chain", "machine": "chain", "given": {}, "options": {}, "signals": 0, "cancel": False,
            **fields}  # fmt: skip


def call(op: str, outcome: str = "ok", value: Any = None, **asked: Any) -> Call:
    return Call(op, asked, outcome, value, 1.0, 2.0)


def final(instance: int = 1, key: str = "a", **columns: Any) -> Row:
    """A row as the final tables have it: a chain of two steps."""
    row: Row = {
        "id": instance, "status": "done", "version": 2, "token": 2, "crashes": 0, "attempt": 0, "machine": "chain",
        "step": "hop", "state": {"k": key, "n": 2}, "result": {"k": key, "n": 2}, "error": None, "parent_id": None,
        "correlation_key": None, "cancel_requested": False, "lane": None, "reason": None,
    }  # fmt: skip
    return {**row, **columns}


def good() -> Record:
    """A run in which one chain of two steps was inserted and ended."""
    return Record(
        calls=[call("insert", value=[1], specs=[spec("a")]), call("look", value="done", target=1)],
        effects=[*effects_of(1, 0, 1, 10.0), *effects_of(1, 1, 2, 11.0)],
        history=history(
            insert(live()),
            update(executing()),
            update(live(token="1", version="1")),
            update(executing(token=2, version=1)),
            finish(over(token=2, version=2)),
        ),
        rows=[final()],
        exits={"worker-0": 0},
        logs={"worker.log": "all is well"},
    )
