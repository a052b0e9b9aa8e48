"""Steps that are `async def`, on the loop of a process with many slots.

What a step is and what becomes of it is said by the runners (task_step.py, machine_step.py); here is what of it must
await. The loop itself never waits: hooks, `handle` and the end of a step's transaction have threads of their own.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from durable import forks
from durable.app import Durable
from durable.around import around
from durable.context import Context, Transaction, entered
from durable.errors import CorruptRowError
from durable.instance import Claimed
from durable.machine import MachineDefinition
from durable.outcomes import Next, ScheduleChildren
from durable.runtime import reporting, soft_limit
from durable.runtime.async_connections import Aside, AsyncConnections
from durable.runtime.coroutines import contained, outlast
from durable.runtime.executor import Executor
from durable.runtime.failures import failed, log_failure
from durable.runtime.soft_limit import awithin
from durable.runtime.step_transaction import StepAgain, StepTransaction
from durable.runtime.task_step import arguments
from durable.storage.claims import Commit
from durable.task import Task
from durable.task_hooks import begun, ended, observed

log = logging.getLogger("durable.step")


class Execution:
    """One execution of a step.

    variables    its context variables: of the task that serves it, of hooks, of the step and of `handle`
    transaction  what it has begun, or was given before it begins
    uses         whether it has asked for its connection
    task         runs its user code at the moment, and may be cancelled
    """

    def __init__(
        self, claimed: Claimed, variables: contextvars.Context, transaction: StepTransaction | None = None
    ) -> None:
        self.claimed = claimed
        self.variables = variables
        self.transaction = transaction
        self.uses = False
        self.task: asyncio.Task[Any] | None = None


class aentered:
    """`entered` for a coroutine: what must wait is done by `aside`."""

    __slots__ = ("_aside", "_context", "_entered")

    def __init__(self, context: Context[Any], aside: Aside) -> None:
        self._context = context
        self._aside = aside
        self._entered = entered(context)

    async def __aenter__(self) -> None:
        self._entered.__enter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        context = self._context
        context.end_connection()
        try:
            if error is not None and context.transaction is not None:
                await self._aside(context.transaction.abandon, error)
        finally:
            self._entered.__exit__(None, None, None)


class AsyncExecutor:
    """Runs `async def` steps. Needs the runners for what it shares with them.

    aside  awaits a function that is run in a thread
    """

    def __init__(self, app: Durable, executor: Executor, connections: AsyncConnections, aside: Aside) -> None:
        self._app = app
        self._contained = executor.contained
        self._tasks = executor.tasks
        self._machines = executor.machines
        self._connections = connections
        self._aside = aside
        self._managers = app.step_managers

    async def execute(self, execution: Execution) -> Commit:
        """Run the step of a claimed row and return its outcome. Raises StepAgain, as `Executor.execute`."""
        watched = reporting.WatchedStep(execution.claimed) if reporting.are_steps_watched() else None
        commit: Commit | None = None
        try:
            commit = await self._execute(execution)
        finally:
            await self.discard(execution)
            if watched is not None:
                watched.end(commit)
        return commit

    async def _execute(self, execution: Execution) -> Commit:
        claimed = execution.claimed
        definition = self._app.definitions[claimed.machine, claimed.machine_version]
        try:
            if isinstance(definition, MachineDefinition):
                return await self._machine(execution, definition)
            return await self._task(execution, definition)
        except StepAgain:
            raise
        except BaseException as error:
            return self._contained(claimed, error)

    async def _task(self, execution: Execution, task: Task[..., Any]) -> Commit:
        claimed, app = execution.claimed, self._app
        try:
            state = app.codec.decode(claimed.state_type, claimed.state, f"state of instance {claimed.id}")
            args, kwargs = arguments(state, f"state of instance {claimed.id}")
        except CorruptRowError as error:
            return failed(claimed, error)
        if app.conf.log_payloads:
            reporting.arguments(claimed, state)
        context: Context[Any] = Context(claimed, app, log, None, self._begin(execution), True)
        hooked = observed(task)
        if hooked:
            await self._aside(begun, task, context, args, kwargs)
        value: Any = None
        problem: BaseException | None = None
        try:
            async with aentered(context, self._connections.aside):
                call: Callable[[], Any] = partial(
                    task.function, *([context, *args] if task.options.bind else args), **kwargs
                )
                seconds = task.options.soft_time_limit or app.conf.soft_time_limit
                if self._managers:
                    call = around(self._managers, context, True, call)
                value = await self._user(execution, seconds, call)
                commit = await self._committed(context, self._tasks.outcome(claimed, task, value))
        except StepAgain:
            raise
        except BaseException as error:
            commit, value, problem = self._tasks.ended_by(claimed, task, error)
        if hooked:
            await self._aside(ended, task, context, args, kwargs, commit.status, value, problem)
        return commit

    async def _machine(self, execution: Execution, definition: MachineDefinition) -> Commit:
        claimed, app = execution.claimed, self._app
        try:
            step, data, state = self._machines.loaded(claimed, definition)
            machine = forks.contained(definition.cls)
        except BaseException as error:  # without a state or an object there is no `handle` to ask
            log_failure(log, claimed, error)
            return failed(claimed, error)
        if app.conf.log_payloads:
            reporting.arguments(claimed, data)
        context: Context[Any] = Context(claimed, app, log, state, self._begin(execution), True)
        error_seen: BaseException
        try:
            async with aentered(context, self._connections.aside):
                seconds = definition.options.soft_time_limit or app.conf.soft_time_limit
                call: Callable[[], Any] = partial(step, machine, context)
                if self._managers:
                    call = self._machines.inside(context, True, call)
                value = await self._user(execution, seconds, call)
                outcome = partial(self._machines.outcome, claimed, definition, context, value)
                # Limits of a next step or of children are looked up in the database.
                looks_up = isinstance(value, Next | ScheduleChildren)
                return await self._committed(context, await self._aside(outcome) if looks_up else outcome())
        except StepAgain:
            raise
        except BaseException as error:
            error_seen = error
        # In a thread, since `handle` may be a plain function; if it is not, the runner gives it to the loop.
        ended_by = self._machines.ended_by
        commit: Commit = await self._aside(ended_by, claimed, definition, context, machine, error_seen)
        return commit

    async def discard(self, execution: Execution | None) -> None:
        """Give back the connection of an execution that has ended, or does not take place."""
        if execution is None or execution.transaction is None:
            return
        if not execution.uses:
            await self._connections.aside(self._unused, execution.transaction)
        self._connections.release()

    @staticmethod
    def _unused(transaction: StepTransaction) -> None:
        with suppress(StepAgain):
            transaction.abandon(StepAgain("the step did not ask for it"))

    async def _user(
        self, execution: Execution, seconds: float | None, call: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Any:
        """Run user code in a task of its own, so that nothing of it reaches the task that serves the step."""
        within = call if seconds is None else lambda: awithin(call(), seconds)
        execution.task = asyncio.Task(contained(within), loop=asyncio.get_running_loop(), context=execution.variables)
        try:
            value, error = await execution.task
        except asyncio.CancelledError:  # by a step that cancels every task of the loop: the user's has its own
            value, error = await outlast(execution.task)
        finally:
            execution.task = None
            soft_limit.take_back()
        if error is not None:
            raise error
        return value

    async def _committed(self, context: Context[Any], commit: Commit) -> Commit:
        if context.transaction is None:
            return context.commit(commit)
        committed: Commit = await self._connections.aside(context.commit, commit)
        return committed

    def _begin(self, execution: Execution) -> Callable[[Claimed, bool, Callable[[Transaction], None]], None]:
        def begin(claimed: Claimed, _is_async: bool, keep: Callable[[Transaction], None]) -> None:
            if execution.transaction is None:
                execution.transaction = self._connections.begin_now(claimed)
            execution.uses = True
            keep(execution.transaction)

        return begin
