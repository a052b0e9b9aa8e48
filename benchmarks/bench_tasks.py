"""The app that the benchmarks' workers import; database and schema come from the environment."""

import asyncio
import os
import time

from benchmarks import stamps
from durable import Await, Context, Done, Durable, Machine, Next, ScheduleChildren, step

MILLISECOND = 0.001

app = Durable("bench", schema=os.environ.get("BENCH_SCHEMA", "bench"))


@app.task(name="noop")
def noop() -> None:
    """Do nothing: what is measured is everything around it."""


@app.task(name="stamp")
def stamp(sent: int) -> None:
    """Say when it starts."""
    stamps.stamp(sent)


@app.task(name="work")
def work(sent: int) -> None:
    """Take a millisecond, then say when it ended."""
    time.sleep(MILLISECOND)
    stamps.stamp(sent)


@app.task(name="awork")
async def awork(sent: int) -> None:
    """`work` on the event loop."""
    await asyncio.sleep(MILLISECOND)
    stamps.stamp(sent)


@app.task(name="nothing")
def nothing() -> None:
    """Take a millisecond."""
    time.sleep(MILLISECOND)


class _Chain(Machine):
    """Five steps that count up."""

    @step(initial=True)
    def a(self, ctx: Context) -> Next:
        return Next(self.b, {"n": 1})

    @step
    def b(self, ctx: Context) -> Next:
        return Next(self.c, {"n": 2})

    @step
    def c(self, ctx: Context) -> Next:
        return Next(self.d, {"n": 3})

    @step
    def d(self, ctx: Context) -> Next:
        return Next(self.e, {"n": 4})

    @step
    def e(self, ctx: Context) -> Done:
        return Done(ctx.state["n"])


@app.machine(name="plain_chain")
class PlainChain(_Chain):
    """Each step through the picker."""


@app.machine(name="inline_chain", inline=True)
class InlineChain(_Chain):
    """Each step on the claim that is held."""


@app.machine(name="fan")
class Fan(Machine):
    """A parent with `n` no-op children."""

    @step(initial=True)
    def start(self, ctx: Context) -> ScheduleChildren:
        return ScheduleChildren([noop] * ctx.state["n"], then=self.join)

    @step
    def join(self, ctx: Context) -> Done:
        return Done(sum(child.status == "done" for child in ctx.children))


@app.machine(name="sleeper")
class Sleeper(Machine):
    """Parks until a signal comes."""

    @step(initial=True)
    def start(self, ctx: Context) -> Await:
        return Await("wake", then=self.end)

    @step
    def end(self, ctx: Context) -> Done:
        return Done(ctx.awaited[0].payload)


@app.machine(name="work_chain")
class WorkChain(Machine):
    """Three steps of a millisecond, each claimed anew; the last one says when it ended."""

    @step(initial=True)
    def first(self, ctx: Context) -> Next:
        time.sleep(MILLISECOND)
        return Next(self.second)

    @step
    def second(self, ctx: Context) -> Next:
        time.sleep(MILLISECOND)
        return Next(self.third)

    @step
    def third(self, ctx: Context) -> Done:
        work.function(ctx.state["sent"])
        return Done(None)


@app.machine(name="work_sleeper")
class WorkSleeper(Machine):
    """Parks until a signal comes, then works."""

    @step(initial=True)
    def start(self, ctx: Context) -> Await:
        return Await("wake", then=self.end)

    @step
    def end(self, ctx: Context) -> Done:
        work.function(ctx.awaited[0].payload)
        return Done(None)
