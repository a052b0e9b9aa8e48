"""durable: tasks and state machines that survive, on nothing but Postgres."""

from durable import telemetry
from durable._version import __version__
from durable.app import Durable
from durable.context import Child, Context, Signal
from durable.errors import DuplicateError, DurableError, NoTargetError, ResultTimeout, TaskCancelled, TaskFailed
from durable.machine import Machine, step
from durable.outcomes import Await, Cancel, Done, Next, Retry, ScheduleChildren, SoftTimeLimitExceeded, Stop
from durable.result import AsyncResult
from durable.schedules import crontab, every
from durable.signatures import Signature, chain, chord, group, signature
from durable.task import Task

__all__ = [
    "AsyncResult",
    "Await",
    "Cancel",
    "Child",
    "Context",
    "Done",
    "DuplicateError",
    "Durable",
    "DurableError",
    "Machine",
    "Next",
    "NoTargetError",
    "ResultTimeout",
    "Retry",
    "ScheduleChildren",
    "Signal",
    "Signature",
    "SoftTimeLimitExceeded",
    "Stop",
    "Task",
    "TaskCancelled",
    "TaskFailed",
    "__version__",
    "chain",
    "chord",
    "crontab",
    "every",
    "group",
    "signature",
    "step",
    "telemetry",
]
