"""Task: a function as a one-step machine, with `.delay()` and its kin.

A Task knows no app. Whoever registers it gives it a `submit` and an `asubmit`, which insert what `new()` made.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Generic, Never, ParamSpec, Protocol, TypeVar

from durable import interruption, validation
from durable.errors import DefinitionError, ValidationError
from durable.insertion import OPTION_NAMES, InsertOptions, apply_options
from durable.instance import NewInstance, Payload
from durable.result import AsyncResult
from durable.retry import RetryPolicy
from durable.signatures import OPTIONS, Home, Signature, group, instead_of, signature

P = ParamSpec("P")
R = TypeVar("R")

STEP = "run"
"""The one step of a task."""
MAPS = ("durable.map", "durable.amap")
"""Names of the built-in tasks that call a function, or a coroutine function, with each of several items."""


class Submit(Protocol):
    """Inserts an instance now, or collects it in the running batch; `connection` is the caller's."""

    def __call__(
        self, new: NewInstance, connection: Any, notify_in_transaction: bool, timeout: float | None = None
    ) -> AsyncResult[Any]: ...


class ASubmit(Protocol):
    """`Submit` for coroutines."""

    def __call__(
        self, new: NewInstance, connection: Any, notify_in_transaction: bool, timeout: float | None = None
    ) -> Awaitable[AsyncResult[Any]]: ...


