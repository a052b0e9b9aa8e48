"""What was measured, for people (a rich table), for programs (JSON): figures, targets, versions, settings."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.database import Database
from benchmarks.figures import FLOOR, Measure, Series, ratio

SETTINGS = ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size", "wal_compression")
MET = {True: "yes", False: "NO", None: "not measured"}


def surroundings(database: Database) -> dict[str, str]:
    """Return versions and settings by name."""
    with psycopg.connect(database.dsn) as connection:
        postgres = connection.info.parameter_status("server_version") or "?"
        rows = connection.execute(
            "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY (%s)", [list(SETTINGS)]
        ).fetchall()
    found = {
        "PostgreSQL": postgres,
        "Python": platform.python_version(),
        "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})",
        "durable": _version("durable-pg"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
    }
    return found | dict(sorted(rows))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "source"


def document(about: dict[str, str], measures: Sequence[Measure]) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "surroundings": about,
        "measures": [
            {
                "what": measure.what,
                "unit": measure.unit,
                "series": [
                    {"name": one.name, "runs": one.runs, "setting": one.setting, "missing": one.missing}
                    | ({"median": one.median} if one.runs else {})
                    for one in measure.series
                ],
                "targets": [
                    {"of": target.subject, "target": str(target)}
                    | {"reached": measure.reached(target), "met": measure.met(target)}
                    for target in measure.targets
                ],
            }
            for measure in measures
        ],
    }


def write_json(path: Path, about: dict[str, str], measures: Sequence[Measure]) -> None:
    """Write the document to a file."""
    path.write_text(json.dumps(document(about, measures), indent=2) + "\n", encoding="utf-8")


def show(console: Console, about: dict[str, str], measures: Sequence[Measure]) -> None:
    """Print a table per measure, each figure with its range and its part of the floor, and how the targets stand."""
    for measure in measures:
        table = Table(title=f"{measure.what}, {measure.unit}", title_justify="left", title_style="bold", min_width=60)
        table.add_column("who")
        table.add_column("median (range)", justify="right")
        floor = measure.find(FLOOR)
        if floor:
            table.add_column("of the floor", justify="right")
        for one in measure.series:
            part = [f"{ratio(one, floor):.2f}" if one.runs and one is not floor else ""] if floor else []
            table.add_row(_who(one), _figure(one), *part)
        console.print(table)
    targets = Table(title="targets", title_justify="left", title_style="bold")
    for column in ("what", "target", "reached", "met"):
        targets.add_column(column, justify="right" if column == "reached" else "left")
    for measure in measures:
        for target in measure.targets:
            value = measure.reached(target)
            reached = "" if value is None else f"{value:,.2f}"
            what = f"{measure.what}, {measure.unit}: {target.subject}"
            targets.add_row(what, str(target), reached, MET[measure.met(target)])
    if targets.row_count:
        console.print(targets)
    console.print("; ".join(f"{name} {value}" for name, value in about.items()), style="dim", highlight=False)


def _who(one: Series) -> str:
    return f"{one.name}\n  {one.setting}" if one.setting else one.name


def _figure(one: Series) -> str:
    if not one.runs:
        return one.missing
    digits = 0 if one.median >= 100 else 2
    text = f"{one.median:,.{digits}f}"
    return text if len(one.runs) == 1 else f"{text} ({min(one.runs):,.{digits}f} to {max(one.runs):,.{digits}f})"
