"""Compare the working tree with a revision, in alternating runs on one server, and decide whether it got slower."""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.database import Database, bench_database
from benchmarks.side import COUNTED, CPU, MACHINES, Run
from benchmarks.verdict import Count, Pairs
from benchmarks.workers import ROOT

PACKAGES = ("durable", "durable_cli")
OLD, NEW = "old", "new"
COUNT_ROUNDS = 3
CPU_RATE = 500
"""Jobs a second from which CPU per job is judged."""
WAL_LIMIT = 1100.0
WAL = "WAL"
WAL_WOBBLE = 0.005


@dataclass(frozen=True)
class Kind:
    """What `--what` names.

    Attributes:
        unit: The unit of its figures.
        processes: Worker processes, unless `--processes` says otherwise.
        wobble: How far counts of statements differ from round to round. Batches of workers depend on the moment (a
            further statement per batch is 15 % or more), a producer's do not, but for notifications.
        counted: The figures whose size follows from a rate, with the jobs or machines per second of the warm-up.
    """

    unit: str
    processes: int = 2
    wobble: float = 0.05
    counted: Mapping[str, int] = field(default_factory=dict)


KINDS = {
    "drain": Kind("jobs/s", counted={"no-op jobs": 10_000}),
    "steps": Kind("steps/s", counted=dict.fromkeys(MACHINES, 2_000)),
    "latency": Kind("ms", processes=4),
    "enqueue": Kind("tasks/s", wobble=0.01),
}


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    pairs: int
    seconds: float
    goal: float
    rates: tuple[float, ...]
    processes: int | None
    counted: tuple[int, int] = COUNTED


@dataclass(frozen=True)
class Side:
    """A folder with one revision's packages and this benchmark's code, and a schema for it."""

    name: str
    folder: Path
    database: Database

    def run(self, run: Run) -> dict[str, float]:
        """Run one act in a process of its own; return its figures."""
        given = replace(run, dsn=self.database.dsn, schema=self.database.schema)
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.side", given.text()],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        if ran.returncode:
            raise click.ClickException(f"the {self.name} side failed in {run.act!r}; its error is above")
        figures: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
        return figures


@contextmanager
def sides(revision: str, database: Database) -> Iterator[tuple[Side, Side]]:
    """Both sides, migrated by their own code; removed afterwards."""
    home = Path(tempfile.mkdtemp(prefix="durable-compare-"))
    home.chmod(0o755)
    made = [Side(name, home / name, Database(database.dsn, f"{database.schema}_{name}")) for name in (OLD, NEW)]
    try:
        for side in made:
            side.folder.mkdir()
            packages = ("benchmarks",) if side.name == OLD else ("benchmarks", *PACKAGES)
            for package in packages:
                shutil.copytree(ROOT / package, side.folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        extract(revision, made[0].folder)
        for side in made:
            side.run(Run("migrate", "", ""))
        yield made[0], made[1]
    finally:
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            for side in made:
                connection.execute(f"DROP SCHEMA IF EXISTS {side.database.schema} CASCADE")
        shutil.rmtree(home, ignore_errors=True)


def git(*arguments: str) -> bytes:
    """Return what git says about this checkout. Raises click.UsageError when it refuses."""
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if ran.returncode:
        raise click.UsageError(f"git {' '.join(arguments)}: {ran.stderr.decode(errors='replace').strip()}")
    return ran.stdout


def extract(revision: str, folder: Path) -> None:
    """Write the packages of a revision into a folder."""
    archive = git("archive", "--format=tar", revision, *PACKAGES)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def names(revision: str) -> dict[str, str]:
    """Return what is compared, in git's words."""
    dirty = " and changes that are not committed" if git("status", "--porcelain", "--", *PACKAGES).strip() else ""
    return {
        OLD: git("log", "-1", "--format=%h %s", revision).decode().strip(),
        NEW: git("log", "-1", "--format=%h %s").decode().strip() + dirty,
    }


def pairs_of(what: str, both: tuple[Side, Side], plan: Plan, say: Console) -> list[Pairs]:
    """Warm up, then run A B B A; return each figure of both sides."""
    kind = KINDS[what]
    run = Run(
        what,
        "",
        "",
        seconds=min(1.0, plan.seconds),
        counts={name: max(100, int(count * plan.seconds)) for name, count in kind.counted.items()},
        processes=plan.processes or kind.processes,
        rates=plan.rates,
    )
    warm = [side.run(run) for side in both]
    # Steps are counted per second, machines are what is inserted.
    per_job = 5 if what == "steps" else 1
    counts = {name: max(100, int(max(w[name] for w in warm) * plan.seconds / per_job)) for name in kind.counted}
    run = replace(run, seconds=plan.seconds, counts=counts)
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(plan.pairs):
        for side in both if number % 2 == 0 else both[::-1]:
            for name, value in side.run(run).items():
                found.setdefault(name, {OLD: [], NEW: []})[side.name].append(value)
        last = ", ".join(f"{name} {s[OLD][-1]:,.4g} -> {s[NEW][-1]:,.4g}" for name, s in found.items())
        say.print(f"{what}, pair {number + 1} of {plan.pairs}: {last}", style="dim", highlight=False)
    return [
        Pairs(
            f"{what}: {name}",
            kind.unit,
            tuple(series[OLD]),
            tuple(series[NEW]),
            plan.goal,
            lower_is_better=what == "latency",
            tail=name.startswith(("p95", "p99", CPU)),
            # Below, most of it is what idle processes and waking them cost.
            judged=not name.startswith(CPU) or float(name.rpartition(" ")[2].removesuffix("/s")) >= CPU_RATE,
        )
        for name, series in found.items()
    ]


def counts_of(what: str, both: tuple[Side, Side], plan: Plan) -> list[Count]:
    """Count statements, round trips and WAL on both sides in turn; return the least of some rounds."""
    run = Run(
        f"count_{what}",
        "",
        "",
        seconds=plan.seconds,
        processes=plan.processes or KINDS[what].processes,
        rates=plan.rates,
        counted=plan.counted,
    )
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(COUNT_ROUNDS):
        for side in both:
            for name, value in side.run(run).items():
                found.setdefault(name, {OLD: [], NEW: []})[side.name].append(value)
    return [
        Count(
            f"{what}: {name}",
            min(series[OLD]),
            min(series[NEW]),
            WAL_WOBBLE if name.startswith(WAL) else KINDS[what].wobble,
            WAL_LIMIT if name.startswith(WAL) else None,
            judged=what != "latency",
        )
        for name, series in found.items()
    ]


def document(about: Mapping[str, Any], timed: Sequence[Pairs], counted: Sequence[Count]) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        **about,
        "figures": [
            {
                "what": one.what,
                "unit": one.unit,
                "old": one.old,
                "new": one.new,
                "ratio": "old/new" if one.lower_is_better else "new/old",
                "ratios": one.ratios,
                "median": one.median,
                "interval": one.ends,
                "goal": one.goal,
                "judged": one.judged,
                "holds": one.holds,
            }
            for one in timed
        ],
        "counts": [
            {"what": one.what, "old": one.old, "new": one.new, "limit": one.limit}
            | {"judged": one.judged, "holds": one.holds}
            for one in counted
        ],
    }


