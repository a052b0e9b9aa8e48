"""The app under load. Each step is a function of its state and of what it is shown, and notes its effects."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from durable import Await, ConcurrencyLimit, Done, Durable, Machine, Next, RateLimit, ScheduleChildren, every, step
from tests.chaos import hostile
from tests.chaos.effects import effect

SCHEMA = "chaos"
GATE, SLOTS = "vendor", 3
RATE, PER_SECOND, BURST = "mail", 40, 5
TICK = 0.5
TICKS = ("tick", "report")
"""Schedules, and the tasks that they insert."""
REPORT = "report-of-the-day"
"""The correlation key of the second one."""
CANARY = "canary-in-the-payload"
"""Part of every payload; must be in no log."""
PASSWORD = "canary-in-the-dsn"
"""Part of every DSN, though the server asks for none; must be in no log and no process title."""
MAX_CRASHES = 3


class Planned(Exception):
    """What a task raises because its spec says so."""


def build(generation: int = 1) -> Durable:
    """Return the app; its DSN comes from DURABLE_DSN. `generation` is what a deploy changes."""
    app = Durable(
        "chaos",
        schema=SCHEMA,
        rate_limits={RATE: RateLimit(PER_SECOND, 1.0, burst=BURST)},
        concurrency_limits={GATE: ConcurrencyLimit(SLOTS, shards=2)},
        max_crashes=MAX_CRASHES,
        connect_timeout=4,
    )
    app.generation = generation  # type: ignore[attr-defined]

    @app.task(name="job", bind=True, retry_for=(Planned,), backoff=lambda attempt: 0.05, max_attempts=4)
    def job(self: Any, k: str, fails: int, canary: str = CANARY) -> dict[str, Any]:
        with effect(self):
            pass
        if self.attempt < fails:
            raise Planned("as its spec says")
        return {"k": k, "attempt": self.attempt}

    @app.task(name="leaf", bind=True, max_attempts=1)
    def leaf(self: Any, k: str, n: int) -> int:
        with effect(self):
            pass
        if n % 7 == 6:
            raise Planned("every seventh")
        return n

    @app.task(name="limited", bind=True)
    def limited(self: Any, k: str, mark: str, hold: float) -> str:
        with effect(self, mark):
            time.sleep(hold)
        return k

    @app.task(name="poison", bind=True)
    def poison(self: Any, k: str) -> None:
        with effect(self):
            os.kill(os.getpid(), signal.SIGKILL)

    @app.periodic(every(TICK), name="tick")
    @app.task(name="tick", bind=True)
    def tick(self: Any) -> None:
        with effect(self):
            pass

    @app.periodic(every(TICK), name="report", correlation_key=REPORT)
    @app.task(name="report", bind=True)
    def report(self: Any) -> None:
        """As the tick, with a key that others may hold."""
        with effect(self):
            pass

    @app.machine(name="chain")
    class Chain(Machine):
        @step(initial=True)
        def hop(self, ctx: Any) -> Any:
            state = ctx.state
            with effect(ctx, f"i{state['i']}"):
                time.sleep(state.get("hold", 0))
            if state["i"] + 1 == state["n"]:
                return Done({"k": state["k"], "n": state["n"]})
            return Next(self.hop, {**state, "i": state["i"] + 1}, inline=state["inline"])

    @app.machine(name="keyed")
    class Keyed(Machine):
        """Goes from key to key; holds each while its step runs."""

        @step(initial=True)
        def hold(self, ctx: Any) -> Any:
            keys, i = ctx.state["keys"], ctx.state["i"]
            with effect(ctx, keys[i]):
                time.sleep(0.001)
            if i + 1 == len(keys):
                return Done({"k": ctx.state["k"], "keys": keys})
            return Next(self.hold, {**ctx.state, "i": i + 1}, concurrency_key=keys[i + 1])

    @app.machine(name="collector")
    class Collector(Machine):
        """Waits for signals until it has what it wants: each consumed as it comes, or (`pile`) all at the end."""

        @step(initial=True)
        def ask(self, ctx: Any) -> Any:
            with effect(ctx):
                return Await("go", then=self.collect, state=ctx.state)

        @step
        def collect(self, ctx: Any) -> Any:
            state = ctx.state
            with effect(ctx):
                got = [*state["got"], *(signal.payload["i"] for signal in ctx.awaited)]
            if len(got) >= state["want"]:
                return Done({"k": state["k"], "got": sorted(got)})
            if state["pile"]:
                return Await("go", then=self.collect)
            return Next(self.ask, {**state, "got": got})

    @app.machine(name="timer")
    class Timer(Machine):
        @step(initial=True)
        def ask(self, ctx: Any) -> Any:
            with effect(ctx):
                return Await("never", then=self.late, state=ctx.state, timeout=ctx.state["seconds"])

        @step
        def late(self, ctx: Any) -> Any:
            with effect(ctx):
                return Done({"k": ctx.state["k"], "awaited": len(ctx.awaited)})

    @app.machine(name="fan")
    class Fan(Machine):
        @step(initial=True)
        def out(self, ctx: Any) -> Any:
            state = ctx.state
            with effect(ctx):
                children: list[Any] = [
                    (leaf, {"args": (f"{state['k']}.{n}", n)}) for n in range(state["n"])
                ]  # fmt: skip
                for deep in range(2 if state["depth"] else 0):
                    inner = {"k": f"{state['k']}/{deep}", "n": state["n"], "depth": state["depth"] - 1}
                    children.append((Fan, {"state": inner}))
            return ScheduleChildren(children, then=self.join, state=state)

        @step
        def join(self, ctx: Any) -> Any:
            with effect(ctx):
                ends = [(child.status, child.result) for child in ctx.children]
            numbers = [result for _, result in ends if isinstance(result, int)]
            inner = [result for _, result in ends if isinstance(result, dict)]
            return Done({
                "k": ctx.state["k"],
                "of": len(ends) + sum(part["of"] for part in inner),
                "sum": sum(numbers) + sum(part["sum"] for part in inner),
                "failed": sum(status != "done" for status, _ in ends) + sum(part["failed"] for part in inner),
            })  # fmt: skip

    @app.machine(name="ledger")
    class Ledger(Machine):
        """Writes in the transaction of each of its outcomes."""

        @step(initial=True)
        def write(self, ctx: Any) -> Any:
            state = ctx.state
            with effect(ctx, f"i{state['i']}"):
                ctx.connection.execute(
                    "INSERT INTO public.ledger (instance, version, token) VALUES (%s, %s, %s)",
                    [ctx.id, ctx._claimed.version, ctx._claimed.token],
                )
            if state["i"] + 1 == state["n"]:
                return Done({"k": state["k"], "n": state["n"]})
            return Next(self.write, {**state, "i": state["i"] + 1})

    hostile.define(app)
    return app


TASKS_PY = "from tests.chaos.application import build\n\napp = build(generation={generation})\n"
"""The file that workers load; a deploy writes it anew."""
