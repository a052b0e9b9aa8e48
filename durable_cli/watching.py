"""`durable status --watch`: a page that is drawn anew, or one JSON document a line; until Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from durable import Durable
from durable.storage import inspection
from durable.storage.inspection import Failure, HistoryEnd, QueueState, WorkerState
from durable.storage.session import Connection, run
from durable_cli.output import cell, dumps, error_line, flush, seconds, table
from durable_cli.session import Session, connected

RECENT = 5


class Look(NamedTuple):
    """What one look saw; `rates` (finished per second, by queue) need an earlier one to compare with."""

    end: HistoryEnd
    queues: list[QueueState]
    processes: list[WorkerState]
    failures: list[Failure]
    rates: Mapping[str, float] | None

    def document(self) -> dict[str, Any]:
        """Return it for --json."""
        return {
            "at": self.end.at,
            "queues": [{**state._asdict(), "rate": self._rate(state.queue)} for state in self.queues],
            "workers": [state._asdict() for state in self.processes if state.kind == "worker"],
            "beats": [state._asdict() for state in self.processes if state.kind == "beat"],
            "recent_failures": [failure._asdict() for failure in self.failures],
        }

    def page(self) -> RenderableType:
        """Return it for a terminal."""
        parts: list[RenderableType] = [Text(f"{cell(self.end.at)}  every number is of this moment; Ctrl-C ends")]
        columns = (*QUEUE_COLUMNS, "finished/s")
        rows = [
            (*row, "" if rate is None else f"{rate:,.1f}")
            for state, row in zip(self.queues, queue_rows(self.queues), strict=True)
            for rate in [self._rate(state.queue)]
        ]
        failed = [(found.id, found.machine, found.finished_at, error_line(found.error)) for found in self.failures]
        for title, part in (
            ("Queues", table(columns, rows, (*NUMBERS, "finished/s"))),
            (
                "Workers and beats",
                table(COMMAND_COLUMNS, command_rows(self.processes), ("processes", "busy", "silent")),
            ),
            ("Latest failures", table(("id", "task", "failed", "error"), failed, ("id",))),
        ):
            if part.rows:
                parts += [Text(f"\n{title}", style="bold"), part]
        return Group(*parts)

    def _rate(self, queue: str) -> float | None:
        return None if self.rates is None else self.rates.get(queue, 0.0)


NUMBERS = ("runnable", "scheduled", "executing", "awaiting", "oldest", "workers", "set", "ageing")
QUEUE_COLUMNS = ("queue", *NUMBERS, "paused")
COMMAND_COLUMNS = ("kind", "name", "host", "processes", "busy", "silent")


def queue_rows(states: Iterable[QueueState]) -> list[tuple[Any, ...]]:
    """Return the lines of a table of queues."""
    return [
        (
            state.queue,
            state.runnable,
            state.scheduled,
            state.executing,
            state.awaiting,
            seconds(state.oldest),
            state.workers,
            state.concurrency,
            seconds(state.ageing),
            _paused(state),
        )
        for state in states
    ]


def _paused(state: QueueState) -> str:
    """Since when a queue is paused, and why; empty when it is not."""
    if state.paused_at is None:
        return ""
    return f"{cell(state.paused_at)}{f': {state.pause_reason}' if state.pause_reason else ''}"


def command_rows(states: Iterable[WorkerState]) -> list[tuple[Any, ...]]:
    """Return the lines of a table of commands: their processes, the rows those hold, how many are silent."""
    found: dict[tuple[str, str, str], list[WorkerState]] = {}
    for state in states:
        found.setdefault((state.kind, state.name, state.host), []).append(state)
    return [
        (*command, len(group), sum(state.busy for state in group), sum(not state.alive for state in group) or None)
        for command, group in found.items()
    ]


def watch(session: Session, app: Durable, interval: float) -> None:
    """Look every `interval` seconds and show it, until Ctrl-C."""
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        with connected(app) as connection:
            before = _look(app, connection, None)
            if session.as_json or not console.is_terminal:
                while True:
                    click.echo(dumps(before.document(), None))
                    flush()
                    time.sleep(interval)
                    before = _look(app, connection, before)
            with Live(before.page(), console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(interval)
                    before = _look(app, connection, before)
                    live.update(before.page(), refresh=True)
    except KeyboardInterrupt:
        if sys.stdout is not None:
            sys.stdout.flush()


def _look(app: Durable, connection: Connection, before: Look | None) -> Look:
    end = run(connection, app.sql, inspection.history_end())
    rates = None
    if before is not None and end.day == before.end.day and end.at > before.end.at:
        counts = run(connection, app.sql, inspection.finished_between(before.end, end))
        took = (end.at - before.end.at).total_seconds()
        rates = {queue: count / took for queue, count in counts.items()}
    return Look(
        end,
        run(connection, app.sql, inspection.queues()),
        run(connection, app.sql, inspection.processes()),
        run(connection, app.sql, inspection.recent_failures(RECENT)),
        rates,
    )
