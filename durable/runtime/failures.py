"""Exceptions of user code as rows: what of them is kept, and made storable."""

from __future__ import annotations

import json
import logging
import traceback
from contextvars import ContextVar
from typing import Any

from durable.errors import PayloadError, TaskFailed
from durable.instance import Claimed
from durable.runtime.reporting import fields
from durable.serialization import Codec
from durable.storage.claims import Commit

MAX_ERROR_TEXT = 16_384
"""Characters of a message or a traceback that are kept."""

raised: ContextVar[list[BaseException] | None] = ContextVar("durable_raised", default=None)
"""Takes in what steps raise, for a caller that runs them in its own thread: a drain."""


def failed(claimed: Claimed, error: BaseException) -> Commit:
    return Commit(claimed, "failed", error=error_json(error), attempt=claimed.attempt)


def stopped(claimed: Claimed, reason: Any, kind: str, codec: Codec, serializer: str | None) -> Commit:
    """Return the failure that `Stop(reason)` or `Cancel(reason)` asks for."""
    if isinstance(reason, TaskFailed):  # another instance's failure, handed on as it was
        text = error_text(reason.error_type, reason.message, reason.traceback_text)
        return Commit(claimed, "failed", error=text, attempt=claimed.attempt)
    if isinstance(reason, BaseException):
        return failed(claimed, reason)
    try:
        payload = codec.encode(reason, "reason", serializer)
    except PayloadError as error:
        return failed(claimed, error)
    message = "" if reason is None else reason if isinstance(reason, str) else repr(reason)
    return Commit(claimed, "failed", payload, error=error_text(kind, message, ""), attempt=claimed.attempt)


def log_failure(log: logging.Logger, claimed: Claimed, error: BaseException) -> None:
    """Log that a step raised; never a payload."""
    seen = raised.get()
    if seen is not None:
        seen.append(error)
    log.warning(
        "step failed",
        extra={**fields(claimed), "error": f"{type(error).__name__}: {message_of(error)}"[:200]},
    )


def error_json(error: BaseException) -> str:
    """Return an exception as the JSON that `instances.error` holds: type, message and traceback, all cut and clean."""
    message = message_of(error)
    try:
        # The first frame is ours; what the user wrote begins below it. Local variables are never included.
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception as problem:
        text = f"<traceback can't be formatted: {type(problem).__name__}>"
    return error_text(type(error).__name__, message, text)


def message_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # `__str__` is user code too
        return f"<unprintable {type(error).__name__}>"


def error_text(kind: str, message: str, trace: str) -> str:
    return json.dumps({"type": _clean(kind), "message": _clean(message), "traceback": _clean(trace)})


def _clean(text: str) -> str:
    """Cut from the middle, and replace what jsonb refuses: NUL and lone surrogates."""
    if len(text) > MAX_ERROR_TEXT:
        half = MAX_ERROR_TEXT // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
