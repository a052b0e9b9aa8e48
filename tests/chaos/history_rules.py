"""What is decided from the database's own history, commit by commit: "at any instant" is an exact question here.

A Replay applies each commit to a model of the tables and judges every change, and after each commit whatever it
touched. Time is the commit's; a decision was made before its commit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from tests.chaos.application import BURST, GATE, MAX_CRASHES, PER_SECOND, SLOTS, TICKS
from tests.chaos.hostile import NEVER_ENTERED
from tests.chaos.record import TERMINAL, Record, Violation
from tests.chaos.recorder import Row, Transaction

PARKED = ("awaiting_signal", "awaiting_children")
OUTCOMES = {"runnable", "scheduled", "executing", *PARKED, *TERMINAL}
"""What an executing row may become by an outcome."""
MOVES = {
    "scheduled": {"scheduled", "runnable", "cancelled"},
    "runnable": {"runnable", "cancelled", "awaiting_children"},
    "executing": {"executing", "runnable", "cancelled", "failed"},
    "awaiting_signal": {"awaiting_signal", "runnable", "cancelled"},
    "awaiting_children": {"awaiting_children", "runnable", "cancelled"},
}
"""What a row may become without claim or outcome: promoted, woken, released, reaped, cancelled."""
COST = 1 / PER_SECOND


@dataclass(frozen=True, slots=True)
class Loss:
    """A claim that ended without an outcome. crashed: whether the instance was charged with a crash; at: as `seen`."""

    instance: int
    version: int
    token: int
    worker: str | None
    crashed: bool
    machine: str
    at: float


@dataclass
class Replay:
    """The model, and what was found wrong on the way.

    steps, claims, stale   outcomes committed; claims made; rows taken back from the dead
    seen                   versions that an instance has had, and since when (seconds since 1970)
    workers                pid of each worker, by its id
    losses                 claims that were taken back
    ticks                  when each schedule fired
    """

    rows: dict[int, Row] = field(default_factory=dict)
    ended: dict[int, Row] = field(default_factory=dict)
    seen: dict[tuple[int, int], float] = field(default_factory=dict)
    outcomes: list[tuple[int, int, int, str]] = field(default_factory=list)
    signals: dict[int, Row] = field(default_factory=dict)
    delivered: Counter[tuple[int, str]] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    claims: int = 0
    reaps: int = 0
    signals_stored: int = 0
    workers: dict[str, int] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    ticks: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _executing: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    _live_children: dict[tuple[int, int], set[int]] = field(default_factory=lambda: defaultdict(set))
    _inbox: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    _schedules: dict[str, Row] = field(default_factory=dict)
    _buckets: dict[tuple[str, str], float] = field(default_factory=dict)

    def wrong(self, rule: str, text: str) -> None:
        self.violations.append(Violation(rule, text))

    def apply(self, commit: Transaction) -> None:
        """Take one commit."""
        now = _Commit(commit.at)
        for kind, table, row in commit.changes:
            if table == "instances":
                self._instance(kind, row, now)
            elif table == "history":
                self._history(kind, row, now)
            elif table == "signals":
                self._signal(kind, row, now)
            elif table == "workers" and kind != "D":
                self.workers[row["id"]] = int(row["pid"])
            elif table == "schedules" and kind != "D":
                self._schedule(row, now)
            elif table == "buckets" and kind != "D":
                self._bucket(row, now)
        self._after(now)

    # Instances

    def _instance(self, kind: str, row: Row, now: _Commit) -> None:
        instance = int(row["id"])
        if kind == "D":
            now.deleted[instance] = self._forget(instance)
            return
        old = self.rows.get(instance)
        if kind == "I":
            if instance in self.ended or old is not None:
                self.wrong("I-7", f"instance {instance} was inserted twice")
            if row["status"] not in ("runnable", "scheduled") or row["version"] != "0" or row["token"] != "0":
                self.wrong("I-7", f"instance {instance} began as {row['status']} version {row['version']}")
            self.seen[instance, 0] = now.at
            now.inserted.append(row)
        elif old is None:
            self.wrong("I-7", f"instance {instance} was changed, and is not there")
        else:
            self._change(instance, old, row, now)
        self._remember(instance, row, now)

    def _change(self, instance: int, old: Row, new: Row, now: _Commit) -> None:
        claimed = int(new["token"]) - int(old["token"])
        committed = int(new["version"]) - int(old["version"])
        edge = f"instance {instance}: {old['status']} token {old['token']} version {old['version']} became"
        edge += f" {new['status']} token {new['token']} version {new['version']}"
        if old["status"] in TERMINAL:
            self.wrong("I-18", edge)
        elif claimed == 1 and committed == 0:
            self.claims += 1
            if (old["status"], new["status"]) != ("runnable", "executing"):
                self.wrong("I-7", edge)
            if old["cancel_requested"] == "t":
                self.wrong("I-18", f"{edge} after its cancel")
            if _seconds(old["eligible_at"]) > now.at + 0.001:
                self.wrong("I-20", f"{edge} before {old['eligible_at']}")
            if old["rate_limit"] is not None:
                now.drawn[old["rate_limit"]] += int(old["weight"])
        elif claimed == 0 and committed == 1:
            self._outcome(instance, old, new["status"], new["token"], edge, now)
            attempts = (0, int(old["attempt"]) + (new["status"] not in TERMINAL))
            if new["status"] not in OUTCOMES or int(new["attempt"]) not in attempts:
                self.wrong("I-16", f"{edge}, attempt {old['attempt']} {new['attempt']}")
            if new["status"] == "executing" and new["worker_id"] != old["worker_id"]:
                self.wrong("I-11", f"{edge} of another worker")
            if int(new["crashes"]) != (int(old["crashes"]) if new["status"] in TERMINAL else 0):
                self.wrong("I-16", f"{edge}, crashes {old['crashes']} {new['crashes']}")
        elif claimed or committed:
            self.wrong("I-8", edge)
        else:
            if new["status"] not in MOVES[old["status"]] or (
                # A round without children is over in the transaction that parked it.
                (old["status"], new["status"]) == ("runnable", "awaiting_children") and instance not in now.outcomes
            ):
                self.wrong("I-7", edge)
            self._crashes(instance, old, new, edge, now)
            if new["attempt"] != old["attempt"]:
                self.wrong("I-16", f"{edge}, attempt {old['attempt']} {new['attempt']}")

    def _crashes(self, instance: int, old: Row, new: Row, edge: str, now: _Commit) -> None:
        more = int(new["crashes"]) - int(old["crashes"])
        reaped = old["status"] == "executing" and new["status"] != "executing"
        self.reaps += reaped
        if reaped:
            self.losses.append(
                Loss(
                    instance,
                    int(old["version"]),
                    int(old["token"]),
                    old["worker_id"],
                    more == 1,
                    old["machine"],
                    now.at,
                )
            )
        if more not in (0, 1) or (more and not reaped) or int(new["crashes"]) > MAX_CRASHES:
            self.wrong("I-16", f"{edge}, crashes {old['crashes']} {new['crashes']}")
        if new["status"] == "failed" and int(new["crashes"]) != MAX_CRASHES:
            self.wrong("I-17", f"{edge} after {new['crashes']} crashes")

    def _outcome(self, instance: int, old: Row, status: str, token: str, edge: str, now: _Commit) -> None:
        """One step's outcome: of an executing row, by the claim that it has."""
        if old["status"] != "executing" or old["token"] != token:
            self.wrong("I-11", edge)
        if old["cancel_requested"] == "t" and status != "cancelled":
            self.wrong("I-18", f"{edge} although its cancel was asked for")
        version = int(old["version"])
        self.seen[instance, version + 1] = now.at
        self.outcomes.append((instance, version, int(token), old["machine"]))
        now.outcomes.add(instance)

    def _history(self, kind: str, row: Row, now: _Commit) -> None:
        instance = int(row["id"])
        if kind != "I":
            self.wrong("I-36", f"instance {instance} left the history within its retention")
            return
        old = now.deleted.pop(instance, None)
        edge = f"instance {instance} ended {row['status']} token {row['token']} version {row['version']}"
        if old is None:
            self.wrong("I-7", f"{edge}, and did not live in this transaction")
            return
        if row["status"] not in TERMINAL:
            self.wrong("I-7", edge)
        if old["status"] == "executing":
            if int(row["version"]) != int(old["version"]) + 1:
                self.wrong("I-8", f"{edge} from version {old['version']}")
            if row["worker_id"] != old["worker_id"]:
                self.wrong("I-11", f"{edge} by worker {row['worker_id']}, held by {old['worker_id']}")
            self._outcome(instance, old, row["status"], row["token"], edge, now)
        elif (old["status"], old["version"]) != (row["status"], row["version"]):
            self.wrong("I-7", f"{edge} from {old['status']}")
        if instance in self.ended:
            self.wrong("I-12", f"{edge} a second time")
        self.ended[instance] = row
        self._touch_parent(old, now)

    def _remember(self, instance: int, row: Row, now: _Commit) -> None:
        old = self.rows.get(instance)
        if old is not None and old["concurrency_key"] is not None:
            self._executing[old["concurrency_key"]].discard(instance)
        self.rows[instance] = row
        key = row["concurrency_key"]
        if key is not None and row["status"] == "executing":
            self._executing[key].add(instance)
            now.keys.add(key)
        if row["parent_id"] is not None and row["parent_round"] is not None:
            children = self._live_children[int(row["parent_id"]), int(row["parent_round"])]
            (children.discard if row["status"] in TERMINAL else children.add)(instance)
            self._touch_parent(row, now)
        now.touched.add(instance)

    def _forget(self, instance: int) -> Row:
        old = self.rows.pop(instance)
        if old["concurrency_key"] is not None:
            self._executing[old["concurrency_key"]].discard(instance)
        if old["parent_id"] is not None and old["parent_round"] is not None:
            self._live_children[int(old["parent_id"]), int(old["parent_round"])].discard(instance)
        return old

    def _touch_parent(self, row: Row, now: _Commit) -> None:
        if row["parent_id"] is not None:
            now.touched.add(int(row["parent_id"]))

    # What else there is

    def _signal(self, kind: str, row: Row, now: _Commit) -> None:
        signal = int(row["id"])
        if kind == "I":
            self.signals[signal] = row
            self.signals_stored += 1
            target = int(row["target_id"])
            self._inbox[target].add(signal)
            now.touched.add(target)
            if row["dedup_key"] is not None:
                self.delivered[target, row["dedup_key"]] += 1
                if self.delivered[target, row["dedup_key"]] > 1:
                    self.wrong("I-34", f"signal {row['dedup_key']} of {target} was stored twice")
            return
        old = self.signals.pop(signal) if kind == "D" else self.signals[signal]
        target = int(old["target_id"])
        if kind == "U":
            self.signals[signal] = row
            if old["consumed"] == "t":
                self.wrong("I-33", f"signal {signal} of {target} was consumed twice")
        if old["consumed"] == "f":
            now.consumed.append((signal, target))
        self._inbox[target].discard(signal)

    def _schedule(self, row: Row, now: _Commit) -> None:
        old = self._schedules.get(row["name"])
        self._schedules[row["name"]] = row
        if old is not None:
            fired = int(row["fired"]) - int(old["fired"])
            now.fired[row["name"]] += fired
            if fired and _seconds(row["next_at"]) <= _seconds(old["next_at"]):
                self.wrong("I-41", f"schedule {row['name']} fired, and is due again at {row['next_at']}")

    def _bucket(self, row: Row, now: _Commit) -> None:
        name = (row["bucket"], row["shard"])
        full_at = _seconds(row["full_at"])
        if full_at > now.at + BURST * COST + 0.001:
            self.wrong("I-30", f"bucket {name} owes {full_at - now.at:.3f} s of tokens")
        # A bucket that nobody has drawn from yet is full.
        before = self._buckets.get(name)
        now.paid[row["bucket"]] += full_at - (before if before is not None else min(full_at, now.at))
        now.fresh |= before is None
        self._buckets[name] = full_at

    # After each commit

    def _after(self, now: _Commit) -> None:
        for instance, old in now.deleted.items():
            self.wrong("I-1", f"instance {instance} ({old['status']}) was deleted, and is not in the history")
        for key in now.keys:
            gate = key.partition(":")[0] == GATE
            most = SLOTS if gate else 1
            if len(self._executing[key]) > most:
                self.wrong("I-28" if gate else "I-27", f"{key} is held by {sorted(self._executing[key])}")
        for instance in now.touched:
            row = self.rows.get(instance)
            if row is not None and row["status"] in PARKED:
                self._parked(instance, row)
        for row in now.inserted:
            parent = row["parent_id"]
            if parent is not None and int(parent) not in now.outcomes:
                self.wrong("I-38", f"child {row['id']} was inserted without its parent's park")
        for name in TICKS:
            ticks = sum(row["machine"] == name for row in now.inserted)
            if ticks != now.fired[name]:
                self.wrong("I-41", f"{ticks} of {name} were inserted in a commit that fired {now.fired[name]}")
            if ticks:
                self.ticks[name].append(now.at)
        for signal, target in now.consumed:
            row = self.rows.get(target)
            if target not in now.outcomes and row is not None and row["status"] not in TERMINAL:
                self.wrong("I-33", f"signal {signal} of {target} was consumed by no outcome")
        for bucket, weight in now.drawn.items():
            if not now.fresh and now.paid[bucket] < weight * COST - 1e-4:
                self.wrong("I-30", f"{weight} tokens of {bucket} were drawn, {now.paid[bucket] / COST:.2f} were paid")

    def _parked(self, instance: int, row: Row) -> None:
        if row["status"] == "awaiting_signal":
            awaited, shown = set(_array(row["awaits"])), set(_array(row["shown"]))
            for signal in self._inbox[instance]:
                if self.signals[signal]["name"] in awaited and str(signal) not in shown:
                    self.wrong("I-35", f"instance {instance} sleeps over signal {signal}")
        else:
            live = len(self._live_children[instance, int(row["children_round"])])
            if live != int(row["children_pending"]) or live == 0:
                self.wrong("I-37", f"instance {instance} waits for {row['children_pending']} children, {live} live")


