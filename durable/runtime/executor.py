"""One step: find the definition of a claimed row and have it run.

Touches the database only through `ctx.connection`. Nothing that user code raises comes out of `execute`: it ends that
attempt of that instance, wherever it was raised. Each step runs in a copy of the process's context variables, shared by
its hooks, the step itself and `handle`, so that no step sees a variable that another one has set.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol

from durable.app import Durable
from durable.instance import Claimed
from durable.machine import MachineDefinition
from durable.runtime import reporting, soft_limit
from durable.runtime.coroutines import CoroutineRunner, CurrentLoop
from durable.runtime.failures import failed, log_failure, name_of
from durable.runtime.machine_step import MachineRunner
from durable.runtime.step_transaction import Begin, StepAgain
from durable.runtime.task_step import TaskRunner
from durable.storage.claims import Commit

log = logging.getLogger("durable.step")


def time_limits(app: Durable) -> dict[tuple[str, int], float]:
    """Return the hard limits in seconds of the definitions that have one, their own or the app's."""
    limits = {key: definition.options.time_limit or app.conf.time_limit for key, definition in app.definitions.items()}
    return {key: limit for key, limit in limits.items() if limit is not None}


class Limits(Protocol):
    """How user code is run within its soft limit: by the module `soft_limit`, or `interrupts.ThreadLimits`."""

    def within(
        self, seconds: float | None, coroutines: CoroutineRunner, is_async: bool, call: Callable[[], Any], /
    ) -> Any: ...

    def beginning(self, begin: Begin, claimed: Claimed, is_async: bool, keep: Callable[[Any], None], /) -> None: ...


def is_async(app: Durable, claimed: Claimed) -> bool:
    """Whether the step of a claimed row is `async def`."""
    definition = app.definitions[claimed.machine, claimed.machine_version]
    if isinstance(definition, MachineDefinition):
        return claimed.step in definition.async_steps
    return definition.is_async


class Executor:
    """Runs steps of an app for one slot, or for the threads of one process.

    coroutines  runs `async def` user code
    begin       opens the transaction of a step that asks for `ctx.connection`; without it there is none
    limits      runs user code within its soft time limit
    """

    def __init__(
        self,
        app: Durable,
        coroutines: CoroutineRunner,
        begin: Begin | None = None,
        limits: Limits = soft_limit,
    ) -> None:
        self._definitions = app.definitions
        self._coroutines = coroutines
        self.time_limits = time_limits(app)
        """Seconds after which a step is killed, of the definitions that have such a limit."""
        undisturbed = begin and partial(limits.beginning, begin)
        self._variables = copy_context()
        self._current_loop = CurrentLoop()
        self.tasks = TaskRunner(app, coroutines, undisturbed, limits.within)
        self.machines = MachineRunner(app, coroutines, undisturbed, limits.within)

    def take_variables(self) -> None:
        """Have steps begin with the context variables as they are here and now."""
        self._variables = copy_context()

    def execute(self, claimed: Claimed) -> Commit:
        """Run the step of a claimed row and return its outcome.

        Raises StepAgain when the step did not happen, through no fault of its own, and is to be run again.
        """
        run = self._watched if reporting.are_steps_watched() else self._execute
        try:
            return self._variables.copy().run(run, claimed)
        finally:
            self._current_loop.mend()

    def _watched(self, claimed: Claimed) -> Commit:
        watched = reporting.WatchedStep(claimed)
        commit: Commit | None = None
        try:
            commit = self._execute(claimed)
        finally:
            watched.end(commit)
        return commit

    def _execute(self, claimed: Claimed) -> Commit:
        definition = self._definitions[claimed.machine, claimed.machine_version]
        try:
            if isinstance(definition, MachineDefinition):
                return self.machines.run(claimed, definition)
            return self.tasks.run(claimed, definition)
        except StepAgain:
            raise
        except BaseException as error:
            return self.contained(claimed, error)

    def contained(self, claimed: Claimed, error: BaseException) -> Commit:
        """The last guard: return the outcome of a step around which something raised that nothing else has caught."""
        definition = self._definitions[claimed.machine, claimed.machine_version]
        try:
            if not isinstance(definition, MachineDefinition):
                return self.tasks.ended_by(claimed, definition, error)[0]
            log_failure(log, claimed, error)
        except StepAgain:
            raise
        except BaseException as problem:
            sys.stderr.write(f"durable: instance {claimed.id} fails, its failure can't be logged: {name_of(problem)}\n")
        return failed(claimed, error)

    def close(self) -> None:
        """End the event loop of `async def` steps."""
        self._coroutines.close()
