"""One step: find the definition of a claimed row and have it run. Touches no database.

Nothing that user code does comes out of `execute` as an exception, but what ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from durable.instance import Claimed
from durable.machine import MachineDefinition
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.machine_step import MachineRunner
from durable.runtime.task_step import TaskRunner
from durable.serialization import Codec
from durable.storage.claims import Commit
from durable.task import Task

Definition = Task[..., Any] | MachineDefinition


class Executor:
    """Runs steps for one slot.

    app           handed to contexts
    definitions   (name, version) -> task or machine
    max_attempts  for tasks that set none
    """

    def __init__(
        self, app: Any, definitions: Mapping[tuple[str, int], Definition], codec: Codec, max_attempts: int
    ) -> None:
        self._definitions = definitions
        coroutines = CoroutineRunner()
        self._tasks = TaskRunner(app, codec, coroutines, max_attempts)
        self._machines = MachineRunner(app, codec, coroutines)

    def execute(self, claimed: Claimed) -> Commit:
        """Run the step of a claimed row and return its outcome."""
        definition = self._definitions[claimed.machine, claimed.machine_version]
        if isinstance(definition, MachineDefinition):
            return self._machines.run(claimed, definition)
        return self._tasks.run(claimed, definition)
