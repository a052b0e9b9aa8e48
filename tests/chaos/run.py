"""One seed from beginning to end: start everything, hurt it, let it come to rest, judge."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from durable import Durable
from tests.chaos import client, effects, harm_rules, history_rules, record, rules
from tests.chaos.cluster import POOLS, Fleet, Postgres, alive, dump, prepare
from tests.chaos.faults import World
from tests.chaos.model import Spec
from tests.chaos.nemesis import Nemesis, plan
from tests.chaos.record import TERMINAL, Record, Violation
from tests.chaos.recorder import Recorder
from tests.chaos.surroundings import DiskFull

WARM_UP = 60.0
REST = 45.0
"""Seconds without any progress, the faults over, after which what is left is stuck."""
LONGEST_REST = 400.0
LOST, DOUBLED = ("I-1", "I-6", "I-32"), ("I-5", "I-11", "I-12", "I-33", "I-34")


@dataclass
class Verdict:
    """The figures of one run. seconds: the storm's, and with what came before and after."""

    seed: int
    seconds: float
    took: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    instances: int = 0
    steps: int = 0
    claims: int = 0
    taken_back: int = 0
    repeated: int = 0
    signals: int = 0
    unknown: int = 0
    lost: int = 0
    doubled: int = 0
    harmed: int = 0
    violations: list[Violation] = field(default_factory=list)
    folder: str | None = None

    @property
    def injected(self) -> int:
        """Faults that have bitten."""
        return sum(self.faults.values())

    def line(self) -> str:
        """The figures in one line."""
        kinds = " ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        return (
            f"seed {self.seed}: {self.injected} faults ({kinds}; did not bite {sum(self.missed.values())}),"
            f" {self.instances} instances, {self.steps} steps, {self.signals} signals,"
            f" {self.unknown} calls of unknown end,"
            f" {self.taken_back} rows taken back, {self.repeated} steps repeated,"
            f" lost {self.lost}, doubled {self.doubled}, harmed {self.harmed}, violations {len(self.violations)},"
            f" {self.took:.0f} s"
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "injected": self.injected}


def run_seed(
    seed: int,
    seconds: float,
    *,
    workers: int = 3,
    children: int = 2,
    only: Sequence[str] = (),
    pools: Sequence[str] = POOLS,
    keep: Path | None = None,
) -> Verdict:
    """Run one seed; a run with violations keeps its folder, and says where it is.

    workers, children  worker commands, and processes of each; only: names of the faults that are drawn from
    pools              kinds of worker processes, which commands take in turn
    keep               keep the folder there in any case
    """
    began = time.monotonic()
    verdict = Verdict(seed, seconds)
    schedule, verdict.skipped = plan(seed, seconds, only)
    folder = Path(tempfile.mkdtemp(prefix=f"durable-chaos-seed-{seed}-"))
    postgres = Postgres(small_disk=any(isinstance(planned.fault, DiskFull) for planned in schedule))
    finished = False
    try:
        found = _storm(folder, postgres, seed, seconds, schedule, workers, children, pools)
        model = history_rules.replay(found)
        verdict.violations = [one for rule in rules.RULES for one in rule(found)]
        verdict.violations += [*model.violations, *history_rules.agrees(found, model)]
        verdict.violations += [one for harm in harm_rules.HARM_RULES for one in harm(found, model)]
        _count(verdict, found, model)
        _keep(folder, found, verdict)
        finished = True
    finally:
        verdict.took = time.monotonic() - began
        (folder / "postgres.log").write_text(postgres.log())
        postgres.close()
        if keep is not None:
            shutil.copytree(folder, keep / f"seed-{seed}", dirs_exist_ok=True)
        if finished and not verdict.violations:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            verdict.folder = str(folder)
            again = (
                f"python -m tests.chaos --seed {seed} --seconds {seconds:g} --workers {workers} --children {children}"
            )
            if tuple(pools) != POOLS:
                again += f" --pools {','.join(pools)}"
            if only:
                again += f" --only {','.join(only)}"
            print(f"seed {seed} is kept in {folder}; again: {again}", file=sys.stderr, flush=True)
    return verdict


