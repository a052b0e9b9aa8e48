"""What is called around a task's step: its base class's methods, and receivers of Celery's signals.

Before the outcome is committed; errors in them are logged and change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from durable import celery_signals as hooks
from durable import forks
from durable.containment import is_contained
from durable.context import Context
from durable.task import Task

log = logging.getLogger(__name__)

resets: list[Callable[[], None]] = []
"""Called before the hooks of a beginning and after those of an end, in the thread that runs them. Must not raise."""
_STATES = {"done": "SUCCESS", "failed": "FAILURE"}


def observed(task: Task[..., Any]) -> bool:
    """Whether anybody wants to know."""
    return task.has_hooks or bool(hooks.connected_task_hooks)


def begun(task: Task[..., Any], context: Context[Any], args: list[Any], kwargs: dict[str, Any]) -> None:
    """Tell that a step begins."""
    for reset in resets:
        reset()
    hooks.task_prerun.send(task, task_id=context.id, task=task, args=args, kwargs=kwargs)
    _call(task, "before_start", context.id, args, kwargs)


def ended(
    task: Task[..., Any],
    context: Context[Any],
    args: list[Any],
    kwargs: dict[str, Any],
    status: str,
    value: Any,
    error: BaseException | None,
) -> None:
    """Tell how it ended.

    status  done or failed; anything else means another attempt
    error   what it failed or is tried again for
    """
    state = _STATES.get(status, "RETRY")
    info = None if error is None else hooks.ExceptionInfo(error)
    retval: Any = value if error is None else error
    if state == "SUCCESS":
        hooks.task_success.send(task, result=value)
        _call(task, "on_success", value, context.id, args, kwargs)
    elif state == "FAILURE":
        trace = None if info is None else info.tb
        hooks.task_failure.send(
            task, task_id=context.id, exception=error, args=args, kwargs=kwargs, traceback=trace, einfo=info
        )
        _call(task, "on_failure", error, context.id, args, kwargs, info)
    else:
        hooks.task_retry.send(task, request=context.request, reason=error, einfo=info)
        _call(task, "on_retry", error, context.id, args, kwargs, info)
    hooks.task_postrun.send(task, task_id=context.id, task=task, args=args, kwargs=kwargs, retval=retval, state=state)
    _call(task, "after_return", state, retval, context.id, args, kwargs, info)
    for reset in resets:
        reset()


def _call(task: Task[..., Any], name: str, *values: Any) -> None:
    try:
        forks.contained(getattr(task, name), *values)
    except BaseException as error:
        if not is_contained(error):
            raise
        log.exception("%s of %s failed", name, task.name)
