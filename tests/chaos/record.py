"""What the checker reads: what was promised, what user code did, which faults there were, what the database says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from tests.chaos import effects as effects_log
from tests.chaos.application import SCHEMA
from tests.chaos.effects import Effect
from tests.chaos.recorder import Row, Transaction

TERMINAL = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant (I-1 ..) that did not hold, and for whom."""

    rule: str
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A client's call: what it asked for, and `ok`, `fail` or `unknown` (also when its process died in it)."""

    op: str
    asked: dict[str, Any]
    outcome: str
    value: Any
    at: float
    until: float


@dataclass
class Record:
    """One run.

    calls, effects, faults  logs of clients, of user code, of the nemesis
    history                 every commit, in order
    rows                    every instance at the end: live and finished
    ledger, markers         what steps wrote in their own transactions; what producers wrote beside an insert
    gates                   slots that are in use at the end, by key
    exits, logs             of the commands when they were told to stop; what they had printed
    restarts                when the server was away (monotonic)
    homes                   which command each process belonged to, by pid
    clock                   seconds from the monotonic clock to that of the database
    outlived                processes that steps had forked and that were there at the end, by pid
    """

    calls: list[Call] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    history: list[Transaction] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    ledger: list[tuple[int, int, int]] = field(default_factory=list)
    markers: list[str] = field(default_factory=list)
    gates: dict[str, int] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    restarts: list[tuple[float, float]] = field(default_factory=list)
    homes: dict[int, str] = field(default_factory=dict)
    clock: float = 0.0
    outlived: dict[int, str] = field(default_factory=dict)

    def inserts(self) -> Iterator[tuple[Call, dict[str, Any], int | None]]:
        """Each spec of each insert, and the id that the client was told, if it was told one."""
        for call in self.calls:
            if call.op == "insert":
                told = call.value if isinstance(call.value, list) else [call.value] * len(call.asked["specs"])
                if call.outcome != "ok" or call.asked.get("rolled_back"):
                    told = [None] * len(call.asked["specs"])
                for spec, instance_id in zip(call.asked["specs"], told, strict=True):
                    yield call, spec, instance_id


def key_of(row: Row) -> str | None:
    """The client's name of an instance, from its state: of a machine, or of a task's arguments."""
    state = row.get("state")
    if not isinstance(state, dict):
        return None
    if "k" in state:
        return str(state["k"])
    arguments = state.get("kwargs") or {}
    if "k" in arguments:
        return str(arguments["k"])
    positional = state.get("args") or []
    return str(positional[0]) if positional else None


def read_calls(folder: Path) -> list[Call]:
    """Return the calls of every client log; one without an answer is unknown."""
    calls = []
    for path in sorted(folder.iterdir()):
        asked: dict[str, dict[str, Any]] = {}
        for line in path.read_text().split("\n")[:-1]:
            entry = json.loads(line)
            if entry["type"] == "invoke":
                asked[entry["call"]] = entry
            else:
                what = asked.pop(entry["call"])
                calls.append(Call(entry["op"], what, entry["type"], entry.get("value", entry.get("error")), what["at"],
                                  entry["at"]))  # fmt: skip
        calls += [Call(what["op"], what, "unknown", None, what["at"], float("inf")) for what in asked.values()]
    return sorted(calls, key=lambda call: call.at)


def read_tables(connection: psycopg.Connection[Any], record: Record) -> None:
    """Fill in what the tables say now."""
    cursor = connection.cursor(row_factory=dict_row)
    cursor.execute(
        "SELECT id, status::text, version, token, crashes, attempt, machine, step, state, result, error, parent_id,"
        f" correlation_key, cancel_requested, lane, reason FROM {SCHEMA}.instance_view ORDER BY id"
    )
    record.rows = cursor.fetchall()
    record.ledger = connection.execute("SELECT instance, version, token FROM public.ledger").fetchall()
    record.markers = [row[0] for row in connection.execute("SELECT key FROM public.markers").fetchall()]
    record.gates = dict(
        connection.execute(f"SELECT key, sum(used) FROM {SCHEMA}.gates GROUP BY key HAVING sum(used) > 0").fetchall()
    )


def read_effects(folder: Path) -> list[Effect]:
    """Return the effects log by time."""
    return effects_log.read(folder)
