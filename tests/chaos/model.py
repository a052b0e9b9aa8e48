"""What the load is made of, and what each part of it must end as: a pure function of its spec."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.application import CANARY, GATE, RATE
from tests.chaos.hostile import HOSTILE, right_end

SHARES = {
    "chain": 44, "job": 12, "keyed": 5, "gated": 4, "rated": 3, "collector": 12, "timer": 3, "fan": 4, "ledger": 4,
    "victim": 4, "poison": 0.12,
}  # fmt: skip
"""The mix, in parts."""


TASKS = ("job", "limited", "poison", "fork", "fork-async", "fork-busy", "fork-orphan", "exit", "exit-backoff",
         "exit-async", "exit-state", "exit-enter", "exit-leave")  # fmt: skip
"""What takes keyword arguments; all else are machines, and take a state."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One instance to be inserted: under which name of ours, as what, with which options.

    signals  how many `go` it waits for; cancel: whether somebody cancels it
    """

    key: str
    kind: str
    machine: str
    given: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    signals: int = 0
    cancel: bool = False

    def entry(self) -> tuple[str, dict[str, Any]]:
        """As `insert_many` takes it."""
        what = "kwargs" if self.machine in TASKS else "state"
        return self.machine, {what: self.given, **self.options}

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def draw(key: str, dice: random.Random) -> Spec:
    """Return one instance of the mix."""
    kind = dice.choices(list(SHARES), list(SHARES.values()))[0]
    options: dict[str, Any] = {"priority": dice.randrange(3)}
    match kind:
        case "chain":
            given = {"k": key, "i": 0, "n": dice.randint(1, 30), "inline": dice.random() < 0.6, "canary": CANARY}
            given["hold"] = dice.choice((0, 0, 0, 0, 0, 0, 0.002, 0.01))
            if dice.random() < 0.15:
                options["schedule_in"] = round(dice.uniform(0.1, 2.0), 3)
            return Spec(key, kind, "chain", given, options)
        case "job":
            return Spec(key, kind, "job", {"k": key, "fails": dice.choice((0, 0, 0, 1, 2, 4))}, options)
        case "keyed":
            keys = [f"acct:{dice.randrange(8)}" for _ in range(dice.randint(1, 4))]
            return Spec(key, kind, "keyed", {"k": key, "i": 0, "keys": keys}, {**options, "concurrency_key": keys[0]})
        case "gated":
            mark = f"{GATE}:{dice.randrange(3)}"
            given = {"k": key, "mark": mark, "hold": 0.004}
            return Spec(key, kind, "limited", given, {**options, "concurrency_key": mark})
        case "rated":
            mark = f"{RATE}:{dice.randrange(3)}"
            given = {"k": key, "mark": mark, "hold": 0.0}
            return Spec(key, kind, "limited", given, {**options, "rate_limit": mark, "weight": dice.randint(1, 2)})
        case "collector":
            want = dice.randint(1, 4)
            given = {"k": key, "want": want, "got": [], "pile": dice.random() < 0.4, "canary": CANARY}
            return Spec(key, kind, "collector", given, options, signals=want)
        case "timer":
            return Spec(key, kind, "timer", {"k": key, "seconds": round(dice.uniform(0.1, 1.5), 3)}, options)
        case "fan":
            given = {"k": key, "n": dice.randint(0, 10), "depth": int(dice.random() < 0.3)}
            return Spec(key, kind, "fan", given, options)
        case "ledger":
            return Spec(key, kind, "ledger", {"k": key, "i": 0, "n": dice.randint(1, 4)}, options)
        case "victim" if dice.random() < 0.5:
            given = {"k": key, "want": 1, "got": [], "pile": False}
            return Spec(key, kind, "collector", given, options, cancel=True)
        case "victim":
            given = {"k": key, "i": 0, "n": 60, "inline": False, "hold": 0.002}
            return Spec(key, kind, "chain", given, options, cancel=True)
        case _:
            return poison(key)


def poison(key: str) -> Spec:
    """Return an instance that kills whoever runs it."""
    return Spec(key, "poison", "poison", {"k": key})


@dataclass(frozen=True, slots=True)
class End:
    """How an instance must end; `version` (committed outcomes) where the spec alone decides it.

    status  None: done or failed
    """

    status: str | None
    result: Any = None
    version: int | None = None


def fan_totals(n: int, depth: int) -> tuple[int, int, int]:
    """Of, sum and failed of a fan, its inner ones included."""
    of, total, failed = n, sum(i for i in range(n) if i % 7 != 6), len(range(6, n, 7))
    if depth:
        inner = fan_totals(n, depth - 1)
        of, total, failed = of + 2 + 2 * inner[0], total + 2 * inner[1], failed + 2 * inner[2]
    return of, total, failed


def expected(machine: str, given: dict[str, Any]) -> End:
    """Return how an instance ends that nobody cancels and that no crash is counted out of."""
    if machine in HOSTILE:
        return End(*right_end(machine, given))
    match machine:
        case "chain" | "ledger":
            return End("done", {"k": given["k"], "n": given["n"]}, given["n"])
        case "job" if given["fails"] >= 4:
            return End("failed", None, 4)
        case "job":
            return End("done", {"k": given["k"], "attempt": given["fails"]}, given["fails"] + 1)
        case "keyed":
            return End("done", {"k": given["k"], "keys": given["keys"]}, len(given["keys"]))
        case "limited":
            return End("done", given["k"], 1)
        case "collector":
            return End("done", {"k": given["k"], "got": list(range(given["want"]))})
        case "timer":
            return End("done", {"k": given["k"], "awaited": 0}, 2)
        case "fan":
            of, total, failed = fan_totals(given["n"], given["depth"])
            return End("done", {"k": given["k"], "of": of, "sum": total, "failed": failed}, 2)
        case "poison":
            return End("failed", None, None)
    raise ValueError(f"no model of {machine}")
