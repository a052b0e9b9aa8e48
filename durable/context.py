"""What a step is told about itself: the first argument of a task with `bind=True`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from durable import validation
from durable.instance import Claimed
from durable.outcomes import RetryRequested

_current: ContextVar[Context | None] = ContextVar("durable_context", default=None)


class _StepLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds instance, step and attempt to every record, never a payload."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


class Context:
    """One execution of a step.

    id               of the instance
    step             name of the step ("run" for a task)
    attempt          failed attempts of this step before this one, from 0
    queue, priority  where the instance waited
    correlation_key  its business identity, or None
    version          generation of the task
    app              the Durable app that runs it
    log              logger whose records carry instance, step and attempt
    """

    def __init__(self, claimed: Claimed, app: Any, log: logging.Logger) -> None:
        self._claimed = claimed
        self.app = app
        self.log = _StepLogger(
            log, {"instance": claimed.id, "step": claimed.step, "attempt": claimed.attempt, "task": claimed.machine}
        )

    @property
    def id(self) -> int:
        return self._claimed.id

    @property
    def step(self) -> str:
        return self._claimed.step

    @property
    def attempt(self) -> int:
        return self._claimed.attempt

    @property
    def queue(self) -> str:
        return self._claimed.queue

    @property
    def priority(self) -> int:
        return self._claimed.priority

    @property
    def correlation_key(self) -> str | None:
        return self._claimed.correlation_key

    @property
    def version(self) -> int:
        return self._claimed.machine_version

    def retry(self, *, countdown: float | None = None, exc: BaseException | None = None) -> RetryRequested:
        """Return what to raise for another attempt: `raise ctx.retry(countdown=10)`.

        countdown  seconds to wait; None: the task's backoff
        exc        recorded as the cause, and as the failure when no attempts are left
        Raises ValidationError for a countdown that is no number of seconds.
        """
        return RetryRequested(None if countdown is None else validation.seconds(countdown, "countdown"), exc)

    def __repr__(self) -> str:
        return f"<Context of {self._claimed.machine} instance {self.id}, attempt {self.attempt}>"


def current() -> Context | None:
    """Return the context of the step that is running here, or None outside of one."""
    return _current.get()


@contextmanager
def entered(context: Context) -> Iterator[None]:
    """Make `context` the current one."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
