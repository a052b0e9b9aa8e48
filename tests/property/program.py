"""Programs: what a step returns follows from its state and from what it is shown, so that a model can foretell it.

A spec says how to insert an instance, as a dict of SPEC's names. Of kind "walk" it is a machine whose state holds what
is left to do, as a list of operations; of kind "work" a task that returns its value, of kind "shaky" one that asks for
that many retries. `rerun`: it runs its last step again for a signal that
arrives meanwhile. `tag` tells instances apart whose ids are not known yet.

    ["next", delay, inline]                  ["await", names, least, timeout, tries]
    ["retry", times, delay]                  ["spawn", specs]
    ["stop"]                                 ["raise"]

An "await" parks again, accumulating, until it is shown `least` signals, `tries` times at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from durable import Await, Context, Done, Durable, Machine, Next, Retry, ScheduleChildren, Stop, step

SPEC = {
    "kind": "walk",
    "todo": (),
    "tag": 0,
    "queue": "default",
    "priority": 0,
    "delay": 0,
    "expires": None,
    "key": None,
    "scope": None,
    "limit": None,
    "rerun": False,
}
INITIAL = {"walk": "even", "work": "run", "shaky": "run"}
OTHER = {"even": "odd", "odd": "even"}
SHAKY_ATTEMPTS = 3
SHAKY_DELAY = 60
State = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a step ends in: done, failed, retry, next, await or children. `state` None: kept."""

    kind: str
    state: State | None = None
    delay: int = 0
    inline: bool = False
    names: tuple[str, ...] = ()
    timeout: int | None = None
    children: tuple[Any, ...] = ()
    result: Any = None
    error: str | None = None


def state_of(spec: dict[str, Any]) -> State:
    """What is stored of a new instance."""
    if spec["kind"] == "walk":
        return {"tag": spec["tag"], "todo": list(spec["todo"]), "seen": [], "spawned": False}
    return {"args": [spec["tag"], spec["todo"]]}


def tag_of(state: State) -> int:
    """Which spec an instance was made of."""
    return int(state["args"][0] if "args" in state else state["tag"])


def plan(
    kind: str, state: State, awaited: Sequence[Any], inbox: Sequence[Any], children: Sequence[Any], attempt: int
) -> Plan:
    """What a step does that is shown these payloads, awaited and all, and these children, as (tag, status)."""
    if kind == "work":
        return Plan("done", result=state["args"][1])
    if kind == "walk":
        return _walk(state, list(awaited), list(inbox), [list(child) for child in children], attempt)
    if attempt >= state["args"][1]:
        return Plan("done", result="at last")
    if attempt + 1 >= SHAKY_ATTEMPTS:
        return Plan("failed", error="RetryRequested")
    return Plan("retry", delay=SHAKY_DELAY, error="RetryRequested")


def _walk(state: State, awaited: list[Any], inbox: list[Any], children: list[Any], attempt: int) -> Plan:
    seen = [*state["seen"], *([["children", *children]] if state["spawned"] else []), *awaited]
    todo = list(state["todo"])
    while todo:
        (name, *given), *rest = todo
        on = {**state, "todo": rest, "seen": seen, "spawned": name == "spawn"}
        match name, given:
            case "next", [delay, inline]:
                return Plan("next", on, delay=delay, inline=inline)
            case "retry", [times, delay] if attempt < times:
                return Plan("retry", delay=delay)
            case "await", [names, least, timeout, tries]:
                on["todo"] = [["gather", names, least, timeout, tries], *rest]
                return Plan("await", on, names=tuple(names), timeout=timeout)
            case "gather", [names, least, timeout, tries] if len(awaited) < least and tries:
                again = {**state, "todo": [["gather", names, least, timeout, tries - 1], *rest]}
                return Plan("await", again, names=tuple(names), timeout=timeout)
            case "spawn", [specs]:
                return Plan("children", on, children=tuple(specs))
            case "stop", []:
                return Plan("failed", result="no more", error="Stop")
            case "raise", []:
                return Plan("failed", error="ValueError")
        todo = rest
    return Plan("done", result={"seen": seen, "left": inbox, "attempt": attempt})


class Programs:
    """The app's definitions that run specs."""

    def __init__(self, app: Durable) -> None:
        programs = self

        @app.machine(name="walk")
        class Walk(Machine):
            @step(initial=True)
            def even(self, ctx: Context) -> Any:
                return programs.outcome(ctx)

            @step
            def odd(self, ctx: Context) -> Any:
                return programs.outcome(ctx)

        @app.machine(name="rewalk", on_unread="rerun")
        class Rewalk(Machine):
            @step(initial=True)
            def even(self, ctx: Context) -> Any:
                return programs.outcome(ctx)

            @step
            def odd(self, ctx: Context) -> Any:
                return programs.outcome(ctx)

        @app.task(name="work")
        def work(tag: int, value: Any) -> Any:
            return value

        @app.task(name="shaky", bind=True, max_attempts=SHAKY_ATTEMPTS)
        def shaky(ctx: Context, tag: int, fails: int) -> str:
            if ctx.attempt < fails:
                ctx.retry(countdown=SHAKY_DELAY)
            return "at last"

        self.walk, self.rewalk, self.work, self.shaky = Walk, Rewalk, work, shaky

    def target(self, spec: dict[str, Any]) -> Any:
        """The machine or task of a spec."""
        return self.rewalk if spec["rerun"] else getattr(self, spec["kind"])

    def entry(self, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A spec as `insert_many` and ScheduleChildren take it."""
        state = state_of(spec)
        given = {"state": state} if spec["kind"] == "walk" else {"args": state["args"]}
        return self.target(spec), given | options(spec, "schedule_in")

    def outcome(self, ctx: Context) -> Any:
        """What a walk's step returns."""
        state = ctx.state
        children = [(tag_of(child.state), child.status) for child in ctx.children] if state["spawned"] else []
        awaited, inbox = ([signal.payload for signal in signals] for signals in (ctx.awaited, ctx.all))
        decided = plan("walk", state, awaited, inbox, children, ctx.attempt)
        other = OTHER[ctx.step]
        match decided.kind:
            case "next":
                return Next(other, decided.state, delay=decided.delay, inline=decided.inline)
            case "retry":
                return Retry(delay=decided.delay)
            case "await":
                return Await(decided.names, other, decided.state, decided.timeout)
            case "children":
                return ScheduleChildren([self.entry(spec) for spec in decided.children], other, decided.state)
            case "done":
                return Done(decided.result)
        if decided.error == "ValueError":
            raise ValueError("as told")
        return Stop(decided.result)


def options(spec: dict[str, Any], delay: str) -> dict[str, Any]:
    """The options of an insert; those left alone are left out."""
    named = {
        "queue": spec["queue"],
        "priority": spec["priority"],
        delay: spec["delay"] or None,
        "expires": spec["expires"],
        "correlation_key": spec["key"],
        "correlation_scope": spec["scope"],
        "concurrency_key": spec["limit"],
    }
    return {name: value for name, value in named.items() if value is not None}
