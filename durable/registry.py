"""Registering functions as tasks and finding them again: the part of an app that workers look things up in.

Typed so that a decorated function keeps its signature: `delay` takes what the function takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

from durable import validation
from durable.context import Context
from durable.errors import DefinitionError, UnknownTaskError
from durable.retry import Backoff, RetryPolicy, default_backoff
from durable.task import ASubmit, AsyncTask, Encode, Submit, Task, TaskOptions, default_name

P = ParamSpec("P")
R = TypeVar("R")


class TaskArguments(TypedDict, total=False):
    """Options of `@app.task`."""

    name: str
    queue: str
    priority: int
    version: int
    max_attempts: int | None
    retry_for: type[BaseException] | Iterable[type[BaseException]]
    dont_retry_for: type[BaseException] | Iterable[type[BaseException]]
    backoff: Backoff
    serializer: str | None


class TaskDecorator(Protocol):
    """What `@app.task(...)` returns: it keeps the function's signature."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class BoundTaskDecorator(Protocol):
    """What `@app.task(bind=True, ...)` returns: the context is not among the task's arguments."""

    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], R], /) -> Task[P, R]: ...


class Registry:
    """Tasks by name and version. The three functions are what its tasks encode and submit with."""

    def __init__(self, encode: Encode, submit: Submit, asubmit: ASubmit) -> None:
        self.tasks: dict[tuple[str, int], Task[..., Any]] = {}
        self._task_functions = (encode, submit, asubmit)

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self, function: None = None, /, *, bind: Literal[True], **options: Unpack[TaskArguments]
    ) -> BoundTaskDecorator: ...
    @overload
    def task(
        self, function: None = None, /, *, bind: Literal[False] = False, **options: Unpack[TaskArguments]
    ) -> TaskDecorator: ...

    def task(self, function: Any = None, /, *, bind: bool = False, **options: Unpack[TaskArguments]) -> Any:
        """Register a function as a task: `@app.task` or `@app.task(queue="emails", max_attempts=10)`.

        bind            the function's first argument is the Context
        name            default `module.function`
        version         generation; instances finish on the one they started with
        max_attempts    executions before it fails; default the setting `max_attempts`
        retry_for, dont_retry_for  which exceptions get another attempt
        backoff         attempt number from 0 -> seconds to wait
        serializer      of its arguments and result, instead of the setting
        Raises DefinitionError, ValidationError for a wrong option or a name that is taken.
        """

        unknown = set(options) - TaskArguments.__annotations__.keys()
        if unknown:
            name = sorted(unknown)[0]
            raise DefinitionError(f"unknown task option {name!r}{validation.near(name, TaskArguments.__annotations__)}")

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            return self._register(function, bind, options)

        return register if function is None else register(function)

    def _register(self, function: Callable[..., Any], bind: bool, given: TaskArguments) -> Task[..., Any]:
        backoff = given.get("backoff", default_backoff)
        if not callable(backoff):
            raise DefinitionError(f"backoff must be a function of the attempt, got {validation.shown(backoff)}")
        retry = RetryPolicy(
            _types(given.get("retry_for", Exception), "retry_for"),
            _types(given.get("dont_retry_for", ()), "dont_retry_for"),
            backoff,
        )
        name = given.get("name")
        options = TaskOptions(
            name=default_name(function) if name is None else name,
            queue=given.get("queue", "default"),
            priority=given.get("priority", 0),
            version=given.get("version", 1),
            bind=bind,
            max_attempts=given.get("max_attempts"),
            retry=retry,
            serializer=given.get("serializer"),
        )
        kind = AsyncTask if inspect.iscoroutinefunction(function) else Task
        task: Task[..., Any] = kind(function, options, *self._task_functions)
        taken = self.tasks.get((options.name, options.version))
        if taken is not None and not _same_function(taken.function, function):
            raise DefinitionError(
                f"task {options.name!r} version {options.version} is defined twice: {_place(taken.function)} "
                f"and {_place(function)}; rename one or raise its version"
            )
        self.tasks[options.name, options.version] = task
        return task

    def find_task(self, name: str, version: int | None = None) -> Task[..., Any]:
        """Return a registered task, the newest version unless told. Raises UnknownTaskError naming near ones."""
        versions = [v for n, v in self.tasks if n == name]
        if not versions or (version is not None and version not in versions):
            what = f"task {name!r}" if version is None else f"task {name!r} version {version}"
            raise UnknownTaskError(f"no {what} is registered{validation.near(name, {n for n, _ in self.tasks})}")
        return self.tasks[name, max(versions) if version is None else version]


def _types(value: Any, what: str) -> tuple[type[BaseException], ...]:
    if not isinstance(value, type | Iterable):
        raise DefinitionError(f"{what} must be exception classes, got {validation.shown(value)}")
    types = (value,) if isinstance(value, type) else tuple(value)
    for entry in types:
        if not isinstance(entry, type) or not issubclass(entry, BaseException):
            raise DefinitionError(f"{what} holds {validation.shown(entry)}, which is no exception class")
    return types


def _place(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _same_function(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether a module was merely imported again (reloaded, or once as `__main__`)."""
    return _place(one) == _place(other)
