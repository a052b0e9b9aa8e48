"""durable: tasks and state machines that survive, on nothing but Postgres."""

from durable import telemetry
from durable._version import __version__
from durable.app import Durable
from durable.children import Child
from durable.context import Context, Signal
from durable.errors import DuplicateError, DurableError, NoTargetError, ResultTimeout, TaskCancelled, TaskFailed
from durable.limits import ConcurrencyLimit, RateLimit
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
    "ConcurrencyLimit",
    "Context",
    "Done",
    "DuplicateError",
    "Durable",
    "DurableError",
    "Machine",
    "Next",
    "NoTargetError",
    "RateLimit",
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
