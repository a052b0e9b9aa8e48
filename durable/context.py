"""What a step is told about itself: the first argument of a task with `bind=True`."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Generic, NoReturn, Protocol

from durable import validation
from durable.children import Child, Children, acollect
from durable.errors import ConnectionUsageError, DatabaseUnavailableError, ValidationError
from durable.instance import Claimed, StoredSignal
from durable.outcomes import RetryRequested, StepAgain
from durable.storage import instances
from durable.storage.claims import Commit
from durable.storage.session import Row

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar

_current: ContextVar[Context[Any] | None] = ContextVar("durable_context", default=None)


class _StepLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds instance, task, step, attempt and queue to every record, never a payload."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


S = TypeVar("S", default=Any)

CANCEL_LOOK = 0.1
"""Seconds for which an answer to `cancel_requested` holds."""
CANCEL_LOOK_AWAY = 1.0
"""Seconds after which a database that was away is asked again."""


log = logging.getLogger("durable")
_warned: set[str] = set()


def blocks_loop(name: str, twin: str) -> None:
    """Warn, once per process and name, that a call that asks the database is made on a running event loop."""
    if asyncio._get_running_loop() is not None and name not in _warned:
        _warned.add(name)
        log.warning(
            "%s was called on a running event loop, which stands still until the database answers; use `await %s`",
            name,
            twin,
        )


@dataclass(frozen=True, slots=True)
class Signal:
    """A message in an instance's inbox. `created_at` is the database's time of delivery."""

    id: int
    name: str
    payload: Any
    created_at: datetime


def signals_of(stored: Iterable[StoredSignal], decode: Callable[[str, bytes, str], Any]) -> list[Signal]:
    """Return signals with their payloads decoded. Raises CorruptRowError for a payload that is not accepted."""
    return [
        Signal(
            signal.id,
            signal.name,
            None if signal.payload_type is None else decode(signal.payload_type, signal.payload or b"", signal.name),
            signal.created_at,
        )
        for signal in stored
    ]


@dataclass(frozen=True, slots=True)
class Request:
    """What Celery's `self.request` has, as far as it means the same. `retries`: failed attempts before this one."""

    id: int
    task: str
    retries: int
    parent_id: int | None
    queue: str


