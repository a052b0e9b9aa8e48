"""A step of a machine: load the state, call the method, turn its outcome (or its exception's) into a Commit."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from durable import forks
from durable.app import Durable
from durable.around import around
from durable.canvas import BUILT_IN
from durable.context import Begin, Context, entered
from durable.errors import CorruptRowError, DatabaseUnavailableError, DurableError, OutcomeError
from durable.instance import Claimed, NewInstance, Payload
from durable.machine import MachineDefinition
from durable.outcomes import (
    KEEP,
    OUTCOMES,
    Await,
    Cancel,
    Done,
    Next,
    Retry,
    RetryRequested,
    ScheduleChildren,
    Stop,
    step_name,
)
from durable.retry import default_backoff
from durable.runtime import reporting, soft_limit
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.failures import error_json, failed, log_failure, stopped
from durable.runtime.soft_limit import Within
from durable.runtime.step_transaction import StepAgain
from durable.storage.claims import Commit, Limits
from durable.storage.session import Operation
from durable.validation import near

log = logging.getLogger("durable.step")


class MachineRunner:
    """Runs steps of machines for one slot."""

    def __init__(self, app: Durable, coroutines: CoroutineRunner, begin: Begin | None, within: Within) -> None:
        self._app = app
        self._codec = app.codec
        self._coroutines = coroutines
        self._begin = begin
        self._within = within
        self._soft_time_limit = app.conf.soft_time_limit
        self._managers = app.step_managers

    def run(self, claimed: Claimed, definition: MachineDefinition) -> Commit:
        """Run the step of a claimed row and return its outcome."""
        try:
            step, data, state = self.loaded(claimed, definition)
            machine = forks.contained(definition.cls)
        except BaseException as error:  # without a state or an object there is no `handle` to ask
            log_failure(log, claimed, error)
            return failed(claimed, error)
        if self._app.conf.log_payloads:
            reporting.arguments(claimed, data)
        is_async = claimed.step in definition.async_steps
        context: Context[Any] = Context(claimed, self._app, log, state, self._begin, is_async)
        error_seen: BaseException
        try:
            with entered(context):
                seconds = definition.options.soft_time_limit or self._soft_time_limit
                call: Callable[[], Any] = partial(step, machine, context)
                if self._managers:
                    call = self.inside(context, is_async, call)
                value = self._within(seconds, self._coroutines, is_async, call)
                if inspect.iscoroutine(value):
                    value.close()
                    raise OutcomeError(
                        f"step {claimed.step!r} of {definition.name} returned a coroutine: declare it `async def`"
                    )
                return context.commit(self.outcome(claimed, definition, context, value))
        except StepAgain:
            raise
        except BaseException as error:
            error_seen = error
        return self.ended_by(claimed, definition, context, machine, error_seen)

    def inside(self, context: Context[Any], is_async: bool, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return what calls user code inside the app's `around_step` managers; a canvas has none."""
        return call if context.name in BUILT_IN else around(self._managers, context, is_async, call)

    def loaded(self, claimed: Claimed, definition: MachineDefinition) -> tuple[Any, Any, Any]:
        """Return a row's step, its state as it was stored, and loaded.

        Raises CorruptRowError, ValidationError, and whatever State raises that is no Exception.
        """
        data = self._codec.decode(claimed.state_type, claimed.state, f"state of instance {claimed.id}")
        state = definition.state_type.load(data)
        step = definition.steps.get(claimed.step)
        if step is None:
            raise CorruptRowError(_no_step(definition, claimed.step))
        return step, data, state

    def ended_by(
        self, claimed: Claimed, definition: MachineDefinition, context: Context[Any], machine: Any, error: BaseException
    ) -> Commit:
        """Return the outcome of a step that raised."""
        match error:
            case Cancel():
                return stopped(claimed, error.reason, "Cancel", self._codec, definition.options.serializer)
            case RetryRequested():
                cause = error.cause or error.__context__ or error
                if not self._is_last(claimed, error):
                    return self._again(claimed, error, cause)
                error = cause  # what the attempts were spent on
        log_failure(log, claimed, error)
        return self._handled(claimed, definition, context, machine, error)

    def _handled(
        self, claimed: Claimed, definition: MachineDefinition, context: Context[Any], machine: Any, error: BaseException
    ) -> Commit:
        """Ask the machine's `handle`; if that fails too, or returns nonsense, the instance fails for it."""
        try:
            with entered(context):
                handle: Callable[[], Any] = partial(machine.handle, error, context)
                if self._managers:
                    handle = self.inside(context, inspect.iscoroutinefunction(machine.handle), handle)
                value = forks.contained(handle)
                if inspect.iscoroutine(value):
                    value = self._coroutines.run(value)
            soft_limit.take_back()
            commit = self.outcome(claimed, definition, context, value)
        except StepAgain:
            raise
        except Cancel as cancel:
            return stopped(claimed, cancel.reason, "Cancel", self._codec, definition.options.serializer)
        except RetryRequested as request:
            cause = request.cause or error
            return failed(claimed, cause) if self._is_last(claimed, request) else self._again(claimed, request, cause)
        except BaseException as problem:
            log_failure(log, claimed, problem)
            return failed(claimed, problem)
        if commit.error is None and commit.kind != "end":
            commit.error = error_json(error)  # a retried or rerouted failure stays visible on the row
        return commit

    def _is_last(self, claimed: Claimed, request: RetryRequested) -> bool:
        """Whether a step that asks for another attempt has had all of its attempts."""
        limit = request.limit or claimed.max_attempts or self._app.conf.max_attempts
        return claimed.attempt + 1 >= limit

    def _again(self, claimed: Claimed, request: RetryRequested, cause: BaseException) -> Commit:
        """Return another attempt of the step, with `cause` as its error, after the delay asked for or the backoff."""
        delay = default_backoff(claimed.attempt) if request.delay is None else request.delay
        return Commit(
            claimed,
            "scheduled" if delay > 0 else "runnable",
            kind="retry",
            error=error_json(cause),
            attempt=claimed.attempt + 1,
            delay=delay,
        )

    def outcome(self, claimed: Claimed, definition: MachineDefinition, context: Context[Any], value: Any) -> Commit:
        """Turn an outcome into a Commit. Raises OutcomeError, PayloadError, ValidationError: errors of the step."""
        serializer = definition.options.serializer
        # A retry consumes none, so that one that can't be read does not keep a step from coming again.
        looks = bool(claimed.awaits) and not isinstance(value, Retry)
        shown = context.awaited if looks else []
        awaited = [signal.id for signal in shown]
        match value:
            case Done(result):
                commit = Commit(claimed, "done", self._codec.encode(result, "result", serializer))
                commit.rerun = definition.options.on_unread == "rerun"
                return commit
            case Stop(reason):
                commit = stopped(claimed, reason, "Stop", self._codec, serializer)
                commit.rerun = definition.options.on_unread == "rerun"
                return commit
            case Next(step=target, state=state, delay=delay, inline=inline):
                inline = definition.options.inline if inline is None else inline
                limits = self._limits(claimed, value)
                if limits is not None:
                    inline = False  # its limits are for the picker to judge
                status = "scheduled" if delay > 0 else "executing" if inline else "runnable"
                return Commit(
                    claimed,
                    status,
                    kind="next",
                    step=self._step(definition, target),
                    state=self._state(definition, state),
                    delay=delay,
                    consumed=awaited,
                    limits=limits,
                )
            case Retry(state, delay=delay):
                return Commit(
                    claimed,
                    "scheduled" if delay > 0 else "runnable",
                    kind="retry",
                    state=self._state(definition, state),
                    attempt=claimed.attempt + 1,
                    delay=delay,
                )
            case Await(names, then, state, timeout, keep=keep):
                kept = [signal.id for signal in shown if keep or signal.name in names]
                return Commit(
                    claimed,
                    "awaiting_signal",
                    kind="await",
                    step=self._step(definition, then),
                    state=self._state(definition, state),
                    awaits=tuple(names),
                    shown=kept,
                    consumed=[signal.id for signal in shown if not (keep or signal.name in names)],
                    timeout=timeout,
                )
            case ScheduleChildren(children, then, state):
                return Commit(
                    claimed,
                    "awaiting_children",
                    kind="children",
                    step=self._step(definition, then),
                    state=self._state(definition, state),
                    consumed=awaited,
                    children=self._children(children),
                )
        names = ", ".join(outcome.__name__ for outcome in OUTCOMES)
        raise OutcomeError(
            # Its type alone: the value may hold what must not be logged.
            f"step {claimed.step!r} of {definition.name} returned {'None' if value is None else type(value).__name__}; "
            f"a step returns one of {names}"
        )

    def _step(self, definition: MachineDefinition, target: Any) -> str:
        name = step_name(target)
        if name not in definition.steps:
            raise OutcomeError(_no_step(definition, name))
        return name

    def _state(self, definition: MachineDefinition, state: Any) -> Payload | None:
        if state is KEEP:
            return None
        return self._codec.encode(definition.state_type.dump(state), "state", definition.options.serializer)

    def _children(self, children: Iterable[Any]) -> list[NewInstance]:
        prepared = []
        for index, child in enumerate(children):
            target, options = child if isinstance(child, tuple) and len(child) == 2 else (child, {})
            try:
                prepared.append(self._app.prepare(target, dict(options)))
            except (DurableError, TypeError, ValueError) as error:
                raise OutcomeError(f"child {index}: {error}") from error
        if any(new.rate_limit is not None or new.concurrency_key is not None for new in prepared):
            self._ask(self._app.limit_rows.check_rows(prepared))
        return prepared

    def _limits(self, claimed: Claimed, outcome: Next) -> Limits | None:
        """What the next step is limited by, checked; None when that is no more than the key it had."""
        if outcome.concurrency_key is KEEP and outcome.rate_limit is None:
            return None
        key = claimed.concurrency_key if outcome.concurrency_key is KEEP else outcome.concurrency_key
        limits = Limits(key, cast("str | None", outcome.rate_limit), outcome.weight or 1)
        if limits == Limits(claimed.concurrency_key):
            return None
        if limits.rate_limit is not None:
            self._ask(self._app.limit_rows.check([(limits.rate_limit, limits.weight)]))
        return limits

    def _ask(self, operation: Operation[None]) -> None:
        """Run a look of ours at the database; that it can't be reached is no failure of the step."""
        try:
            self._app.run(operation)
        except DatabaseUnavailableError as error:
            raise StepAgain(f"its limits can't be looked up: {error}") from error


def _no_step(definition: MachineDefinition, name: str) -> str:
    return f"machine {definition.name} version {definition.version} has no step {name!r}{near(name, definition.steps)}"
