"""Log lines of commands: time, level, process, message and the record's own fields, on stderr."""

from __future__ import annotations

import logging
import os
import sys
from datetime import datetime
from pathlib import Path

from durable_cli.output import clean, scrub

FIELDS = ("instance", "instances", "task", "step", "attempt", "error")
LEVELS = ("debug", "info", "warning", "error", "critical")


class LineFormatter(logging.Formatter):
    """`2025-01-31 12:00:00.123 WARNING default[4711] a step failed  instance=42 task=shop.charge`."""

    def __init__(self) -> None:
        super().__init__()
        self._process: tuple[int, str] = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows on lines of its own."""
        at = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="milliseconds")
        fields = "".join(
            f" {name}={_quoted(getattr(record, name))}" for name in FIELDS if getattr(record, name, None) is not None
        )
        line = f"{at} {record.levelname:<7} {self._who()} {clean(record.getMessage())}{fields and ' ' + fields}"
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + clean(self.formatException(record.exc_info), lines=True)
        if record.stack_info:
            line += "\n" + clean(record.stack_info, lines=True)
        return scrub(line)

    def _who(self) -> str:
        """The kernel's name of this process, which each fork sets for itself, and its pid."""
        pid = os.getpid()
        if self._process[0] != pid:
            try:
                name = Path("/proc/self/comm").read_text(encoding="utf-8", errors="replace").strip()
            except OSError:
                name = "durable"
            self._process = (pid, f"{name.removeprefix('durable:').removeprefix('durable-')}[{pid}]")
        return self._process[1]


def _quoted(value: object) -> str:
    text = clean(value)
    return repr(text) if not text or " " in text or "=" in text else text


_handler: logging.Handler | None = None


def configure(level: str) -> None:
    """Log from `level` on to stderr. An app that set up logging when it was imported keeps its own handlers."""
    global _handler
    root = logging.getLogger()
    if _handler is not None and _handler in root.handlers:
        root.removeHandler(_handler)
    logging.getLogger("durable").setLevel(level.upper())
    if root.handlers or sys.stderr is None:
        return
    _handler = logging.StreamHandler(sys.stderr)
    _handler.setFormatter(LineFormatter())
    root.addHandler(_handler)
    root.setLevel(level.upper())
