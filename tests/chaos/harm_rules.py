"""0 neighbours harmed: what is done to one instance, one connection or one row is felt by no other.

Each rule is a pure function of the record and of its history. What a fault may cost is said once, in `Causes`; a loss
that none of them explains is a harm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.chaos.cluster import LEASE
from tests.chaos.effects import Effect
from tests.chaos.history_rules import Loss, Replay
from tests.chaos.record import Record, Violation

KILLERS = ("poison", "fork-orphan")
"""Tasks that kill their process."""
COMMANDS = ("kill-", "stop-", "deploy-", "skew-clock", "held-worker")
"""Faults (beginnings of their names) whose losses are those of the command they were done to."""
FLEETS = ("crash-postgres", "disk-full", "net-", "silent-", "lock-table")
"""Faults after which any lease may run out."""
AWAY = (*FLEETS, "terminate-backends")
"""Faults after which a step may run again since its database had gone."""
FELT = 2 * LEASE + 10.0
"""Seconds after its end in which a fault may still cost a claim."""
FORKED = 20.0
"""Seconds in which a pid is not given to another process."""
STANDS = 2.5
"""Seconds of a lock from which on a process must have begun another step meanwhile."""
OFTEN, ENOUGH = 0.5, 40
"""There is work for every process when rows wait that often, or when that many steps a second begin."""
STEADY, BEFORE = 20, 3.0
"""Steps in that many seconds before a fault show that a process takes whatever there is."""
GIVES_UP = LEASE + 6.0
"""Seconds after which a connection that never answers is given up: about a lease, or the producers' timeout."""

HarmRule = Callable[[Record, Replay], Iterator[Violation]]


@dataclass
class Causes:
    """What explains the loss of a claim. Times are those of the database."""

    record: Record
    history: Replay
    killed: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for one in self.record.effects:
            if one.kind == "in" and one.machine in KILLERS:
                self.killed[one.pid].append(one.at + self.record.clock)

    def of(self, loss: Loss, also: tuple[str, ...] = ()) -> bool:
        """Whether a fault that may cost it was done to its process, its command or to all, shortly before."""
        pid = self.history.workers.get(loss.worker or "", 0)
        if any(at - 1 <= loss.at <= at + FELT for at in self.killed.get(pid, ())):
            return True
        for fault in self.record.faults:
            begin, end = (fault[name] + self.record.clock for name in ("t", "end"))
            if begin - 1 <= loss.at <= end + FELT:
                if fault["kind"].startswith((*FLEETS, *also)):
                    return True
                if fault["kind"].startswith(COMMANDS) and (
                    pid in fault.get("pids", ()) or fault.get("place") == self.record.homes.get(pid, "?")
                ):
                    return True
        return False


def crashes_have_a_cause(record: Record, history: Replay) -> Iterator[Violation]:
    """I-51: an instance is charged with a crash only if something killed or froze the process that ran it."""
    causes = Causes(record, history)
    for loss in history.losses:
        if loss.crashed and not causes.of(loss):
            yield Violation("I-51", f"instance {loss.instance} ({loss.machine}) was charged with a crash for nothing")


def steps_run_again_for_a_cause(record: Record, history: Replay) -> Iterator[Violation]:
    """I-52: a step that was entered is entered on another claim only if the first was lost to a fault."""
    causes = Causes(record, history)
    lost = {(loss.instance, loss.version, loss.token): loss for loss in history.losses}
    entered: dict[tuple[int, int], set[int]] = defaultdict(set)
    machines: dict[int, str] = {}
    for one in record.effects:
        if one.kind == "in":
            entered[one.instance, one.version].add(one.token)
            machines[one.instance] = one.machine
    for (instance, version), tokens in entered.items():
        for token in sorted(tokens)[:-1]:
            loss = lost.get((instance, version, token))
            who = f"instance {instance} ({machines[instance]}) ran version {version} again after token {token}"
            if loss is None:
                if not record.restarts:  # a claim that the server forgot is in no history
                    yield Violation("I-52", f"{who}, a claim that was not lost")
            elif not causes.of(loss, AWAY):
                yield Violation("I-52", f"{who}, a claim that was {'reaped' if loss.crashed else 'released'}")


