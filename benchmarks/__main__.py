"""`python -m benchmarks drain`: see each command's help."""

from __future__ import annotations

import json
import platform

import click
import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.database import bench_database
from benchmarks.drain import measure
from benchmarks.limits import backlog
from benchmarks.machines import fanout, latency, signals, steps


@click.group()
def main() -> None:
    """Measure durable beside the SQL floor, as ratios inside one run."""


@main.command()
@click.option("--count", default=20_000, show_default=True, help="No-op tasks per run.")
@click.option("--processes", default="1,2", show_default=True, help="Worker processes, a comma between runs.")
@click.option("--rounds", default=3, show_default=True, help="Interleaved runs of each kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def drain(count: int, processes: str, rounds: int, as_json: bool) -> None:
    """Empty a queue of no-op tasks, results kept, beside the SQL floor with as many processes."""
    document = []
    with bench_database() as database:
        with psycopg.connect(database.dsn) as connection:
            version = connection.info.parameter_status("server_version") or "?"
        for number in (int(text) for text in processes.split(",")):
            floor, ours = measure(database, count, number, rounds)
            document.append(
                {
                    "processes": number,
                    "count": count,
                    "postgres": version,
                    "python": platform.python_version(),
                    "floor": floor.runs,
                    "durable": ours.runs,
                    "ratio": ours.median / floor.median,
                }
            )
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    table = Table(title=f"drain of {count:,} no-op tasks, PostgreSQL {version}, median of {rounds} runs (range)")
    for column in ("processes", "SQL floor, jobs/s", "durable, jobs/s", "ratio"):
        table.add_column(column, justify="right")
    for entry in document:
        table.add_row(
            str(entry["processes"]), _range(entry["floor"]), _range(entry["durable"]), f"{entry['ratio']:.2f}"
        )
    Console().print(table)


@main.command()
@click.option("--processes", default=2, show_default=True, help="Worker processes.")
@click.option("--count", default=4000, show_default=True, help="Five-step machines.")
@click.option("--parked", default=10_000, show_default=True, help="Instances that await a signal.")
def machines(processes: int, count: int, parked: int) -> None:
    """Steps per second plain and inline, children and signals per second, latency on an idle worker, due times."""
    with bench_database() as database:
        for name, rate in steps(database, processes, count).items():
            click.echo(f"{name}: {rate:,.0f} steps/s")
        for children in (1000, 10_000):
            rate = fanout(database, processes, children)
            click.echo(f"{children:,} children of one parent: {children / rate:.2f} s to the join, {rate:,.0f}/s")
        for name, rate in signals(database, processes, parked).items():
            click.echo(f"{parked:,} parked, {name}: {rate:,.0f}/s")
        for name, figure in latency(database, processes).items():
            click.echo(f"{name}: {figure:.1f} ms")


@main.command()
@click.option("--processes", default=2, show_default=True, help="Worker processes.")
@click.option("--count", default=200_000, show_default=True, help="Unlimited no-op tasks per run.")
@click.option("--throttled", default=100_000, show_default=True, help="Rows before them that wait for tokens.")
@click.option("--rounds", default=3, show_default=True, help="Interleaved runs of each kind.")
def limits(processes: int, count: int, throttled: int, rounds: int) -> None:
    """Drain of unlimited tasks with and without throttled rows at the head of their queue."""
    with bench_database() as database:
        runs = backlog(database, processes, count, throttled, rounds)
    alone = next(iter(runs.values()))
    for kind, run in runs.items():
        click.echo(
            f"{kind}: {run.rate:,.0f}/s, {run.rate / alone.rate:.2f} of that alone; per row"
            f" {run.buffers:.1f} pages ({run.buffers / alone.buffers:.2f}),"
            f" {run.server:.0f} us CPU of the server ({run.server / alone.server:.2f}),"
            f" {run.workers:.0f} us of the workers ({run.workers / alone.workers:.2f})"
        )


def _range(runs: list[float]) -> str:
    middle = sorted(runs)[len(runs) // 2]
    return f"{middle:,.0f} ({min(runs):,.0f} to {max(runs):,.0f})"


main()
