"""Registering functions as tasks and finding them again: the part of an app that workers look things up in.

Typed so that a decorated function keeps its signature: `delay` takes what the function takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, cast, overload

from durable import canvas, celery_options, validation
from durable.around import Surroundings
from durable.context import Context
from durable.errors import DefinitionError, UnknownTaskError
from durable.instance import NewInstance
from durable.machine import Machine, MachineDefinition, MachineOptions
from durable.periodic import PeriodicWork
from durable.result import AsyncResult
from durable.retry import Backoff, RetryPolicy, default_backoff
from durable.signatures import Signature, signature
from durable.task import ASubmit, AsyncTask, Encode, Submit, Task, TaskOptions, default_name

P = ParamSpec("P")
R = TypeVar("R")


class TaskArguments(TypedDict, total=False):
    """Options of `@app.task`; from `autoretry_for` on under their names in Celery."""

    name: str
    queue: str
    priority: int
    version: int
    max_attempts: int | None
    retry_for: type[BaseException] | Iterable[type[BaseException]]
    dont_retry_for: type[BaseException] | Iterable[type[BaseException]]
    backoff: Backoff
    serializer: str | None
    soft_time_limit: float | None
    time_limit: float | None
    ignore_result: bool
    base: type[Task[..., Any]]
    autoretry_for: type[BaseException] | Iterable[type[BaseException]]
    dont_autoretry_for: type[BaseException] | Iterable[type[BaseException]]
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    max_retries: int | None
    default_retry_delay: float
    acks_late: Literal[True]
    reject_on_worker_lost: Literal[True]
    track_started: Literal[True]


class MachineArguments(TypedDict, total=False):
    """Options of `@app.machine`."""

    name: str
    queue: str
    priority: int
    version: int
    inline: bool
    serializer: str | None
    soft_time_limit: float | None
    time_limit: float | None
    on_unread: Literal["keep", "rerun"]


Definition = canvas.Definition


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


class Registry(Surroundings, PeriodicWork):
    """Tasks by name and version. The three functions are what its tasks encode and submit with."""

    def __init__(self, encode: Encode, submit: Submit, asubmit: ASubmit) -> None:
        super().__init__()
        self.definitions: dict[tuple[str, int], Definition] = canvas.built_ins(encode, submit, asubmit)
        self._task_functions = (encode, submit, asubmit)

    @property
    def tasks(self) -> dict[tuple[str, int], Task[..., Any]]:
        """The registered tasks, by name and version; built-in ones left out."""
        return {key: task for key, task in self._registered() if isinstance(task, Task)}

    @property
    def machines(self) -> dict[tuple[str, int], MachineDefinition]:
        """The registered machines, by name and version; built-in ones left out."""
        return {key: machine for key, machine in self._registered() if isinstance(machine, MachineDefinition)}

    def _registered(self) -> list[tuple[tuple[str, int], Definition]]:
        return [(key, found) for key, found in self.definitions.items() if key[0] not in canvas.BUILT_IN]

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
        soft_time_limit, time_limit  seconds a step may run until SoftTimeLimitExceeded is raised in it, and until its
                        process is killed
        ignore_result   what it returns is not stored, unless a canvas or a machine waits for it
        base            a subclass of Task: its methods are called around a step, its attributes are options
        Celery's options of retrying are understood too: see docs/from-celery.md.
        Raises DefinitionError, ValidationError for a wrong option or a name that is taken.
        """

        unknown = set(options) - TaskArguments.__annotations__.keys()
        if unknown:
            name = sorted(unknown)[0]
            hint = celery_options.remedy(name) or validation.near(name, TaskArguments.__annotations__)
            raise DefinitionError(f"unknown task option {name!r}{hint}")

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            return self._register(function, bind, options)

        return register if function is None else register(function)

    def _register(self, function: Callable[..., Any], bind: bool, given: TaskArguments) -> Task[..., Any]:
        base = given.get("base", Task)
        if not isinstance(base, type) or not issubclass(base, Task):
            raise DefinitionError(f"base must be a subclass of durable.Task, got {validation.shown(base)}")
        attributes = celery_options.of_base(base, Task, TaskArguments.__annotations__)
        given = cast(TaskArguments, celery_options.in_our_terms({**attributes, **given}))
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
            soft_time_limit=given.get("soft_time_limit"),
            time_limit=given.get("time_limit"),
            ignore_result=given.get("ignore_result", False),
        )
        if inspect.iscoroutinefunction(function) and not issubclass(base, AsyncTask):
            base = (
                AsyncTask if base is Task else type(base.__name__, (base, AsyncTask), {"__module__": base.__module__})
            )
        task: Task[..., Any] = base(function, options, *self._task_functions)
        task.home = self
        self._add("task", task, _place(function))
        return task

    def _add(self, kind: str, definition: Definition, place: str) -> None:
        key = (definition.name, definition.version)
        taken = self.definitions.get(key)
        if taken is not None and _place_of(taken) != place:  # the same place: the module was merely imported again
            raise DefinitionError(
                f"{kind} {key[0]!r} version {key[1]} is defined twice: {_place_of(taken)} and {place}; "
                "rename one or raise its version"
            )
        self.definitions[key] = definition

    def machine(self, cls: Any = None, /, **options: Unpack[MachineArguments]) -> Any:
        """Register a Machine class: `@app.machine` or `@app.machine(queue="checkout", version=2)`.

        name        default `module.Class`
        version     generation; instances finish on the one they started with
        inline      whether a `Next` is run at once on the claim that is held
        serializer  of its states and results, instead of the setting
        soft_time_limit, time_limit  of each step, as of a task
        on_unread   what a signal means that arrives while the last step runs: "keep" it beside the finished instance as
                    unread, or "rerun" the step with it, instead of ending
        Returns the class. Raises DefinitionError, ValidationError for a wrong option or a name that is taken.
        """
        unknown = set(options) - MachineArguments.__annotations__.keys()
        if unknown:
            name = sorted(unknown)[0]
            known = MachineArguments.__annotations__
            raise DefinitionError(f"unknown machine option {name!r}{validation.near(name, known)}")

        def register(cls: type[Machine]) -> type[Machine]:
            if not isinstance(cls, type) or not issubclass(cls, Machine):
                raise DefinitionError(f"@app.machine takes a subclass of Machine, got {validation.shown(cls)}")
            given = dict(options)
            chosen = MachineOptions(name=given.pop("name", None) or default_name(cls), **given)  # type: ignore[arg-type]
            encode, cls._submit, cls._asubmit = self._task_functions
            cls.definition = MachineDefinition(cls, chosen, encode)
            self._add("machine", cls.definition, _place_of(cls.definition))
            return cls

        return register if cls is None else register(cls)

    def find_task(self, name: str, version: int | None = None) -> Definition:
        """Return a registered task or machine, the newest version unless told. Raises UnknownTaskError."""
        versions = [v for n, v in self.definitions if n == name]
        if not versions or (version is not None and version not in versions):
            what = f"task {name!r}" if version is None else f"task {name!r} version {version}"
            raise UnknownTaskError(f"no {what} is registered{validation.near(name, {n for n, _ in self.definitions})}")
        return self.definitions[name, max(versions) if version is None else version]

    def signature(
        self,
        target: Any,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        immutable: bool = False,
        **options: Any,
    ) -> Signature:
        """Return the signature of a task, of the task or machine of that name, or the one that a dict is.

        Raises ValidationError for a dict that is none, and for unknown options.
        """
        return signature(target, args, kwargs, immutable=immutable, home=self, **options)

    # What signatures need (signatures.Home)

    def row(self, signature: Signature, options: Mapping[str, Any]) -> NewInstance:
        """Return the checked row that runs a signature."""
        return canvas.row(self.find_task, signature, options)

    def start(
        self, signature: Signature, connection: Any, notify: bool, timeout: float | None = None
    ) -> AsyncResult[Any]:
        """Insert what runs a signature."""
        return self._task_functions[1](self.row(signature, {}), connection, notify, timeout)

    async def astart(
        self, signature: Signature, connection: Any, notify: bool, timeout: float | None = None
    ) -> AsyncResult[Any]:
        """`start` for coroutines."""
        return await self._task_functions[2](self.row(signature, {}), connection, notify, timeout)

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a task's function here and now."""
        task = self.find_task(name)
        if not isinstance(task, Task):
            raise DefinitionError(f"{name!r} is a machine, which can't be called; insert it")
        return task(*args, **kwargs)


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


def _place_of(definition: Definition) -> str:
    if isinstance(definition, Task):
        return _place(definition.function)
    # Steps may be inherited: their place alone does not tell two classes apart.
    return f"{_place(next(iter(definition.steps.values())))} ({definition.cls.__qualname__})"