@dataclass
class _Commit:
    """What one commit touched."""

    at: float
    deleted: dict[int, Row] = field(default_factory=dict)
    inserted: list[Row] = field(default_factory=list)
    outcomes: set[int] = field(default_factory=set)
    touched: set[int] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    consumed: list[tuple[int, int]] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    paid: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    fresh: bool = False


def _array(text: str | None) -> list[str]:
    """Elements of a Postgres array of names or numbers without quotes."""
    return text[1:-1].split(",") if text and text != "{}" else []


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def replay(record: Record) -> Replay:
    """Judge the whole history."""
    model = Replay()
    for commit in record.history:
        model.apply(commit)
    return model


def agrees(record: Record, model: Replay) -> Iterator[Violation]:
    """The history beside the logs: I-1, I-10, I-14, I-32, I-34."""
    everyone = {**model.rows, **model.ended}
    for row in record.rows:
        last = everyone.get(row["id"])
        if last is None or (last["status"], int(last["version"])) != (row["status"], row["version"]):
            yield Violation(
                "I-6", f"instance {row['id']} is {row['status']}, its history says {last and last['status']}"
            )
    ids = {row["id"] for row in record.rows}
    for instance in everyone.keys() - ids:
        yield Violation("I-1", f"instance {instance} was committed, and is not there")
    for call in record.calls:
        if (
            call.op == "signal"
            and call.outcome == "ok"
            and model.delivered[call.asked["target"], call.asked["dedup"]] != 1
        ):
            yield Violation(
                "I-32", f"signal {call.asked['dedup']} of {call.asked['target']} was acknowledged, and is not there"
            )
    done = {(one.instance, one.version, one.token) for one in record.effects if one.kind == "out"}
    for instance, version, token, machine in model.outcomes:
        if (instance, version, token) not in done and machine not in NEVER_ENTERED:
            yield Violation(
                "I-14", f"{machine} {instance} committed version {version} of token {token} that nobody ran"
            )
    for effect in record.effects:
        since = model.seen.get((effect.instance, effect.version))
        if since is None:
            yield Violation("I-10", f"instance {effect.instance} ran at version {effect.version}, which never was")
        elif since > effect.wall + 0.05 and abs(since - effect.wall) < 1800:
            yield Violation(
                "I-10", f"instance {effect.instance} ran {since - effect.wall:.3f} s before version {effect.version}"
            )
