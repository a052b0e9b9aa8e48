"""The effects log: what user code did to the world outside, one line per O_APPEND write, a file per process.

in|out|fork instance version token step machine attempt pid generation monotonic wall mark

A line in the page cache survives the death of its writer; the monotonic clock is one for all processes of a machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_files: dict[int, int] = {}


@dataclass(frozen=True, slots=True)
class Effect:
    """One line. `version` is that of the claimed row: outcomes committed before.

    kind  in, out: of a step; fork: written by a process that a step forked, `mark` says how that is to end
    """

    kind: str
    instance: int
    version: int
    token: int
    step: str
    machine: str
    attempt: int
    pid: int
    generation: int
    at: float
    wall: float
    mark: str


def _write(line: str) -> None:
    pid = os.getpid()
    if pid not in _files:
        path = Path(os.environ["CHAOS_EFFECTS"]) / f"{pid}-{time.monotonic_ns()}"
        _files[pid] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(_files[pid], line.encode())


@contextmanager
def effect(ctx: Any, mark: str = "-") -> Iterator[None]:
    """Note that a step was entered, and that its code came to its end."""
    note("in", ctx, mark)
    yield
    note("out", ctx, mark)


def note(kind: str, ctx: Any, mark: str) -> None:
    """Write one line."""
    claimed = ctx._claimed  # the fence is no part of the public context
    rest = f"{claimed.id} {claimed.version} {claimed.token} {ctx.step} {ctx.name} {ctx.attempt}"
    rest += f" {os.getpid()} {ctx.app.generation}"
    _write(f"{kind} {rest} {time.monotonic():.6f} {time.time():.3f} {mark}\n")


def parse(line: str) -> Effect:
    """Return a line as it was written. Raises ValueError for a torn one."""
    kind, instance, version, token, step, machine, attempt, pid, generation, at, wall, mark = line.split(" ")
    return Effect(
        kind, int(instance), int(version), int(token), step, machine, int(attempt), int(pid), int(generation),
        float(at), float(wall), mark,
    )  # fmt: skip


def read(folder: Path) -> list[Effect]:
    """Return every whole line of every process, by time."""
    found = []
    for path in folder.iterdir():
        *lines, last = path.read_text().split("\n")
        assert last == "" or "\n" not in last
        found += [parse(line) for line in lines]
    return sorted(found, key=lambda one: one.at)


def count(folder: Path) -> int:
    """Return how many steps were entered until now."""
    return sum(path.read_bytes().count(b"in ") for path in folder.iterdir())
