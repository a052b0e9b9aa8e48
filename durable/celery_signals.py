"""Celery's signals: functions to be called at moments in the life of tasks and processes, under Celery's names.

    from durable.celery_signals import task_prerun

    @task_prerun.connect(sender="shop.send")
    def note(sender, task_id, task, args, kwargs, **rest): ...

Not `durable.signals`, since a signal is a message to an instance here. A receiver is called with keyword arguments,
those that Celery gives and `signal`; what it raises is logged and goes no further. The task signals tell what a step
did before its outcome is committed: a crash in between repeats them together with the step.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from durable import forks
from durable.containment import is_contained
from durable.errors import DefinitionError
from durable.validation import shown

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)

connected_task_hooks: set[str] = set()
"""Names of the task signals that somebody listens to: while it is empty, a step pays for one look at it."""


class Hook:
    """One of Celery's signals."""

    def __init__(self, name: str, *, of_steps: bool = False, of_producers: bool = False) -> None:
        self.name = name
        self.receivers: list[tuple[Any, Any, Callable[..., Any]]] = []
        """(dispatch_uid, sender, function)"""
        self._of_steps = of_steps
        self._of_producers = of_producers

    def connect(self, receiver: Any = None, *, sender: Any = None, weak: bool = True, dispatch_uid: Any = None) -> Any:
        """Have a function called; also a decorator, with or without arguments.

        sender        only for this task (or its name); None: for all
        weak          accepted; receivers are kept in any case
        dispatch_uid  a receiver with the same one is replaced; default: the function itself
        """

        def keep(function: F) -> F:
            if not callable(function):
                raise DefinitionError(f"{self.name}.connect takes a function, got {shown(function)}")
            uid = function if dispatch_uid is None else dispatch_uid
            self.receivers = [entry for entry in self.receivers if entry[:2] != (uid, sender)]
            self.receivers.append((uid, sender, function))
            if self._of_steps:
                connected_task_hooks.add(self.name)
            return function

        return keep if receiver is None else keep(receiver)

    def disconnect(self, receiver: Any = None, *, sender: Any = None, dispatch_uid: Any = None) -> bool:
        """Have it called no more; return whether it was."""
        uid = receiver if dispatch_uid is None else dispatch_uid
        left = [entry for entry in self.receivers if entry[:2] != (uid, sender)]
        found, self.receivers = len(left) < len(self.receivers), left
        if not left:
            connected_task_hooks.discard(self.name)
        return found

    def send(self, sender: Any, **values: Any) -> None:
        """Call the receivers for this sender, in the order in which they were connected."""
        for _, wanted, receiver in self.receivers:
            try:
                if wanted is None or wanted is sender or _name(wanted) == _name(sender):
                    forks.contained(receiver, signal=self, sender=sender, **values)
            except BaseException as error:
                if not self._contains(error):
                    raise
                log.exception("a receiver of %s failed: %s", self.name, shown(receiver))

    def _contains(self, error: BaseException) -> bool:
        """Whether what a receiver raised goes no further. A producer's process may be ended by its own receivers."""
        return isinstance(error, Exception) or (not self._of_producers and is_contained(error))

    def __repr__(self) -> str:
        return f"<{self.name}>"


class ExceptionInfo:
    """An exception as Celery's `einfo`: its type, itself, and as text its traceback."""

    def __init__(self, error: BaseException) -> None:
        self.type = type(error)
        self.exception = error
        self.tb = error.__traceback__
        try:
            self.traceback = "".join(traceback.format_exception(error))
        except Exception as problem:  # an exception's notes and causes are user code
            self.traceback = f"<traceback can't be formatted: {type(problem).__name__}>"

    def __str__(self) -> str:
        return self.traceback


def _name(sender: Any) -> Any:
    return getattr(sender, "name", sender)


before_task_publish = Hook("before_task_publish", of_producers=True)
after_task_publish = Hook("after_task_publish", of_producers=True)
task_prerun = Hook("task_prerun", of_steps=True)
task_postrun = Hook("task_postrun", of_steps=True)
task_success = Hook("task_success", of_steps=True)
task_failure = Hook("task_failure", of_steps=True)
task_retry = Hook("task_retry", of_steps=True)
worker_init = Hook("worker_init")
worker_ready = Hook("worker_ready")
worker_shutdown = Hook("worker_shutdown")
worker_process_init = Hook("worker_process_init")
worker_process_shutdown = Hook("worker_process_shutdown")
beat_init = Hook("beat_init")
