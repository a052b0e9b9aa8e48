"""`durable check`: whether the code about to be deployed can go on with what is live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click

from durable import Durable
from durable.errors import CorruptRowError, DurableError, ValidationError
from durable.machine import MachineDefinition
from durable.runtime.task_step import arguments
from durable.storage import doctor as looks
from durable.storage.doctor import LiveRow
from durable.storage.session import Connection, run
from durable.task import Task
from durable.validation import near
from durable_cli.exits import FAILED
from durable_cli.output import print_json, print_table, say
from durable_cli.session import Session, app_options, connected
from durable_cli.values import QUEUE

PAGE = 500
TASK_STEP = "run"


class Problem(NamedTuple):
    """Why an instance can't go on with this code."""

    problem: str
    task: str
    version: int
    detail: str


class Tally:
    """Problems, how many rows each has and the first one's id."""

    def __init__(self) -> None:
        self.found: dict[Problem, list[int]] = {}
        self.instances = 0
        self.signals = 0

    def add(self, problem: Problem, instance: int) -> None:
        """Count one more row."""
        entry = self.found.setdefault(problem, [0, instance])
        entry[0] += 1

    def rows(self) -> list[dict[str, Any]]:
        """Return the problems, most rows first."""
        counted = sorted(self.found.items(), key=lambda entry: (-entry[1][0], entry[0]))
        return [{**problem._asdict(), "count": count, "example": example} for problem, (count, example) in counted]


@click.command()
@click.option("-q", "--queue", type=QUEUE, help="Instances of this queue alone (and no signals).")
@click.option(
    "--limit", type=click.IntRange(0), default=0, metavar="N", help="Look at the N oldest instances alone; 0 for all."
)
@app_options
@click.pass_context
def check(ctx: click.Context, queue: str | None, limit: int) -> None:
    """Compare live instances with this code, before it is deployed; exit with 1 if some can't go on with it.

    Looks for tasks, versions and steps that the code does not have, and loads every state, and every signal that
    waits, with the decoders that a worker would use. Reads in pages, locks nothing.
    """
    session: Session = ctx.obj
    app = session.app()
    tally = Tally()
    with connected(app) as connection:
        for row in _live(app, connection, queue, limit):
            tally.instances += 1
            problem = examine(app, row)
            if problem is not None:
                tally.add(problem, row.id)
        if queue is None:
            _signals(app, connection, tally)
    found = tally.rows()
    if session.as_json:
        print_json({"instances": tally.instances, "signals": tally.signals, "problems": found})
    else:
        if found:
            columns = ("problem", "task", "version", "detail", "count", "example")
            print_table(columns, [tuple(row.values()) for row in found], ("version", "count", "example"))
        verdict = f"{sum(row['count'] for row in found):,} can't go on with this code" if found else "all can go on"
        say(f"{tally.instances:,} live instances and {tally.signals:,} signals checked: {verdict}")
    ctx.exit(FAILED if found else 0)


def _live(app: Durable, connection: Connection, queue: str | None, limit: int) -> Iterator[LiveRow]:
    after, left = 0, limit or None
    while left is None or left > 0:
        most = PAGE if left is None else min(PAGE, left)
        page = run(connection, app.sql, looks.live_page(queue, after, most))
        yield from page
        if len(page) < most:
            return
        after, left = page[-1].id, None if left is None else left - len(page)


def examine(app: Durable, row: LiveRow) -> Problem | None:
    """Return why this code can't run the next step of an instance, or None."""
    definition = app.definitions.get((row.machine, row.version))
    if definition is None:
        versions = sorted(version for name, version in app.definitions if name == row.machine)
        if not versions:
            hint = near(row.machine, {name for name, _ in app.definitions}).lstrip("; ")
            return Problem("unknown task", row.machine, row.version, hint)
        return Problem("unknown version", row.machine, row.version, f"the code has {', '.join(map(str, versions))}")
    steps: Sequence[str] = list(definition.steps) if isinstance(definition, MachineDefinition) else [TASK_STEP]
    if row.step not in steps:
        return Problem("unknown step", row.machine, row.version, f"{row.step!r}{near(row.step, steps)}")
    try:
        state = app.codec.decode(row.state_type, row.state, "state")
        if isinstance(definition, MachineDefinition):
            definition.state_type.load(state)
        else:
            _bind(definition, state)
    except (CorruptRowError, ValidationError, TypeError) as error:
        return Problem("state does not load", row.machine, row.version, str(error)[:200])
    return None


def _bind(task: Task[..., Any], state: Any) -> None:
    args, kwargs = arguments(state, "state")
    task.check_arguments(args, kwargs)


def _signals(app: Durable, connection: Connection, tally: Tally) -> None:
    after = 0
    while page := run(connection, app.sql, looks.inbox_page(after, PAGE)):
        for signal in page:
            tally.signals += 1
            try:
                app.codec.decode(signal.payload_type, signal.payload, "payload")
            except DurableError as error:
                tally.add(Problem("signal does not load", signal.name, 0, str(error)[:200]), signal.target_id)
        after = page[-1].id