Encode = Callable[[Any, str, str | None], Payload]


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What the decorator was given. Times in seconds."""

    name: str
    queue: str = "default"
    priority: int = 0
    version: int = 1
    bind: bool = False
    max_attempts: int | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    serializer: str | None = None
    soft_time_limit: float | None = None
    time_limit: float | None = None
    ignore_result: bool = False

    def __post_init__(self) -> None:
        validation.text(self.name, "a task's name")
        validation.time_limits(self.soft_time_limit, self.time_limit, f"task {self.name!r}")
        validation.queue(self.queue)
        validation.priority(self.priority)
        if self.max_attempts is not None:
            validation.max_attempts(self.max_attempts)
        if isinstance(self.version, bool) or not isinstance(self.version, int) or not 1 <= self.version < 2**31:
            raise DefinitionError(f"task {self.name!r}: version must be an integer from 1, got {self.version!r}")


def default_name(function: Callable[..., Any]) -> str:
    """Return `module.function`; a script's `__main__` counts under its file name.

    Raises DefinitionError for a lambda or a nested function: a worker could not find it by that name.
    """
    qualified = getattr(function, "__qualname__", None)
    if qualified is None:
        raise DefinitionError(f"{validation.shown(function)} must be a function, or a callable with name=...")
    if "<" in qualified:
        raise DefinitionError(
            f"{qualified} in {function.__module__} is a lambda or a nested function, which has no name to be found by; "
            "define it at module level or give it name=..."
        )
    module = function.__module__
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        module = Path(file).stem if file else module
    return f"{module}.{qualified}"


HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")
"""Methods that a base class of tasks may define."""


class Task(Generic[P, R]):
    """A registered function. Calling it runs it here and now, like any function; `.delay()` enqueues an instance."""

    def __init__(
        self, function: Callable[..., Any], options: TaskOptions, encode: Encode, submit: Submit, asubmit: ASubmit
    ) -> None:
        if not callable(function):
            raise DefinitionError(f"a task must be a function, got {validation.shown(function)}")
        self.function = function
        self.options = options
        self.has_hooks = any(getattr(type(self), name) is not getattr(Task, name) for name in HOOKS)
        """Whether its base class has methods to be called around a step."""
        self.home: Home | None = None
        """The app that it is registered with."""
        self.is_async = inspect.iscoroutinefunction(function)
        self._encode = encode
        self._submit = submit
        self._asubmit = asubmit
        self._signature = _signature(function, options)
        self._plain_counts = _plain_counts(self._signature)
        self.__wrapped__ = function
        self.__name__ = getattr(function, "__name__", options.name)
        self.__qualname__ = getattr(function, "__qualname__", options.name)
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__

    @property
    def name(self) -> str:
        """The name by which workers find it."""
        return self.options.name

    @property
    def queue(self) -> str:
        """The queue its instances go to, unless a call says otherwise."""
        return self.options.queue

    @property
    def version(self) -> int:
        """Its generation; a worker runs only instances of exactly this one."""
        return self.options.version

    @interruption.transparent
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)  # type: ignore[no-any-return]

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Enqueue a run with these arguments and return its result handle.

        Raises TypeError when the arguments don't fit the function, PayloadError when they can't be serialised,
        DatabaseUnavailableError; nothing is written then.
        """
        return self._submit(self.new(args, kwargs), None, True)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """`delay` for coroutines."""
        return await self._asubmit(self.new(args, kwargs), None, True)

    def apply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | timedelta | datetime | None = None,
        priority: int | None = None,
        queue: str | None = None,
        correlation_key: str | None = None,
        correlation_scope: Sequence[str] | None = None,
        max_attempts: int | None = None,
        on_conflict: str = "raise",
        concurrency_key: str | None = None,
        rate_limit: str | tuple[str, str] | None = None,
        weight: int | None = None,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
        **unknown: Never,
    ) -> AsyncResult[R]:
        """Enqueue a run with options.

        countdown, eta      seconds from now, or an aware datetime, before which it does not start
        expires             seconds from now or an aware datetime after which it no longer starts: it ends `cancelled`
        priority            lower runs earlier
        correlation_key     business identity: at most one live instance has it
        correlation_scope   statuses in which the key counts as occupied besides the live ones; () never
        max_attempts        instead of the task's
        on_conflict         when the key is occupied: "raise" DuplicateError, or "return" the occupant's result
        concurrency_key     at most one instance of it executes at a time, or as many as the gate of its name lets
        rate_limit, weight  a limit's name or "name:partition", and how many of its tokens the run takes
        connection          of psycopg, SQLAlchemy (or its session) or Django: the instance exists if and only if its
                            transaction commits
        notify_in_transaction  whether a transaction without an after-commit hook wakes workers itself (a poll finds the
                            row otherwise)
        timeout             seconds that the call may take in all, connecting included; else the app's `call_timeout`
        Raises ValidationError and what `delay` raises; DuplicateError when the key is occupied.
        """
        new = self.new(
            args,
            kwargs or {},
            schedule_in=countdown,
            schedule_at=eta,
            expires=expires,
            priority=priority,
            queue=queue,
            correlation_key=correlation_key,
            correlation_scope=correlation_scope,
            max_attempts=max_attempts,
            on_conflict=on_conflict,
            concurrency_key=concurrency_key,
            rate_limit=rate_limit,
            weight=weight,
            **unknown,
        )
        return self._submit(new, connection, notify_in_transaction, timeout)

    async def aapply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        **options: Any,
    ) -> AsyncResult[R]:
        """`apply_async` for coroutines; `connection` is then psycopg's or SQLAlchemy's async one."""
        new = self.new(args, kwargs or {}, schedule_in=countdown, schedule_at=eta, **options)
        return await self._asubmit(new, connection, notify_in_transaction, timeout)

    # For base classes: called in the worker around a step, before its outcome is committed; their errors are logged

    def before_start(self, task_id: int, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Before the function is called."""

    def on_success(self, retval: Any, task_id: int, args: list[Any], kwargs: dict[str, Any]) -> None:
        """After it returned."""

    def on_failure(
        self, exc: BaseException | None, task_id: int, args: list[Any], kwargs: dict[str, Any], einfo: Any
    ) -> None:
        """After the last attempt failed; `einfo` has the traceback, None (as `exc`) for a returned `Stop`."""

    def on_retry(
        self, exc: BaseException | None, task_id: int, args: list[Any], kwargs: dict[str, Any], einfo: Any
    ) -> None:
        """After an attempt that is followed by another."""

    def after_return(
        self, status: str, retval: Any, task_id: int, args: list[Any], kwargs: dict[str, Any], einfo: Any
    ) -> None:
        """After all of these; `status` is SUCCESS, FAILURE or RETRY, `retval` the result or the exception."""

    # Signatures

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """Return this call as a signature; in a chain the result before it goes in front of these arguments."""
        return signature(self, args, kwargs, home=self.home)

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """Return this call as an immutable signature: in a chain it gets these arguments and no others."""
        return signature(self, args, kwargs, immutable=True, home=self.home)

    def signature(
        self,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        immutable: bool = False,
        **options: Any,
    ) -> Signature:
        """Return a call with options as a signature: `task.signature((2, 2), countdown=10)`."""
        return signature(self, args, kwargs, immutable=immutable, home=self.home, **options)

    def map(self, items: Iterable[Any]) -> Signature:
        """Return one run that calls the function with each item, one after another, and returns the list of results."""
        return self._mapped(list(items), False)

    def starmap(self, items: Iterable[Iterable[Any]]) -> Signature:
        """`map` for items that are argument lists."""
        return self._mapped([list(item) for item in items], True)

    def chunks(self, items: Iterable[Iterable[Any]], size: int) -> Signature:
        """Return a group of `starmap` runs of at most `size` items each; its result is a list of lists."""
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValidationError(f"chunks have at least one item, got a size of {validation.shown(size)}")
        given = list(items)
        return group([self.starmap(given[start : start + size]) for start in range(0, len(given), size)])

    def _mapped(self, items: list[Any], star: bool) -> Signature:
        own = self.options
        return signature(
            MAPS[self.is_async],
            (self.name, items, star),
            immutable=True,
            home=self.home,
            queue=own.queue,
            priority=own.priority,
            max_attempts=own.max_attempts,
        )

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError for arguments that don't fit the function."""
        if not kwargs and len(args) in self._plain_counts:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}(): {error}") from None

    def new(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> NewInstance:
        """Return the checked row for a run with these arguments and the options of an insert; writes nothing."""
        kwargs = kwargs or {}
        self.check_arguments(args, kwargs)
        state: dict[str, Any] = {}
        if args:
            state["args"] = list(args)
        if kwargs:
            state["kwargs"] = dict(kwargs)
        own = self.options
        new = NewInstance(
            machine=own.name,
            machine_version=own.version,
            step=STEP,
            state=self._encode(state, "arguments", own.serializer),
            queue=own.queue,
            priority=own.priority,
        )
        if options:
            for name in options:
                if name not in OPTION_NAMES:
                    hint = f"; here it is {OPTIONS[name]}" if name in OPTIONS else instead_of(name)
                    raise TypeError(f"{self.name}: there is no option {name!r}{hint}")
            apply_options(new, InsertOptions(**options))
        return new

    def __repr__(self) -> str:
        return f"<Task {self.name} v{self.version} on queue {self.queue}>"


class AsyncTask(Task[P, R]):
    """A task whose function is `async def`: calling it returns a coroutine; workers run it on an event loop."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # type: ignore[override]
        return self.function(*args, **kwargs)  # type: ignore[no-any-return]


def _signature(function: Callable[..., Any], options: TaskOptions) -> inspect.Signature:
    signature = inspect.signature(function)
    if not options.bind:
        return signature
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    ):
        raise DefinitionError(f"task {options.name!r} has bind=True, so its first parameter must take the context")
    if parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return signature
    return signature.replace(parameters=parameters[1:])


def _plain_counts(signature: inspect.Signature) -> range:
    """Return how many arguments may be given when all are given by position: a tenth of what binding them costs."""
    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    if any(own.kind is kinds.KEYWORD_ONLY and own.default is kinds.empty for own in parameters):
        return range(0)
    positional = [own for own in parameters if own.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    required = sum(own.default is kinds.empty for own in positional)
    rest = any(own.kind is kinds.VAR_POSITIONAL for own in parameters)
    return range(required, sys.maxsize if rest else len(positional) + 1)
