"""`python -m benchmarks` runs everything and holds it against the targets; `python -m benchmarks drain` one part."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import plot, report
from benchmarks.catalogue import BENCHMARKS
from benchmarks.compare import compare
from benchmarks.database import bench_database
from benchmarks.figures import Measure
from benchmarks.registry import Benchmark, Size


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every command has: how often, and where to write."""
    for option in (
        click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it (SVG or PNG; extra `bench`)."),
        click.option("--json", "file", type=click.Path(path_type=Path), help="Write every figure to this file."),
        click.option("--runs", default=3, show_default=True, help="Interleaved runs of each kind."),
    ):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@click.option("--scale", default=1.0, show_default=True, help="Of the default sizes, when everything is run.")
@output_options
@click.pass_context
def main(context: click.Context, scale: float, runs: int, file: Path | None, picture: Path | None) -> None:
    """Measure durable beside the SQL floor and its peers, as ratios inside one run; without a command: everything."""
    if context.invoked_subcommand is None:
        sized = [(one, Size(max(one.least, int(one.count * scale)), runs, one.processes)) for one in BENCHMARKS]
        measure(sized, file, picture)


def measure(sized: Sequence[tuple[Benchmark, Size]], file: Path | None, picture: Path | None) -> None:
    """Run benchmarks on one server, print, and write what was asked for: without those that failed, said at the end."""
    if picture is not None and not plot.available():
        raise click.UsageError("--plot needs matplotlib: pip install 'durable-pg[bench]'")
    console, measures, failed = Console(), list[Measure](), list[str]()
    with bench_database() as database:
        about = report.surroundings(database)
        try:
            for one, size in sized:
                began = time.monotonic()
                try:
                    measures += one.measure(database, size)
                except Exception:
                    Console(stderr=True).print_exception()
                    failed.append(one.name)
                Console(stderr=True).print(f"{one.name}: {time.monotonic() - began:.0f} s", style="dim")
        finally:
            if measures:
                report.show(console, about, measures)
            if file is not None:
                report.write_json(file, about, measures)
            # Of everything the picture shows the peers: a panel for each of some thirty measures is none.
            shown = [one for one in measures if len(sized) == 1 or one.what.startswith("peers")]
            if picture is not None and shown:
                plot.draw(picture, shown, about)
    if failed:
        raise click.ClickException(f"of {len(sized)} benchmarks {len(failed)} failed: {', '.join(failed)}")


def _command(one: Benchmark) -> click.Command:
    def run(count: int, processes: str, runs: int, file: Path | None, picture: Path | None) -> None:
        measure([(one, Size(count, runs, tuple(int(text) for text in processes.split(","))))], file, picture)

    run.__doc__ = one.help
    processes = click.option(
        "--processes",
        default=",".join(map(str, one.processes)),
        show_default=True,
        help="Worker processes, a comma between runs.",
    )
    count = click.option(
        "--count",
        default=one.count,
        show_default=True,
        help=f"{one.of[0].upper()}{one.of[1:]}.",
        type=click.IntRange(1),
    )
    command = count(processes(output_options(run)))
    return click.command(one.name)(command)


for benchmark in BENCHMARKS:
    main.add_command(_command(benchmark))
main.add_command(compare)

if __name__ == "__main__":
    # What was started is stopped when somebody ends the benchmark, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
