"""A step of a task: call the function, turn what it returned or raised into a Commit."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from durable.app import Durable
from durable.around import around
from durable.containment import is_contained
from durable.context import Begin, Context, entered
from durable.errors import CorruptRowError, DurableError, OutcomeError, PayloadError
from durable.instance import Claimed
from durable.outcomes import OUTCOMES, Cancel, Done, Retry, RetryRequested, Stop
from durable.retry import default_backoff
from durable.runtime import reporting, soft_limit
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.failures import error_json, failed, log_failure, stopped
from durable.runtime.soft_limit import Within
from durable.runtime.step_transaction import StepAgain
from durable.storage.claims import Commit
from durable.task import Task
from durable.task_hooks import begun, ended, observed

log = logging.getLogger("durable.step")


class _Refused(Exception):
    """The step returned what can't be its outcome."""

    def __init__(self, reason: DurableError) -> None:
        self.reason = reason


class TaskRunner:
    """Runs tasks for one slot."""

    def __init__(self, app: Durable, coroutines: CoroutineRunner, begin: Begin | None, within: Within) -> None:
        self._app = app
        self._codec = app.codec
        self._coroutines = coroutines
        self._begin = begin
        self._within = within
        self._soft_time_limit = app.conf.soft_time_limit
        self._managers = app.step_managers

    def run(self, claimed: Claimed, task: Task[..., Any]) -> Commit:
        """Run the step of a claimed row and return its outcome."""
        try:
            state = self._codec.decode(claimed.state_type, claimed.state, f"state of instance {claimed.id}")
            args, kwargs = arguments(state, f"state of instance {claimed.id}")
        except CorruptRowError as error:
            return failed(claimed, error)
        if self._app.conf.log_payloads:
            reporting.arguments(claimed, state)
        context: Context[Any] = Context(claimed, self._app, log, None, self._begin, task.is_async)
        if not observed(task):
            return self._step(claimed, task, context, args, kwargs)[0]
        begun(task, context, args, kwargs)
        soft_limit.take_back()
        commit, value, problem = self._step(claimed, task, context, args, kwargs)
        ended(task, context, args, kwargs, commit.status, value, problem)
        soft_limit.take_back()
        return commit

    def _step(
        self, claimed: Claimed, task: Task[..., Any], context: Context[Any], args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[Commit, Any, BaseException | None]:
        """Return its outcome, with what it returned and what it failed or is tried again for."""
        try:
            with entered(context):
                function = task.function
                seconds = task.options.soft_time_limit or self._soft_time_limit
                if task.options.bind:
                    args = [context, *args]
                call: Callable[[], Any] = partial(function, *args, **kwargs)
                if self._managers:
                    call = around(self._managers, context, task.is_async, call)
                value = self._within(seconds, self._coroutines, task.is_async, call)
                return context.commit(self.outcome(claimed, task, value)), value, None
        except StepAgain:
            raise
        except BaseException as error:
            return self.ended_by(claimed, task, error)

    def ended_by(
        self, claimed: Claimed, task: Task[..., Any], error: BaseException
    ) -> tuple[Commit, Any, BaseException]:
        """Return what `_step` does for a step that raised."""
        match error:
            case _Refused(reason=reason):
                return failed(claimed, reason), None, reason
            case Cancel():
                return stopped(claimed, error.reason, "Cancel", self._codec, task.options.serializer), None, error
            case RetryRequested():
                cause = error.cause or error.__context__ or error
                return self._again(claimed, task, error.delay, cause, error.limit), None, cause
        log_failure(log, claimed, error)
        if task.options.retry.retries(error):
            return self._again(claimed, task, None, error), None, error
        return failed(claimed, error), None, error

    def outcome(self, claimed: Claimed, task: Task[..., Any], value: Any) -> Commit:
        """Turn a return value into a Commit; what can't be stored fails the instance at once, not after retries."""
        if isinstance(value, Retry):
            return self._again(claimed, task, value.delay, None)
        if isinstance(value, Stop):
            return stopped(claimed, value.reason, "Stop", self._codec, task.options.serializer)
        if inspect.iscoroutine(value):
            value.close()
            raise _Refused(OutcomeError(f"{task.name} returned a coroutine: declare it `async def`, or await it"))
        if isinstance(value, Done):
            value = value.result
        elif isinstance(value, OUTCOMES):
            name = type(value).__name__
            raise _Refused(OutcomeError(f"{task.name} returned {name}: a task has one step; use a Machine"))
        if task.options.ignore_result and claimed.parent_id is None:
            value = None  # but a canvas or a machine that waits for it gets it
        try:
            return Commit(claimed, "done", self._codec.encode(value, "result", task.options.serializer))
        except PayloadError as error:
            raise _Refused(error) from error

    def _again(
        self,
        claimed: Claimed,
        task: Task[..., Any],
        delay: float | None,
        error: BaseException | None,
        limit: int | None = None,
    ) -> Commit:
        """Another attempt after `delay` seconds (None: the task's backoff), or the end when none is left."""
        limit = limit or claimed.max_attempts or task.options.max_attempts or self._app.conf.max_attempts
        if error is None:
            error = OutcomeError("the step asked for another attempt")
        if claimed.attempt + 1 >= limit:
            return failed(claimed, error)
        if delay is None:
            try:
                delay = task.options.retry.delay(claimed.attempt)
            except BaseException as problem:
                if not is_contained(problem):
                    raise
                log.exception("the backoff of %s failed; the default one is used", task.name)
                delay = default_backoff(claimed.attempt)
        status = "scheduled" if delay > 0 else "runnable"
        return Commit(claimed, status, error=error_json(error), attempt=claimed.attempt + 1, delay=delay)


def arguments(state: Any, what: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments that a task's state holds. Raises CorruptRowError, which calls the state `what`."""
    if not isinstance(state, dict):
        raise CorruptRowError(f"{what} is {type(state).__name__}, not a mapping")
    args, kwargs = state.get("args", []), state.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise CorruptRowError(f"{what} has no list of args or no mapping of kwargs")
    return args, kwargs