class Context(Generic[S]):
    """One execution of a step.

    state            the machine's state, as its State type; a plain dict without one

    id               of the instance
    step             name of the step ("run" for a task)
    attempt          failed attempts of this step before this one, from 0
    queue, priority  where the instance waited
    correlation_key  its business identity, or None
    version          generation of the task
    parent_id        of the instance that scheduled it as a child, or None
    app              the Durable app that runs it
    log              logger whose records carry instance, step and attempt
    """

    def __init__(
        self,
        claimed: Claimed,
        app: Any,
        log: logging.Logger,
        state: Any = None,
        begin: Begin | None = None,
        is_async: bool = False,
    ) -> None:
        self._claimed = claimed
        self._begin = begin
        self._is_async = is_async
        self._opening = threading.Lock()
        self.transaction: Transaction | None = None
        """What `connection` has begun, until the step ends."""
        self._cancel_requested = False
        self._cancel_look_at = 0.0
        self.state: S = state
        self.app = app
        self._log = log

    @cached_property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        claimed = self._claimed
        return _StepLogger(
            self._log,
            {
                "instance": claimed.id,
                "task": claimed.machine,
                "step": claimed.step,
                "attempt": claimed.attempt,
                "queue": claimed.queue,
            },
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

    @property
    def parent_id(self) -> int | None:
        return self._claimed.parent_id

    @cached_property
    def all(self) -> list[Signal]:
        """The whole inbox, oldest first. Raises CorruptRowError for a payload this app does not accept."""
        return signals_of(self._claimed.signals, self.app.codec.decode)

    @cached_property
    def awaited(self) -> list[Signal]:
        """The unconsumed signals whose names were awaited, oldest first; empty after a timeout."""
        names = self._claimed.awaits
        return [signal for signal in self.all if signal.name in names] if names else []

    @property
    def children(self) -> Children:
        """The children of the latest round, however they ended. In `async def` steps use `achildren`."""
        return self._children(self._claimed.children_round, "children")

    @property
    def children_all(self) -> Children:
        """The children of every round that are not yet collected. In `async def` steps use `achildren_all`."""
        return self._children(None, "children_all")

    async def achildren(self) -> list[Child]:
        """`children` for coroutines: all of them, by id."""
        return await self._achildren(self._claimed.children_round)

    async def achildren_all(self) -> list[Child]:
        """`children_all` for coroutines: all of them, by id."""
        return await self._achildren(None)

    def _children(self, children_round: int | None, name: str) -> Children:
        return Children(
            lambda after, limit: self._read_children(children_round, name, after, limit), self.app.codec.decode
        )

    async def _achildren(self, children_round: int | None) -> list[Child]:
        try:
            return await acollect(
                lambda after, limit: self.app.aread_children(self.id, children_round, after, limit),
                self.app.codec.decode,
            )
        except DatabaseUnavailableError as error:
            raise StepAgain(f"its children can't be read: {error}") from error

    def _read_children(self, children_round: int | None, name: str, after: int, limit: int) -> list[Row]:
        blocks_loop(f"ctx.{name}", f"ctx.a{name}()")
        try:
            return self.app.read_children(self.id, children_round, after, limit)  # type: ignore[no-any-return]
        except DatabaseUnavailableError as error:
            # The package's own look, not the user's code: no attempt of the step is to be lost for it.
            raise StepAgain(f"its children can't be read: {error}") from error

    @property
    def connection(self) -> Any:
        """A psycopg Connection (in `async def` steps an AsyncConnection) that commits together with the outcome.

        Opened when first asked for; waits until one of the process's `step_connections` is free. What ends its
        transaction early raises ConnectionUsageError; so does asking for it after the step, in `handle` too.
        """
        with self._opening:  # threads of the step share one
            if self.transaction is None:
                if self._begin is None:
                    raise ConnectionUsageError(
                        "ctx.connection is there while the step runs: not in handle(), whose outcome commits alone"
                    )
                self._begin(self._claimed, self._is_async, self._began)
            assert self.transaction is not None, "it has begun"
            return self.transaction.connection

    def _began(self, transaction: Transaction) -> None:
        self.transaction = transaction

    def commit(self, commit: Commit) -> Commit:
        """The runtime's: return the step's outcome, committed already if the step asked for its connection."""
        self.end_connection()
        return commit if self.transaction is None else self.transaction.commit(commit)

    def end_connection(self) -> None:
        """The runtime's: the step has returned: a thread that it left behind opens nothing any more."""
        with self._opening:
            self._begin = None

    def _end(self) -> None:
        self.transaction = self._begin = None

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody has asked this instance to end, or the claim is lost: the outcome will not count.

        For long steps to look at now and then, and leave. A query on this process's producer connection, at most every
        0.1 s; the answer holds in between, and a yes for ever. False, with a warning in the log, while the database
        can't be reached. In `async def` steps use `acancel_requested`, for which the event loop does not wait.
        """
        if self._looks_for_cancel():
            blocks_loop("ctx.cancel_requested", "ctx.acancel_requested()")
            try:
                self._cancel_requested = self.app.run(instances.cancel_asked(self.id, self._claimed.token))
            except DatabaseUnavailableError as error:
                self._no_cancel_look(error)
        return self._cancel_requested

    async def acancel_requested(self) -> bool:
        """`cancel_requested` for coroutines."""
        if self._looks_for_cancel():
            try:
                self._cancel_requested = await self.app.arun(instances.cancel_asked(self.id, self._claimed.token))
            except DatabaseUnavailableError as error:
                self._no_cancel_look(error)
        return self._cancel_requested

    def _looks_for_cancel(self) -> bool:
        """Whether it is time to ask again; then the next time is set."""
        now = time.monotonic()
        if self._cancel_requested or now < self._cancel_look_at:
            return False
        self._cancel_look_at = now + CANCEL_LOOK
        return True

    def _no_cancel_look(self, error: DatabaseUnavailableError) -> None:
        self._cancel_look_at = time.monotonic() + CANCEL_LOOK_AWAY
        self.log.warning("whether it is cancelled can't be asked: %s", error)

    def never_cancelled(self) -> None:
        """The runner's: nobody can ask this one to end, so that the database is not asked whether somebody did."""
        self._cancel_look_at = float("inf")

    def retry(
        self,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        exc: BaseException | None = None,
        max_retries: int | None = None,
    ) -> NoReturn:
        """Leave the step for another attempt. It raises by itself; `raise ctx.retry(...)` shows readers that it does.

        countdown, eta  seconds to wait, or an aware datetime to wait for; neither: the task's backoff
        exc             recorded as the cause, and as the failure when no attempts are left
        max_retries     attempts after the first, instead of the task's limit
        Raises ValidationError for what is no number of seconds or attempts.
        """
        if countdown is not None and eta is not None:
            raise ValidationError("give countdown or eta, not both")
        if eta is not None:
            countdown = max(0.0, (validation.moment(eta, "eta") - datetime.now(UTC)).total_seconds())
        delay = None if countdown is None else validation.seconds(countdown, "countdown")
        limit = None
        if max_retries is not None:
            if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
                raise ValidationError(f"max_retries must be an integer from 0, got {validation.shown(max_retries)}")
            limit = max_retries + 1
        raise RetryRequested(delay, exc, limit)

    @property
    def task(self) -> Any:
        """The registered task or machine that runs, with the attributes of its base class."""
        return self.app.definitions[self._claimed.machine, self._claimed.machine_version]

    @property
    def name(self) -> str:
        """The task's or machine's name."""
        return self._claimed.machine

    @property
    def request(self) -> Request:
        """Celery's view of this run."""
        claimed = self._claimed
        return Request(claimed.id, claimed.machine, claimed.attempt, claimed.parent_id, claimed.queue)

    def __repr__(self) -> str:
        return f"<Context of {self._claimed.machine} instance {self.id}, attempt {self.attempt}>"


class Transaction(Protocol):
    """What the runtime gives a context for its `connection`."""

    connection: Any

    def commit(self, commit: Commit) -> Commit:
        """End it with the step's outcome; returns that, `flushed` if it is settled."""

    def abandon(self, error: BaseException) -> None:
        """Roll it back after the step raised."""


Begin = Callable[[Claimed, bool, Callable[[Transaction], None]], None]
"""Opens the transaction of a step and passes it on: its claim, whether it is `async def`, who keeps the transaction."""


def current() -> Context[Any] | None:
    """Return the context of the step that is running here, or None outside of one."""
    return _current.get()


class entered:
    """Make `context` the current one; an exception abandons what its step wrote on `connection`.

    A class, since a generator would cost a microsecond more per step.
    """

    __slots__ = ("_context", "_token")

    def __init__(self, context: Context[Any]) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._token = _current.set(self._context)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        context = self._context
        try:
            if error is not None:
                context.end_connection()
                if context.transaction is not None:
                    context.transaction.abandon(error)
        finally:
            context._end()
            _current.reset(self._token)
