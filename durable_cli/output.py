"""What commands print: one JSON document, or tables and lines for people, on stdout; remarks on stderr.

Data of users (results, errors, names) may hold anything; nothing that a terminal would obey leaves this file.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC and other strings
    r"|\x1b[ -/]*[0-~]?"
)
_BREAKS = re.compile(r"[\t\n\r\v\f\x85\u2028\u2029]+")
_PARAGRAPHS = re.compile(r"\r\n|[\u2028\u2029]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_IN_JSON = re.compile(r"[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*):(?!password@)[^\s]*@", re.IGNORECASE)
_NAMED_PASSWORD = re.compile(r"\b(password|passfile|sslpassword)\s*=\s*('(?:[^'\\]|\\.)*'|[^\s&]+)", re.IGNORECASE)
NOT_A_TERMINAL = 10_000
"""Columns of a table that goes to a file or a pipe: nothing is cut or wrapped there."""


def clean(value: object, *, lines: bool = False) -> str:
    """Return text that is safe on a terminal: no escape sequences, no control characters; `lines` keeps line ends."""
    text = _ESCAPES.sub("", str(value))
    text = _PARAGRAPHS.sub("\n", text) if lines else _BREAKS.sub(" ", text)
    return _CONTROLS.sub("", text)


def scrub(text: str) -> str:
    """Return text without passwords of connection strings."""
    return _NAMED_PASSWORD.sub(r"\1=***", _URL_PASSWORD.sub(r"\1:***@", text))


def plain(value: Any) -> Any:
    """Return a value as JSON can carry it: times in ISO 8601 (UTC), bytes as text or base64, NaN as text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case datetime():
            return moment(value)
        case date() | time():
            return value.isoformat()
        case bytes() | bytearray() | memoryview():
            try:
                return bytes(value).decode()
            except UnicodeDecodeError:
                return base64.b64encode(value).decode()
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
    return str(value)


def moment(value: datetime) -> str:
    """Return a time in ISO 8601, in UTC when it has a zone."""
    if value.tzinfo is None:
        return value.isoformat()
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def dumps(document: Any, indent: int | None = 2) -> str:
    """Return a JSON text that is safe on a terminal and fits stdout's encoding."""
    wide = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")
    text = json.dumps(plain(document), ensure_ascii=not wide, indent=indent)
    # These can only be inside strings, where \uXXXX means the same.
    return _NOT_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_json(document: Any) -> None:
    """Print the command's one document."""
    click.echo(dumps(document))


def print_json_array(items: Iterable[Any]) -> None:
    """Print the command's one document, an array, while its items still come in."""
    separator = "["
    for item in items:
        click.echo(f"{separator}\n  {dumps(item, None)}", nl=False)
        separator = ","
    click.echo("[]" if separator == "[" else "\n]")


def readable(value: Any) -> str:
    """Return a payload for people: text as it is, anything else as JSON."""
    return clean(value if isinstance(value, str) else dumps(value, None), lines=True)


def say(text: str = "") -> None:
    """Print a line to stdout."""
    click.echo(clean(text, lines=True))


def note(text: str) -> None:
    """Print a remark to stderr."""
    click.echo(clean(scrub(text), lines=True), err=True)


def flush() -> None:
    """See that what was printed is read now, by a command that goes on."""
    if sys.stdout is not None:
        sys.stdout.flush()


def cell(value: Any) -> str:
    """Return one value of a table as a line of text."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        case float():
            return f"{value:g}"
    return clean(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """Print a table; see `table`."""
    _print(table(columns, rows, right))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> Table:
    """Return a table, without the columns that are empty in every row; those named in `right` hold numbers."""
    cells = [[cell(value) for value in row] for row in rows]
    kept = [index for index in range(len(columns)) if any(row[index] for row in cells)]
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index in kept:
        name = columns[index]
        made.add_column(name.upper(), justify="right" if name in right else "left", overflow="fold")
    for row in cells:
        made.add_row(*(Text(row[index]) for index in kept))
    return made


def print_pairs(pairs: Iterable[tuple[str, Any]], indent: int = 0) -> None:
    """Print names and values, one below the other; values of several lines keep them."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        text = clean(value, lines=True) if isinstance(value, str) else cell(value)
        table.add_row(Text(" " * indent + name), Text(text))
    _print(table)


def heading(text: str) -> None:
    """Print a section's title."""
    _print(Text(f"\n{text}", style="bold"))


def _print(what: Table | Text) -> None:
    if sys.stdout is None:
        return
    console = Console(highlight=False, markup=False, emoji=False, file=sys.stdout)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, file=sys.stdout, width=NOT_A_TERMINAL)
    with console.capture() as capture:
        console.print(what)
    click.echo("\n".join(line.rstrip() for line in _lines(capture.get())), color=console.is_terminal)


def _lines(text: str) -> Iterator[str]:
    yield from text.removesuffix("\n").split("\n")


def seconds(value: float | None) -> str:
    """Return an age for people: 5 ms, 0.4 s, 12 s, 3 min, 5 h, 2 d."""
    if value is None:
        return ""
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    for limit, unit, name in ((1, 1.0, "s"), (120, 1.0, "s"), (7200, 60.0, "min"), (172_800, 3600.0, "h")):
        if value < limit:
            return f"{value / unit:.1f} {name}" if limit == 1 else f"{value / unit:.0f} {name}"
    return f"{value / 86400:.0f} d"


def error_line(error: Mapping[str, Any] | None, most: int = 100) -> str:
    """Return the first line of a stored error, cut to `most` characters."""
    if not error:
        return ""
    kind, message = error.get("type", ""), str(error.get("message", ""))
    text = clean(f"{kind}: {message}" if message else kind)
    return text if len(text) <= most else text[: most - 3] + "..."
