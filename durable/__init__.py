"""durable: tasks and state machines that survive, on nothing but Postgres."""

from durable._version import __version__
from durable.app import Durable
from durable.context import Context
from durable.errors import DuplicateError, DurableError, ResultTimeout, TaskCancelled, TaskFailed
from durable.outcomes import Cancel, Done, Retry, Stop
from durable.result import AsyncResult
from durable.task import Task

__all__ = [
    "AsyncResult",
    "Cancel",
    "Context",
    "Done",
    "DuplicateError",
    "Durable",
    "DurableError",
    "ResultTimeout",
    "Retry",
    "Stop",
    "Task",
    "TaskCancelled",
    "TaskFailed",
    "__version__",
]