def show(console: Console, timed: Sequence[Pairs], counted: Sequence[Count]) -> None:
    """Print both tables."""
    table = Table(title="time", title_justify="left", title_style="bold")
    for column in ("figure", "old", "new", "ratio", "95 % interval", "goal", "holds"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for one in timed:
        lower, upper = one.ends
        sides_ = (f"{statistics.median(series):,.4g} {one.unit}" for series in (one.old, one.new))
        goal = f"{one.goal:g}{' (tail)' if one.tail else ''}"
        table.add_row(one.what, *sides_, f"{one.median:.3f}", f"{lower:.3f} to {upper:.3f}", goal, _verdict(one))
    console.print(table)
    table = Table(title="counts", title_justify="left", title_style="bold")
    for column in ("count", "old", "new", "at most", "holds"):
        table.add_column(column, justify="left" if column == "count" else "right")
    for count in counted:
        limit = "" if count.limit is None else f"{count.limit:,.4g}"
        table.add_row(count.what, f"{count.old:,.2f}", f"{count.new:,.2f}", limit, _verdict(count))
    console.print(table)


def _verdict(one: Pairs | Count) -> str:
    if not one.judged:
        return "not judged"
    return "yes" if one.holds else "NO"


@click.command()
@click.argument("revision")
@click.option("--what", multiple=True, required=True, type=click.Choice(list(KINDS)), help="Can be given repeatedly.")
@click.option("--pairs", default=12, show_default=True, type=click.IntRange(2), help="Pairs of runs, after a warm-up.")
@click.option("--seconds", default=5.0, show_default=True, help="How long a run lasts.", type=click.FloatRange(0.1))
@click.option("--goal", default=0.97, show_default=True, help="What the ratio of new to old is to reach.")
@click.option("--rate", "rates", multiple=True, default=(20.0, 80.0), show_default=True, help="Jobs/s of latency.")
@click.option("--processes", type=click.IntRange(1), help="Worker processes [default: 2, latency 4]")
@click.option("--counts/--no-counts", default=True, show_default=True, help="Count statements, round trips and WAL.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write every figure to this file.")
def compare(
    revision: str,
    what: tuple[str, ...],
    pairs: int,
    seconds: float,
    goal: float,
    rates: tuple[float, ...],
    processes: int | None,
    counts: bool,
    file: Path | None,
) -> None:
    """Compare the working tree with REVISION: one server, alternating runs, the ratio of each pair.

    A goal holds when the median ratio reaches it and the lower end of the median's 95 % bootstrap interval is at most
    0.03 below. Counts (statements, round trips, WAL) may not rise. The exit code is 1 when one of them fails.
    """
    compared = names(revision)
    out, say = Console(), Console(stderr=True)
    part = min(1.0, seconds)  # a size that a test can afford
    counted_sizes = (int(COUNTED[0] * part), int(COUNTED[1] * part))
    plan = Plan(pairs, seconds, goal, rates, processes, counted_sizes)
    timed, counted = list[Pairs](), list[Count]()
    with bench_database() as database, sides(revision, database) as both:
        about = {"surroundings": report.surroundings(database), "compared": compared}
        for one in dict.fromkeys(what):
            if counts:
                counted += counts_of(one, both, plan)
            timed += pairs_of(one, both, plan, say)
    out.print(f"old  {compared[OLD]}\nnew  {compared[NEW]}", highlight=False)
    show(out, timed, counted)
    if file is not None:
        file.write_text(json.dumps(document(about, timed, counted), indent=2) + "\n", encoding="utf-8")
    failed = [one.what for one in timed if not one.holds] + [one.what for one in counted if not one.holds]
    if failed:
        raise click.ClickException(f"not reached: {'; '.join(failed)}")
