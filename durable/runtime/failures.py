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

_class_name = type.__dict__["__name__"].__get__
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
    message = "" if reason is None else reason if isinstance(reason, str) else _repr(reason)
    return Commit(claimed, "failed", payload, error=error_text(kind, message, ""), attempt=claimed.attempt)


def log_failure(log: logging.Logger, claimed: Claimed, error: BaseException) -> None:
    """Log that a step raised; never a payload."""
    seen = raised.get()
    if seen is not None:
        seen.append(error)
    log.warning(
        "step failed",
        extra={**fields(claimed), "error": f"{name_of(error)}: {message_of(error)}"[:200]},
    )


def in_ascii(error: str) -> str:
    """Return the JSON of an error with every letter beyond ASCII as an escape, for a database that lacks the letter."""
    parts: dict[str, Any] = json.loads(error)
    return json.dumps(
        {
            name: part.encode("ascii", "backslashreplace").decode() if isinstance(part, str) else part
            for name, part in parts.items()
        }
    )


def error_json(error: BaseException) -> str:
    """Return an exception as the JSON that `instances.error` holds: type, message and traceback, all cut and clean."""
    message = message_of(error)
    try:
        # The first frames are ours; the user's begin below them. Local variables are never included.
        trace = error.__traceback__
        while trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("durable.runtime."):
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace))
    except BaseException as problem:  # notes, causes and loaders of source are user code
        text = f"<traceback can't be formatted: {name_of(problem)}>"
    return error_text(name_of(error), message, text)


def message_of(error: BaseException) -> str:
    try:
        return str.__str__(str(error))  # a subclass of str is user code as well
    except BaseException:  # `__str__` is user code too
        return f"<unprintable {name_of(error)}>"


def name_of(error: BaseException) -> str:
    """Return the name of an exception's class, whatever its metaclass says."""
    return str(_class_name(type(error)))


def _repr(value: Any) -> str:
    try:
        return str.__str__(repr(value))
    except BaseException:  # `__repr__` is user code too
        return f"<unprintable {type(value).__name__}>"


def error_text(kind: str, message: str, trace: str) -> str:
    return json.dumps({"type": _clean(kind), "message": _clean(message), "traceback": _clean(trace)})


def _clean(text: str) -> str:
    """Cut from the middle, and replace what jsonb refuses: NUL and lone surrogates."""
    if len(text) > MAX_ERROR_TEXT:
        half = MAX_ERROR_TEXT // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
