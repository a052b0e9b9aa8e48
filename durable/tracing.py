"""The seam between durable and what traces it: one tracer per process, or none.

A trace context is a text that the tracer makes and reads (W3C `traceparent`); it is stored with instances and signals.
Without a tracer nothing is asked, stored or read. A tracer that fails is logged and switched off, nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

log = logging.getLogger(__name__)


class Cause(NamedTuple):
    """A signal that a step was handed: where it was sent, and what it is."""

    context: str
    name: str
    id: int


class StepSpan(Protocol):
    """A step that runs. What the step traces, inserts and signals in the meantime belongs to it."""

    def end(self, outcome: str, error: str | None) -> None:
        """It has ended, in the thread that began it. outcome: of `step.stop`, or "again"; error: what it raised."""


class Tracer(Protocol):
    """What traces."""

    def context(self, kind: str, name: str) -> str | None:
        """Return the present trace context, of a span made for it where there is none; None when nothing traces.

        kind  "insert" or "signal"; name: of the task or machine, or of the signal
        """

    def step(
        self, name: str, attributes: Mapping[str, str | int], parent: str | None, causes: Sequence[Cause]
    ) -> StepSpan:
        """Begin the span of a step. parent: the context its instance was inserted in."""


_tracer: Tracer | None = None
_nothing_happens: ContextVar[bool] = ContextVar("durable_nothing_happens", default=False)


def trace_with(tracer: Tracer | None) -> None:
    """Trace with `tracer` from now on, in this process and those forked from it later; None: not at all."""
    global _tracer
    _tracer = tracer


def tracer() -> Tracer | None:
    """Return what traces, or None."""
    return _tracer


def context(kind: str, name: str) -> str | None:
    """Return the trace context to store with what is inserted or signalled now; None when nothing traces."""
    if _tracer is None or _nothing_happens.get():
        return None
    try:
        return _tracer.context(kind, name)
    except Exception:
        failed()
        return None


@contextmanager
def declaring() -> Iterator[None]:
    """Rows that are made in this block are not inserted now: they have no trace context."""
    token = _nothing_happens.set(True)
    try:
        yield
    finally:
        _nothing_happens.reset(token)


def failed() -> None:
    """Called where an exception of the tracer was caught: log it and trace no more."""
    trace_with(None)
    log.exception("tracing failed; this process goes on without it")
