"""Eager runs: with `task_always_eager`, a `delay()` runs its task here and now, and nothing touches the database.

For tests and scripts of Celery users. Arguments and result go through the serializer as they would on their way to a
worker and back, attempts follow one another without a pause, hooks are called. Machines need a database: only canvases
run here, since all they do is to schedule tasks.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from durable import task_hooks
from durable.around import around
from durable.canvas import NAME, Canvas, Definition
from durable.children import Child
from durable.context import Context, Signal, Transaction, entered
from durable.errors import ConnectionUsageError, DurableError, NoTargetError, OutcomeError, TaskFailed, ValidationError
from durable.instance import Claimed, NewInstance, Snapshot
from durable.outcomes import OUTCOMES, Cancel, Done, Retry, RetryRequested, ScheduleChildren, Stop, step_name
from durable.result import AsyncResult
from durable.task import Task

log = logging.getLogger("durable.step")

_ids = itertools.count(-1, -1)
"""Negative: nobody must take them for rows."""


class EagerResult(AsyncResult[Any]):
    """A finished result that is in no database. Its id is negative."""

    def __init__(self, snapshot: Snapshot, source: Any, parts: Sequence[EagerResult] = ()) -> None:
        super().__init__(snapshot.id, source)
        self._final = self._end = snapshot
        self._parts = list(parts)

    @property
    def children(self) -> Any:
        """What a canvas ran, in order."""
        return [part.as_child() for part in self._parts]

    async def asignal(self, name: str, payload: Any = None, *, dedup_key: str | None = None, **_: Any) -> bool:
        """Raise NoTargetError: it is finished."""
        return self.signal(name, payload, dedup_key=dedup_key)

    async def achildren(self) -> list[Child]:
        """What a canvas ran, in order."""
        return list(self.children)

    @property
    def unread(self) -> list[Signal]:
        """Empty: an eager run takes no signals."""
        return []

    async def aunread(self) -> list[Signal]:
        """Empty: an eager run takes no signals."""
        return []

    def as_child(self) -> Child:
        """This result as the canvas that waited for it sees it."""
        end = self._end
        return Child(end.id, end.machine, end.status, None, self.result, end.error)

    def cancel(self, reason: str | None = None, **_: Any) -> bool:
        """False: it is finished."""
        return False

    async def acancel(self, reason: str | None = None, **_: Any) -> bool:
        """False: it is finished."""
        return False

    def retry(self) -> bool:
        """False: it has had its attempts."""
        return False

    async def aretry(self) -> bool:
        """False: it has had its attempts."""
        return False

    def signal(self, name: str, payload: Any = None, **_: Any) -> bool:
        """Raise NoTargetError: it is finished."""
        raise NoTargetError(f"instance {self.id} ran eagerly and is finished: it takes no signal")


class Eager:
    """Runs what an app would have inserted."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def run(self, new: NewInstance, parent_id: int | None = None) -> EagerResult:
        """Run a prepared row to its end and return its result.

        Raises ValidationError for a machine; with `task_eager_propagates` whatever the task failed with.
        """
        definition: Definition = self._app.definitions[new.machine, new.machine_version]
        instance_id = next(_ids)
        if isinstance(definition, Task):
            return self._run_task(new, definition, instance_id, parent_id)
        if new.machine != NAME:
            raise ValidationError(
                f"{new.machine} is a machine, which task_always_eager can't run: "
                "test it with durable.testing.drain, and without that setting"
            )
        return self._run_canvas(new, instance_id)

    def _run_task(self, new: NewInstance, task: Task[..., Any], instance_id: int, parent_id: int | None) -> EagerResult:
        state = self._app.codec.decode(*new.state, f"arguments of {task.name}")
        args, kwargs = state.get("args", []), state.get("kwargs", {})
        limit = new.max_attempts or task.options.max_attempts or self._app.conf.max_attempts
        for attempt in itertools.count():
            context = self._context(new, instance_id, parent_id, attempt)
            observed = task_hooks.observed(task)
            if observed:
                task_hooks.begun(task, context, args, kwargs)
            status, value, error, most = self._attempt(task, context, args, kwargs)
            if status == "retry" and attempt + 1 >= (most or limit):
                status = "failed"
            if status == "done" and task.options.ignore_result and parent_id is None:
                value = None
            if status == "done":
                try:
                    payload = self._app.codec.encode(value, "result", task.options.serializer)
                except DurableError as refused:
                    status, error = "failed", refused
            if observed:
                task_hooks.ended(task, context, args, kwargs, status, value, error)
            if status == "done":
                return self._result(new, instance_id, attempt, "done", payload)
            if status == "failed":
                return self._failed(
                    new, instance_id, attempt, error or OutcomeError("the step asked for another attempt")
                )
        raise AssertionError("attempts are numbered without end")

    def _attempt(
        self, task: Task[..., Any], context: Context[Any], args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[str, Any, BaseException | None, int | None]:
        """(done, failed or retry; the value; what it failed for; most attempts if it named any)."""
        try:
            with entered(context):
                call: Callable[[], Any] = partial(
                    task.function, *([context, *args] if task.options.bind else args), **kwargs
                )
                if self._app.step_managers:
                    call = around(self._app.step_managers, context, task.is_async, call)
                value = call()
                if task.is_async:
                    value = _awaited(value)
        except Cancel as cancel:
            return "failed", None, cancel, None
        except RetryRequested as request:
            return "retry", None, request.cause or request.__context__ or request, request.limit
        except Exception as error:
            return "retry" if task.options.retry.retries(error) else "failed", None, error, None
        if isinstance(value, Retry):
            return "retry", None, None, None
        if isinstance(value, Stop):
            reason = value.reason
            return "failed", None, reason if isinstance(reason, BaseException) else Cancel(reason), None
        if isinstance(value, Done):
            value = value.result
        elif isinstance(value, OUTCOMES):
            kind = type(value).__name__
            return (
                "failed",
                None,
                OutcomeError(f"{task.name} returned {kind}: a task has one step; use a Machine"),
                None,
            )
        return "done", value, None, None

    def _run_canvas(self, new: NewInstance, instance_id: int) -> EagerResult:
        machine, step, payload = Canvas(), "run", new.state
        parts: list[EagerResult] = []
        latest: list[Child] = []
        while True:
            state = self._app.codec.decode(*payload, "state of a canvas")
            outcome = getattr(machine, step)(SimpleNamespace(state=state, children=latest, attempt=0))
            if isinstance(outcome, Done):
                return self._result(
                    new, instance_id, 0, "done", self._app.codec.encode(outcome.result, "result"), parts
                )
            if isinstance(outcome, Stop):
                return self._failed(new, instance_id, 0, outcome.reason, parts)
            assert isinstance(outcome, ScheduleChildren), "a canvas schedules or ends"
            ran = [self.run(self._app.prepare(child, {}), instance_id) for child in outcome.children]
            parts += ran
            latest = [result.as_child() for result in ran]
            payload, step = self._app.codec.encode(outcome.state, "state"), step_name(outcome.then)

    def _context(self, new: NewInstance, instance_id: int, parent_id: int | None, attempt: int) -> Context[Any]:
        claimed = Claimed(
            id=instance_id,
            token=0,
            version=attempt,
            priority=new.priority,
            eligible_at=datetime.now(UTC),
            machine=new.machine,
            machine_version=new.machine_version,
            step=new.step,
            attempt=attempt,
            crashes=0,
            state_type=new.state.type,
            state=new.state.body,
            max_attempts=new.max_attempts,
            correlation_key=new.correlation_key,
            keeps_key=False,
            expired=None,
            queue=new.queue,
            parent_id=parent_id,
        )
        context: Context[Any] = Context(claimed, self._app, log, None, _no_connection)
        context.never_cancelled()
        return context

    def _result(
        self,
        new: NewInstance,
        instance_id: int,
        attempt: int,
        status: str,
        payload: Any,
        parts: Sequence[EagerResult] = (),
    ) -> EagerResult:
        kind, body = payload
        end = Snapshot(instance_id, status, kind, body, None, attempt + 1, new.machine, new.step, new.queue, False)
        return EagerResult(end, self._app, parts)

    def _failed(
        self, new: NewInstance, instance_id: int, attempt: int, error: BaseException, parts: Sequence[EagerResult] = ()
    ) -> EagerResult:
        if self._app.conf.task_eager_propagates:
            raise error
        if isinstance(error, TaskFailed):
            kind, message, trace = error.error_type, error.message, error.traceback_text
        else:
            kind, message, trace = type(error).__name__, str(error), "".join(traceback.format_exception(error))
        why = {"type": kind, "message": message, "traceback": trace}
        end = Snapshot(instance_id, "failed", None, None, why, attempt + 1, new.machine, new.step, new.queue, False)
        return EagerResult(end, self._app, parts)


def _no_connection(_claimed: Claimed, _is_async: bool, _keep: Callable[[Transaction], None]) -> None:
    raise ConnectionUsageError("ctx.connection needs a database: with task_always_eager there is none")


def _awaited(coroutine: Any) -> Any:
    """Run a coroutine to its end, also where a loop is running already: then in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    ended: list[Any] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            ended.append((context.run(asyncio.run, coroutine), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, name="durable-eager")
    thread.start()
    thread.join()
    ((value, error),) = ended
    if error is not None:
        raise error
    return value