def _storm(
    folder: Path,
    postgres: Postgres,
    seed: int,
    seconds: float,
    schedule: Any,
    workers: int,
    children: int,
    pools: Sequence[str],
) -> Record:
    found = Record()
    app = prepare(postgres)
    phases = _Phases(folder / "phases.txt")
    recorder = Recorder(postgres.dsn, folder / "recorder.txt")
    fleet = Fleet(folder, postgres, seed, workers, children, pools)
    try:
        _wait(lambda: effects.count(fleet.effects) > 50, WARM_UP, "the first steps")
        phases.note("started")
        world = World(fleet, postgres, app)
        nemesis = Nemesis(world, schedule)
        until = time.monotonic() + seconds
        nemesis.run()
        time.sleep(max(0.0, until - time.monotonic()))
        found.faults, found.restarts = nemesis.log, world.restarts
        phases.note("storm")
        found.logs["process titles"] = _titles()
        fleet.stop_producers()
        # Nobody fires the schedule any more; what beats do otherwise, the workers' agents have to.
        found.exits = fleet.stop(fleet.beats)
        settle(app, postgres, fleet.clients)
        phases.note("settled")
        found.effects = record.read_effects(fleet.effects)
        found.outlived = {
            one.pid: one.mark for one in found.effects if one.kind == "fork" and alive(one.pid) and _forked(one.pid)
        }
        found.exits |= fleet.stop(fleet.workers)
        phases.note("stopped")
        found.effects = record.read_effects(fleet.effects)
        found.history = recorder.finish()
        with postgres.connect() as connection:
            record.read_tables(connection, found)
    finally:
        app.close()
        fleet.kill()
        for one in record.read_effects(fleet.effects):
            if one.kind == "fork" and _forked(one.pid):
                os.kill(one.pid, signal.SIGKILL)
    found.homes, found.clock = fleet.homes, time.time() - time.monotonic()
    found.calls = record.read_calls(fleet.clients)
    found.logs.update((path.name, path.read_text(errors="replace")) for path in fleet.logs())
    return found


class _Phases:
    """Notes how long each part took, for who waits."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, time.monotonic()

    def note(self, what: str) -> None:
        now = time.monotonic()
        with self._path.open("a") as file:
            file.write(f"{what} {now - self._last:.1f} s\n")
        self._last = now


def settle(app: Durable, postgres: Postgres, clients: Path) -> None:
    """Send what is still waited for, as a client might that knows the specs; wait until nothing is left, or moves."""
    log = client.Log(clients / "settler.jsonl")
    specs = {spec["key"]: Spec(**spec) for call in record.read_calls(clients) if call.op == "insert"
             for spec in call.asked["specs"]}  # fmt: skip
    moved = began = time.monotonic()
    before = None
    while time.monotonic() < min(moved + REST, began + LONGEST_REST):
        found = Record()
        with postgres.connect() as connection:
            record.read_tables(connection, found)
        left = [row for row in found.rows if row["status"] not in TERMINAL]
        if not left:
            return
        now = [(row["id"], row["token"], row["version"]) for row in left]
        if now != before:
            moved, before = time.monotonic(), now
        for row in left:
            spec = specs.get(record.key_of(row) or "")
            if spec is None or row["parent_id"] is not None or row["cancel_requested"]:
                continue
            if spec.cancel:
                client.cancel(log, app, row["id"], spec.key)
            elif row["status"] == "awaiting_signal":
                for i in range(spec.signals):
                    client.signal_once(log, app, row["id"], spec.key, i)
        time.sleep(0.5)


def _wait(condition: Any, seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.05)


def _titles() -> str:
    """Command lines of every process that runs now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it has ended
    return "\n".join(found)


def _forked(pid: int) -> bool:
    """Whether it is a child of ours still, and no later process of that number: it has a log of effects open."""
    try:
        return any("effects" in str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _count(verdict: Verdict, found: Record, model: history_rules.Replay) -> None:
    verdict.faults = dict(Counter(fault["kind"] for fault in found.faults if fault["bitten"]))
    verdict.missed = dict(Counter(fault["kind"] for fault in found.faults if not fault["bitten"]))
    verdict.instances = len(found.rows)
    verdict.steps = len(model.outcomes)
    verdict.claims, verdict.taken_back = model.claims, model.reaps
    entered = Counter((one.instance, one.version) for one in found.effects if one.kind == "in")
    verdict.repeated = sum(entered.values()) - len(entered)
    verdict.signals = model.signals_stored
    verdict.unknown = sum(call.outcome == "unknown" for call in found.calls)
    verdict.lost = sum(one.rule in LOST for one in verdict.violations)
    verdict.doubled = sum(one.rule in DOUBLED for one in verdict.violations)
    verdict.harmed = sum(one.rule in harm_rules.HARMED for one in verdict.violations)


def _keep(folder: Path, found: Record, verdict: Verdict) -> None:
    """What somebody needs who looks for the reason of a violation. The logs are in the folder already."""
    dump(folder / "faults.json", found.faults)
    if verdict.violations:
        dump(folder / "rows.json", found.rows)
        dump(folder / "violations.json", [asdict(one) for one in verdict.violations])
        with (folder / "history.txt").open("w") as file:
            for commit in found.history:
                for kind, table, row in commit.changes:
                    file.write(f"{commit.lsn:X} {commit.at:.6f} {kind} {table} {row}\n")
