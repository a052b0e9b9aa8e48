"""The operations that meet: each on the rows of the world that it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from durable.instance import NewSignal
from durable.limits import ConcurrencyLimit
from durable.storage import ageing, claims, control, inspection, instances, lanes, limits, maintenance, signals, workers
from durable.storage.admission import Demand, claim_limited
from durable.storage.arrays import Int8Array
from durable.storage.claims import Commit
from durable.storage.session import Operation
from tests.fix_rows import HEAD, new
from tests.interleaving import GO, OUTCOMES, bury, delivering, flushing, going_on, reclaiming
from tests.races.pairs.world import (
    CANDIDATE,
    DUE,
    EXECUTING,
    FAILED,
    KEPT,
    OLD_CHILD,
    OLD_DAY,
    OWNER,
    PARENT,
    PARKED,
    RATED,
    RUNNABLE,
    SECOND,
    SHOWN,
    SUSPECT,
    TOKEN,
    Scene,
    Traits,
)

MINE = [(EXECUTING, TOKEN)]
HELD = [*MINE, (SECOND, 1)]
SINCE_EVER = datetime.now(UTC) - timedelta(days=1)


@dataclass(frozen=True)
class Op:
    """One operation: how it is made, what it is about (None: whatever the other one is), what it needs of the world.

    pinned  whether a worker's session runs it, whose plans are pinned
    """

    make: Callable[[Scene], Operation[Any]]
    about: int | None = EXECUTING
    needs: Traits = frozenset()
    pinned: bool = True


def outcome(kind: str) -> Op:
    """A flush of one outcome. What is put off is due at once, so that there is something to promote or to time out."""

    def make(scene: Scene) -> Operation[Any]:
        return flushing(OWNER, soon(OUTCOMES[kind](scene.claimed, SHOWN)))

    return Op(make, needs=frozenset({"kept"} if kind == "done, key kept" else ()))


def soon(commit: Commit) -> Commit:
    return replace(commit, delay=commit.delay and -1.0, timeout=commit.timeout and -1.0)


def two_outcomes(scene: Scene) -> list[Commit]:
    second = scene.claimed._replace(
        id=SECOND, token=1, version=0, correlation_key=f"k{SECOND}", keeps_key=False, children_round=0, inbox=None
    )
    second = second._replace(concurrency_key=None, gate_shard=None)
    return [OUTCOMES["done"](scene.claimed, SHOWN), OUTCOMES["next"](second, ())]


def flush_of_two(scene: Scene) -> Operation[Any]:
    return flushing(OWNER, *two_outcomes(scene))


def with_what_it_wrote(scene: Scene) -> Operation[Any]:
    """The outcome of a step that used `ctx.connection`."""
    if (yield from claims.hold(OWNER, scene.claimed)) == "lost":
        return None
    return (yield from claims.flush_one(OWNER, going_on(scene.claimed, consumed=SHOWN)))


def claimed_again(scene: Scene) -> Operation[Any]:
    """Given back and claimed by the same worker: only the token tells the two claims apart.

    Two transactions of a worker that are one here, and so lock the lease first, as one would.
    """
    yield "live_lease", {"worker": OWNER, "queue": "default"}
    yield from claims.release(OWNER, MINE)
    return (yield from claims.claim(OWNER, "default", 10, HEAD, 32767, []))


def one_signal(scene: Scene) -> Operation[Any]:
    return delivering(scene.target, name="other")


def signal_to_key(scene: Scene) -> Operation[Any]:
    return delivering(f"k{scene.target}", name="other")


def repeated_signal(scene: Scene) -> Operation[Any]:
    return signals.deliver([NewSignal(scene.target, "other", GO, dedup_key="once")])


def signals_to_all(scene: Scene) -> Operation[Any]:
    return delivering(PARKED, f"k{EXECUTING}", RUNNABLE, PARENT, f"k{DUE}", SUSPECT, name="other")


def cancel(**options: bool) -> Callable[[Scene], Operation[Any]]:
    return lambda scene: instances.cancel(scene.target, "enough", **options)


def drop(scene: Scene) -> Operation[Any]:
    """Of an old day, as `partitions.drop_before` does it; what that gives up waiting for, this waits for."""
    yield "drop_partition", {"day": OLD_DAY}


def thinning(scene: Scene) -> Operation[Any]:
    yield "thin_partition", {"day": OLD_DAY, "wanted": Int8Array([OLD_CHILD])}


def limited_claim(scene: Scene) -> Operation[Any]:
    return claim_limited(Demand(scene.worker, "default", 10, 1, True))


ASKED, GATED, KEYED = frozenset({"asked"}), frozenset({"gated"}), frozenset({"keyed"})

OPERATIONS: dict[str, Op] = {
    "claim": Op(lambda scene: claims.claim(scene.worker, "default", 10, HEAD, 32767, []), RUNNABLE),
    "claim of one": Op(lambda scene: claims.claim(scene.worker, "default", 1, HEAD, 32767, []), RUNNABLE),
    "claim of a suspect": Op(lambda scene: claims.claim_suspect(scene.worker, "default", []), SUSPECT),
    "claim by the owner": Op(lambda scene: claims.claim(OWNER, "default", 10, HEAD, 32767, []), RUNNABLE),
    **{f"flush: {kind}": outcome(kind) for kind in OUTCOMES},
    "flush of a cancelled one": Op(lambda scene: flushing(OWNER, going_on(scene.claimed, consumed=SHOWN)), needs=ASKED),
    "flush of two": Op(flush_of_two),
    "flush with what it wrote": Op(with_what_it_wrote),
    "signal": Op(one_signal, None, pinned=False),
    "signal to a key": Op(signal_to_key, None, pinned=False),
    "signal, once": Op(repeated_signal, None, pinned=False),
    "signals to all": Op(signals_to_all, None, pinned=False),
    "cancel": Op(cancel(), None, pinned=False),
    "cancel with its tree": Op(lambda scene: instances.cancel(PARENT, "enough", cascade=True), PARENT, pinned=False),
    "terminate": Op(cancel(terminate=True), None, pinned=False),
    "retry of a failed one": Op(lambda scene: instances.retry_failed(FAILED), FAILED, pinned=False),
    "release": Op(lambda scene: claims.release(OWNER, HELD, "draining")),
    "release of a cancelled one": Op(lambda scene: claims.release(OWNER, HELD, "draining"), needs=ASKED),
    "claimed again": Op(claimed_again),
    "expire": Op(lambda scene: claims.expire(OWNER, MINE)),
    "reclaim": Op(lambda scene: reclaiming(OWNER), needs=frozenset({"dead"})),
    "reclaim, the last time": Op(lambda scene: workers.reclaim(OWNER, MINE, 1, "it died"), needs=frozenset({"dead"})),
    "bury": Op(lambda scene: bury(OWNER)),
    "give up": Op(lambda scene: workers.give_up(OWNER, [(EXECUTING, TOKEN, "too long")], 3)),
    "bury what has expired": Op(lambda scene: workers.bury_expired(SINCE_EVER, 1.0, 0.0), needs=frozenset({"expired"})),
    "heartbeat": Op(lambda scene: workers.heartbeat([OWNER, 2, 3], 600.0, {OWNER: [(EXECUTING, TOKEN, 1.0)]})),
    "promote": Op(lambda scene: maintenance.promote(), DUE),
    "time out": Op(lambda scene: maintenance.time_out(), PARKED),
    "sweep of kept rows": Op(lambda scene: maintenance.sweep_kept(60.0), KEPT),
    "sweep of signals": Op(lambda scene: maintenance.sweep_signals(), EXECUTING),
    "sweep of workers": Op(lambda scene: maintenance.sweep_workers()),
    "drop of an old day": Op(drop, PARENT, frozenset({"old"})),
    "thinning of an old day": Op(thinning, PARENT, frozenset({"old"})),
    "purge": Op(lambda scene: inspection.purge("default"), RUNNABLE, pinned=False),
    "pause": Op(lambda scene: control.pause("default", "why"), RUNNABLE, pinned=False),
    "resume": Op(lambda scene: control.resume("default"), RUNNABLE, frozenset({"paused"}), pinned=False),
    "insert with a key": Op(
        lambda scene: instances.insert(new(correlation_key=f"k{scene.target}", on_conflict="return")),
        None,
        pinned=False,
    ),
    "insert of many": Op(
        lambda scene: instances.insert_many([new(correlation_key=f"k{n}") for n in (99, FAILED, EXECUTING)]),
        FAILED,
        pinned=False,
    ),
    "limited claim": Op(limited_claim, CANDIDATE, GATED),
    "limited claim, no gate": Op(limited_claim, CANDIDATE, KEYED),
    "repair of limits": Op(lambda scene: lanes.repair(), CANDIDATE, GATED),
    "sweep of limits": Op(lambda scene: lanes.sweep(), CANDIDATE, GATED),
    "open token lanes": Op(lambda scene: lanes.open_due_lanes(), RATED, GATED | {"rated"}),
    "limited claim, tokens": Op(limited_claim, RATED, GATED | {"rated"}),
    "raise a limit": Op(
        lambda scene: limits.put({("concurrency", "gate"): ConcurrencyLimit(2)}, pin=True), CANDIDATE, GATED, False
    ),
    "drop a limit": Op(lambda scene: limits.drop("concurrency", "gate"), CANDIDATE, GATED, False),
    "ageing": Op(lambda scene: ageing.age_queue("default", 1.0), RUNNABLE),
}
"""Every operation that changes rows while the system runs."""

SEVERAL = (
    "claim",
    "flush: done",
    "flush: next",
    "flush: children",
    "flush of two",
    "flush with what it wrote",
    "signals to all",
    "cancel",
    "cancel with its tree",
    "release of a cancelled one",
    "expire",
    "reclaim, the last time",
    "give up",
    "promote",
    "time out",
    "purge",
    "limited claim",
    "ageing",
)
"""Those of them that lock several rows in one statement."""
