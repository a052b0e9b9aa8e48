"""Every error of the package.

All of them derive from `DurableError` and say what was wrong, with which value, and what to do about it. Control flow
(`Cancel`, what `ctx.retry` raises, `SoftTimeLimitExceeded`) lives in `durable.outcomes` and deliberately does not
derive from it, so that `except DurableError` in user code cannot eat it.
"""

from __future__ import annotations

__all__ = [
    "CallTimeoutError",
    "ConfigError",
    "ConnectionUsageError",
    "CorruptRowError",
    "DatabaseUnavailableError",
    "DefinitionError",
    "DrainError",
    "DuplicateError",
    "DurableError",
    "EmbeddedServerError",
    "GroupFailed",
    "NoTargetError",
    "NotFoundError",
    "OutcomeError",
    "PayloadError",
    "PayloadSignatureError",
    "PayloadTooLargeError",
    "ResultTimeout",
    "SchemaError",
    "TaskCancelled",
    "TaskFailed",
    "UnknownTaskError",
    "ValidationError",
    "WorkerLost",
]


class DurableError(Exception):
    """Root of every error that `durable` raises."""


class ConfigError(DurableError, ValueError):
    """A setting, a DSN or an environment variable is wrong: names it, its value and what is allowed."""


class EmbeddedServerError(DurableError):
    """The embedded Postgres can't be found, started, joined or stopped."""


class DatabaseUnavailableError(DurableError):
    """Postgres can't be reached, refused us, or went away during the call."""


class CallTimeoutError(DatabaseUnavailableError, TimeoutError):
    """Postgres did not answer within the call's `timeout` or the setting `call_timeout`: what it wrote is unknown."""


class SchemaError(DurableError):
    """The schema is missing, older or newer than this code: says which, and that `durable migrate` mends it."""


class DefinitionError(DurableError):
    """A task is defined wrongly: a name used twice, a lambda, a bad option."""


class DrainError(DurableError):
    """A drain of `durable.testing` did not come to rest within `max_steps`.

    tally  what it did until then
    """

    def __init__(self, message: str, tally: dict[str, int]) -> None:
        super().__init__(message)
        self.tally = tally


class UnknownTaskError(DurableError, LookupError):
    """No task of that name (and version) is registered with this app: names near ones."""


class ValidationError(DurableError, ValueError):
    """A value given to a producer call is refused; nothing was written."""


class PayloadError(ValidationError):
    """A payload can't be serialised or deserialised: names the path inside it and what it holds there."""


class PayloadTooLargeError(PayloadError):
    """A payload is larger than `max_payload_bytes`."""


class OutcomeError(DurableError):
    """What a step returned can't be committed; treated as an error of that step."""


class CorruptRowError(DurableError):
    """A row in the database can't be read: edited by hand, or written by a serializer this app does not accept."""


class PayloadSignatureError(CorruptRowError):
    """A payload was not written by anybody with a key of this app: unsigned, changed, or of a key it does not hold."""


class ConnectionUsageError(DurableError):
    """A `connection=` of the caller can't be used: closed, in a failed transaction, or of the wrong kind."""


class NotFoundError(DurableError, LookupError):
    """No instance has that id (any more)."""


class NoTargetError(DurableError, LookupError):
    """A signal was sent to nothing live: an unknown or finished id, or a correlation key nobody occupies."""


class DuplicateError(DurableError):
    """The correlation key is occupied.

    existing_id     id of the instance that occupies it; None if it went away before it could be read
    correlation_key the key
    """

    def __init__(self, correlation_key: str, existing_id: int | None) -> None:
        super().__init__(
            f"correlation key {correlation_key!r} is occupied by instance {existing_id}; "
            "wait for it, use another key, or pass correlation_scope=() to allow several"
        )
        self.correlation_key = correlation_key
        self.existing_id = existing_id


class ResultTimeout(DurableError, TimeoutError):
    """`get(timeout=...)` ran out of time; the instance goes on, and asking again is the retry."""


class TaskFailed(DurableError):
    """The instance ended `failed`.

    id              of the instance
    error_type      name of the original exception's type; the class itself is never loaded from data
    message         of the original exception
    traceback_text  formatted where it was raised; "" when there was none
    """

    def __init__(self, instance_id: int, error_type: str, message: str, traceback_text: str = "") -> None:
        super().__init__(f"instance {instance_id} failed: {error_type}: {message}")
        self.id = instance_id
        self.error_type = error_type
        self.message = message
        self.traceback_text = traceback_text


class GroupFailed(DurableError):
    """Parts of a group, or of a chord's header, failed; its name is the `error_type` of such a failure."""


class TaskCancelled(TaskFailed):
    """The instance ended `cancelled`, or expired before it started."""


class WorkerLost(DurableError):
    """The step killed its worker process `max_crashes` times; its name is the `error_type` of such a failure."""
