"""What `durable demo` runs: tasks that index the running Python's standard library, and an order that is shipped."""

from __future__ import annotations

import ast
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable import Await, Context, Done, Durable, Machine, ScheduleChildren, Stop, step

app = Durable("demo", schema="durable_demo")

PARCELS = 8
"""How many parcels an order has."""
TOP = 10
"""How many imported modules a summary names."""


@app.task(queue="files")
def index_file(path: str) -> dict[str, Any]:
    """Return what is in one Python file: lines, functions, classes, and how often it imports which module."""
    source = Path(path).read_bytes()
    counts = {"lines": source.count(b"\n"), "functions": 0, "classes": 0, "unparsable": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old test files are full of invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            # The library's own tests hold files that are broken on purpose.
            return {**counts, "unparsable": 1, "imports": {}}
    imports: Counter[str] = Counter()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                counts["functions"] += 1
            case ast.ClassDef():
                counts["classes"] += 1
            case ast.Import(names=names):
                imports.update(alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                imports[module.partition(".")[0]] += 1
    return {**counts, "imports": dict(imports)}


@app.task(queue="summary")
def summarise(indexes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of many indexes (or of many summaries)."""
    total: Counter[str] = Counter()
    imports: Counter[str] = Counter()
    for index in indexes:
        total.update({name: index[name] for name in ("lines", "functions", "classes", "unparsable")})
        total["files"] += index.get("files", 1)
        imports.update(index["imports"])
    return {**total, "imports": dict(imports)}


@app.task(bind=True, queue="parcels")
def pack(ctx: Context, parcel: int) -> None:
    """Pack one parcel; the row is written if and only if this step's outcome is committed."""
    time.sleep(0.2)
    ctx.connection.execute("INSERT INTO durable_demo.parcels VALUES (%s)", [parcel])


@app.machine(queue="summary")
class Checkout(Machine):
    """An order: wait for the payment, pack all parcels at once, ship."""

    @dataclass
    class State:
        """What the order is about."""

        number: int
        paid: int = 0

    @step(initial=True)
    def start(self, ctx: Context[State]) -> Await:
        """Park until the payment comes."""
        return Await("payment_confirmed", then=self.paid, timeout=3600)

    @step
    def paid(self, ctx: Context[State]) -> Stop | ScheduleChildren:
        """Fan out, one child per parcel."""
        if not ctx.awaited:
            return Stop("the payment never came")
        ctx.state.paid = ctx.awaited[0].payload["amount"]
        return ScheduleChildren([(pack, {"args": (n,)}) for n in range(PARCELS)], then=self.ship, state=ctx.state)

    @step
    def ship(self, ctx: Context[State]) -> Done:
        """All parcels are packed, or failed."""
        return Done({"paid": ctx.state.paid, "parcels": sum(child.status == "done" for child in ctx.children)})
