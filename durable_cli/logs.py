"""Log lines of commands: time, level, process, message, the record's own fields; on stderr, as text or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from durable_cli.output import clean, scrub

FIELDS = ("instance", "instances", "task", "step", "attempt", "queue", "error", "arguments")
LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._process: tuple[int, str] = (0, "")

    def _who(self) -> tuple[int, str]:
        """The pid of this process, and the kernel's name of it, which each fork sets for itself."""
        pid = os.getpid()
        if self._process[0] != pid:
            try:
                name = Path("/proc/self/comm").read_text(encoding="utf-8", errors="replace").strip()
            except OSError:
                name = "durable"
            self._process = (pid, name.removeprefix("durable:").removeprefix("durable-"))
        return self._process


class LineFormatter(_Formatter):
    """`2025-01-31 12:00:00.123 WARNING default[4711] a step failed  instance=42 task=shop.charge`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows on lines of its own."""
        at = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="milliseconds")
        fields = "".join(
            f" {name}={_quoted(getattr(record, name))}" for name in FIELDS if getattr(record, name, None) is not None
        )
        pid, name = self._who()
        line = f"{at} {record.levelname:<7} {name}[{pid}] {clean(record.getMessage())}{fields and ' ' + fields}"
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + clean(self.formatException(record.exc_info), lines=True)
        if record.stack_info:
            line += "\n" + clean(record.stack_info, lines=True)
        return scrub(line)


class JsonFormatter(_Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, process, pid, message, and the fields there are."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        pid, name = self._who()
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": name,
            "pid": pid,
            "message": scrub(record.getMessage()),
        }
        for field in FIELDS:
            value = getattr(record, field, None)
            if value is not None:
                entry[field] = scrub(value) if isinstance(value, str) else value
        if record.exc_info and record.exc_info[0] is not None:
            entry["traceback"] = scrub(self.formatException(record.exc_info))
        return json.dumps(entry, default=repr, allow_nan=False)


def _quoted(value: object) -> str:
    text = clean(value)
    return repr(text) if not text or " " in text or "=" in text else text


_handler: logging.Handler | None = None


def configure(level: str, form: str = "text") -> None:
    """Log from `level` on to stderr, in one of FORMATS. An app that set logging up when imported keeps its handlers."""
    global _handler
    root = logging.getLogger()
    if _handler is not None and _handler in root.handlers:
        root.removeHandler(_handler)
    logging.getLogger("durable").setLevel(level.upper())
    if root.handlers or sys.stderr is None:
        return
    _handler = logging.StreamHandler(sys.stderr)
    _handler.setFormatter(JsonFormatter() if form == "json" else LineFormatter())
    root.addHandler(_handler)
    root.setLevel(level.upper())
