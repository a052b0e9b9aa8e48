"""Assertions on where an instance stands; each says what it found instead: status, step, error, inbox, state."""

from __future__ import annotations

import re
from typing import Any

from durable.app import Durable
from durable.errors import CorruptRowError, NotFoundError, TaskCancelled, TaskFailed
from durable.result import AsyncResult
from durable.storage import inspection, signals
from durable.storage.inspection import Detail
from durable.testing import journal
from durable.testing.targets import Target, find


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()
"""Equal to everything."""
_MOST_TEXT = 2000


def assert_status(app: Durable, target: Target, status: str) -> AsyncResult[Any]:
    """Assert an instance's status; return its result handle.

    target  an id, a correlation key (whoever occupies it, else who had it last), or a result
    Raises AssertionError, which shows the instance.
    """
    detail = _look(app, target)
    if detail.status != status and not journal.is_past():
        raise AssertionError(_story(app, detail, f"not {status}"))
    return app.result(detail.id)


def assert_awaiting(app: Durable, target: Target, *names: str) -> AsyncResult[Any]:
    """Assert that an instance is parked and awaits all of these signals, maybe among others; as `assert_status`."""
    detail = _look(app, target)
    missing = [name for name in names if name not in (detail.awaits or ())]
    if (detail.status != "awaiting_signal" or missing) and not journal.is_past():
        wanted = ", ".join(missing or names)
        raise AssertionError(_story(app, detail, f"not awaiting {wanted}" if wanted else "not awaiting a signal"))
    return app.result(detail.id)


def assert_done(app: Durable, target: Target, result: Any = ANY) -> Any:
    """Assert that an instance ended `done`, with this result if one is given; return its result."""
    detail = _look(app, target)
    past = journal.is_past()
    if detail.status != "done" and not past:
        raise AssertionError(_story(app, detail, "not done"))
    value = _decoded(app, detail.result_type, detail.result, f"result of instance {detail.id}")
    if not (result == value or past):
        raise AssertionError(_story(app, detail, f"with result {_cut(value)}, not {_cut(result)}"))
    return value


def assert_failed(
    app: Durable, target: Target, error: type[BaseException] | str | None = None, *, match: str | None = None
) -> TaskFailed:
    """Assert that an instance ended `failed`; return its failure: error_type, message, traceback_text.

    error  the exception's class, or its name ("Stop" and "Cancel" for these)
    match  regular expression that its message must contain
    """
    detail = _look(app, target)
    found = detail.error or {}
    kind, message = found.get("type", ""), found.get("message", "")
    wanted = error.__name__ if isinstance(error, type) else error
    if not journal.is_past():
        if detail.status != "failed":
            raise AssertionError(_story(app, detail, "not failed"))
        if wanted is not None and kind != wanted:
            raise AssertionError(_story(app, detail, f"with {kind}, not {wanted}"))
        if match is not None and not re.search(match, message):
            raise AssertionError(_story(app, detail, f"whose message does not match {match!r}"))
    made = TaskCancelled if detail.status == "cancelled" else TaskFailed
    return made(detail.id, kind, message, found.get("traceback") or "")


def _look(app: Durable, target: Target) -> Detail:
    try:
        instance_id = find(app, target)
        detail = app.run(inspection.show(instance_id))
        if detail is None:
            raise NotFoundError(f"there is no instance {instance_id}")
    except NotFoundError as error:
        raise AssertionError(str(error)) from None
    return detail


def _story(app: Durable, detail: Detail, but: str) -> str:
    key = f", key {detail.correlation_key!r}" if detail.correlation_key is not None else ""
    lines = [
        f"instance {detail.id} ({detail.machine}{key}) is {detail.status}, {but}",
        f"  step: {detail.step}, attempt {detail.attempt}, queue {detail.queue}",
    ]
    if detail.status == "awaiting_signal":
        until = f", until {detail.deadline}" if detail.deadline is not None else ""
        lines.append(f"  awaits: {', '.join(detail.awaits or ())}{until}")
    if detail.status == "scheduled":
        lines.append(f"  due: {detail.eligible_at}")
    if detail.error is not None:
        lines.append(f"  error: {detail.error.get('type')}: {_cut(detail.error.get('message', ''), shown=str)}")
        if detail.error.get("traceback"):
            lines += [f"    {line}" for line in str(detail.error["traceback"]).rstrip().splitlines()]
    inbox = app.run(signals.inbox([detail.id])).get(detail.id, [])
    if inbox:
        lines.append("  inbox:")
        for signal in inbox:
            lines.append(f"    {signal.name} {_cut(_decoded(app, signal.payload_type, signal.payload, signal.name))}")
    elif detail.finished_at is None:
        lines.append("  inbox: empty")
    state = _decoded(app, detail.state_type, detail.state, f"state of instance {detail.id}")
    lines.append(f"  state: {_cut(state)}")
    if detail.result_type is not None:
        lines.append(f"  result: {_cut(_decoded(app, detail.result_type, detail.result, 'result'))}")
    return "\n".join(lines)


def _decoded(app: Durable, kind: str | None, body: bytes | None, what: str) -> Any:
    if kind is None:
        return None
    try:
        return app.codec.decode(kind, body or b"", what)
    except CorruptRowError as error:
        return error


def _cut(value: Any, shown: Any = repr) -> str:
    text = str(shown(value))
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."
