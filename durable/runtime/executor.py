"""One step: decode the state, call the user's function, turn what it returned or raised into a Commit.

Touches no database. Nothing that user code does comes out of `execute` as an exception, but what ends the process.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from durable.context import Context, entered
from durable.errors import CorruptRowError, OutcomeError, PayloadError
from durable.instance import Claimed
from durable.outcomes import Cancel, Done, Retry, RetryRequested, Stop
from durable.retry import default_backoff
from durable.serialization import Codec
from durable.storage.claims import Commit
from durable.task import Task

log = logging.getLogger("durable.step")

MAX_ERROR_TEXT = 16_384
"""Characters of a message or a traceback that are kept."""


class Executor:
    """Runs steps for one slot.

    app           handed to contexts
    tasks         (name, version) -> Task
    max_attempts  for tasks that set none
    """

    def __init__(
        self, app: Any, tasks: Mapping[tuple[str, int], Task[..., Any]], codec: Codec, max_attempts: int
    ) -> None:
        self._app = app
        self._tasks = tasks
        self._codec = codec
        self._max_attempts = max_attempts
        self._loop: asyncio.AbstractEventLoop | None = None

    def execute(self, claimed: Claimed) -> Commit:
        """Run the step of a claimed row and return its outcome."""
        task = self._tasks[claimed.machine, claimed.machine_version]
        try:
            state = self._codec.decode(claimed.state_type, claimed.state, f"state of instance {claimed.id}")
            args, kwargs = _arguments(state, claimed)
        except CorruptRowError as error:
            return _failed(claimed, error)
        context = Context(claimed, self._app, log)
        try:
            with entered(context):
                call = task.function
                value = call(context, *args, **kwargs) if task.options.bind else call(*args, **kwargs)
                if task.is_async:
                    value = self._run_coroutine(value)
            return self._outcome(claimed, task, value)
        except Cancel as cancel:
            return self._stopped(claimed, task, cancel.reason, "Cancel")
        except RetryRequested as request:
            return self._again(claimed, task, request.delay, request.cause or request.__context__ or request)
        except BaseException as error:
            log.warning(
                "step failed",
                extra={
                    "instance": claimed.id,
                    "task": claimed.machine,
                    "attempt": claimed.attempt,
                    "error": f"{type(error).__name__}: {_message(error)}"[:200],
                },
            )
            if task.options.retry.retries(error):
                return self._again(claimed, task, None, error)
            return _failed(claimed, error)

    def _run_coroutine(self, coroutine: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(coroutine)

    def _outcome(self, claimed: Claimed, task: Task[..., Any], value: Any) -> Commit:
        """Turn a return value into a Commit; what can't be stored fails the instance at once, not after retries."""
        if isinstance(value, Retry):
            return self._again(claimed, task, value.delay, None)
        if isinstance(value, Stop):
            return self._stopped(claimed, task, value.reason, "Stop")
        if inspect.iscoroutine(value):
            value.close()
            return _failed(
                claimed, OutcomeError(f"{task.name} returned a coroutine: declare it `async def`, or await it")
            )
        if isinstance(value, Done):
            value = value.result
        try:
            return Commit(claimed, "done", self._codec.encode(value, "result", task.options.serializer))
        except PayloadError as error:
            return _failed(claimed, error)

    def _stopped(self, claimed: Claimed, task: Task[..., Any], reason: Any, kind: str) -> Commit:
        if isinstance(reason, BaseException):
            return _failed(claimed, reason)
        try:
            payload = self._codec.encode(reason, "reason", task.options.serializer)
        except PayloadError as error:
            return _failed(claimed, error)
        message = "" if reason is None else reason if isinstance(reason, str) else repr(reason)
        return Commit(claimed, "failed", payload, error=_error_text(kind, message, ""), attempt=claimed.attempt)

    def _again(
        self, claimed: Claimed, task: Task[..., Any], delay: float | None, error: BaseException | None
    ) -> Commit:
        """Another attempt after `delay` seconds (None: the task's backoff), or the end when none is left."""
        limit = claimed.max_attempts or task.options.max_attempts or self._max_attempts
        if error is None:
            error = OutcomeError("the step asked for another attempt")
        if claimed.attempt + 1 >= limit:
            return _failed(claimed, error)
        if delay is None:
            try:
                delay = task.options.retry.delay(claimed.attempt)
            except Exception:
                log.exception("the backoff of %s failed; the default one is used", task.name)
                delay = default_backoff(claimed.attempt)
        status = "scheduled" if delay > 0 else "runnable"
        return Commit(claimed, status, error=error_json(error), attempt=claimed.attempt + 1, delay=delay)


def _arguments(state: Any, claimed: Claimed) -> tuple[list[Any], dict[str, Any]]:
    if not isinstance(state, dict):
        raise CorruptRowError(f"state of instance {claimed.id} is {type(state).__name__}, not a mapping")
    args, kwargs = state.get("args", []), state.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise CorruptRowError(f"state of instance {claimed.id} has no list of args or no mapping of kwargs")
    return args, kwargs


def _failed(claimed: Claimed, error: BaseException) -> Commit:
    return Commit(claimed, "failed", error=error_json(error), attempt=claimed.attempt)


def error_json(error: BaseException) -> str:
    """Return an exception as the JSON that `instances.error` holds: type, message and traceback, all cut and clean."""
    message = _message(error)
    try:
        # The first frame is ours; what the user wrote begins below it. Local variables are never included.
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception as problem:
        text = f"<traceback can't be formatted: {type(problem).__name__}>"
    return _error_text(type(error).__name__, message, text)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # `__str__` is user code too
        return f"<unprintable {type(error).__name__}>"


def _error_text(kind: str, message: str, trace: str) -> str:
    return json.dumps({"type": kind, "message": _clean(message), "traceback": _clean(trace)})


def _clean(text: str) -> str:
    """Cut from the middle, and replace what jsonb refuses: NUL and lone surrogates."""
    if len(text) > MAX_ERROR_TEXT:
        half = MAX_ERROR_TEXT // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