def forked_children_do_no_work(record: Record, history: Replay) -> Iterator[Violation]:
    """I-53, I-54: a process that a step forked runs no step, and is gone at the end."""
    born: dict[int, list[Effect]] = defaultdict(list)
    for one in record.effects:
        if one.kind == "fork":
            born[one.pid].append(one)
    for one in record.effects:
        if one.kind == "in":
            for child in born.get(one.pid, ()):
                if child.at < one.at < child.at + FORKED:
                    yield Violation(
                        "I-53",
                        f"instance {one.instance} ({one.machine}) was run by a child that {child.machine}"
                        f" {child.instance} had forked ({child.mark})",
                    )
                    break
    for pid, how in record.outlived.items():
        yield Violation("I-54", f"a child ({how}) that a step forked is there at the end, pid {pid}")


def silence_is_given_up(record: Record, history: Replay) -> Iterator[Violation]:
    """I-55: who waits for an answer on a connection that never gives one waits no longer than it may."""
    for fault in record.faults:
        if fault["kind"].startswith("silent-"):
            for name, seconds in fault.get("waited", ()):
                if seconds is None or seconds > GIVES_UP:
                    after = "never" if seconds is None else f"after {seconds:.1f} s"
                    yield Violation("I-55", f"a silent connection of {name!r} was given up {after}")


def nobody_stands_still(record: Record, history: Replay) -> Iterator[Violation]:
    """I-56: while a stranger holds a lock, or one connection is silent, every process goes on that has work."""
    spans: dict[int, list[Effect]] = defaultdict(list)
    for one in record.effects:
        if one.kind == "in":
            spans[one.pid].append(one)
    for fault in record.faults:
        if not fault["kind"].startswith("held-") or not fault["bitten"] or fault["end"] - fault["t"] < STANDS:
            continue
        begin, end = fault["t"] + 0.3, fault["released"]
        if end - begin < STANDS - 0.5 or _disturbed(record, fault, begin, end):
            continue
        begun = sum(begin < one.at < end for entered in spans.values() for one in entered)
        if fault["waiting"] < OFTEN and begun < ENOUGH * (end - begin):
            continue  # there was little to do
        for pid, entered in spans.items():
            if sum(begin - BEFORE < one.at < begin for one in entered) < STEADY:
                continue  # it was new, or made to run crashed instances alone
            lived = entered[0].at < begin and any(end < one.at < end + 30 for one in entered)
            busy = any(begin - 10 < one.at < end and one.machine.startswith(("fork", "exit")) for one in entered)
            if record.homes.get(pid, "") == fault.get("place"):
                continue  # its lease could not be renewed
            if lived and not busy and not any(begin < one.at < end for one in entered):
                yield Violation(
                    "I-56",
                    f"process {pid} of {record.homes.get(pid)} began no step in {end - begin:.1f} s of {fault['kind']}",
                )


def schedules_go_on(record: Record, history: Replay) -> Iterator[Violation]:
    """I-57: a schedule that can't fire stops no other: the tick goes on while the report is held."""
    for fault in record.faults:
        if fault["kind"] in ("held-key", "held-schedule") and fault["bitten"]:
            begin, end = fault["t"] + 1.0, fault["released"]
            if end - begin < STANDS or _disturbed(record, fault, begin, end, ("beat",)):
                continue
            if not any(begin < at - record.clock < end for at in history.ticks["tick"]):
                yield Violation("I-57", f"no tick fired for {end - begin:.1f} s of {fault['kind']}")


def _disturbed(record: Record, fault: dict[str, object], begin: float, end: float, names: tuple[str, ...] = ()) -> bool:
    """Whether another fault may be the reason."""
    for other in record.faults:
        harmless = other["kind"].startswith(("fork-", "exit-", "held-"))
        if other is not fault and not harmless and other["t"] - 1 < end and begin < other["end"] + LEASE:
            return True
    return False


HARM_RULES: list[HarmRule] = [
    crashes_have_a_cause, steps_run_again_for_a_cause, forked_children_do_no_work, silence_is_given_up,
    nobody_stands_still, schedules_go_on,
]  # fmt: skip
HARMED = ("I-9", "I-15", "I-17", "I-19", "I-51", "I-52", "I-53", "I-56", "I-57")
"""Rules that an instance breaks that something was done to for another's sake."""
