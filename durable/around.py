"""Code of the application that runs around its steps (`around_step`) and its worker processes (`on_process_start`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar

from durable import forks, interruption
from durable.context import Context
from durable.errors import DefinitionError
from durable.validation import shown

F = TypeVar("F", bound=Callable[..., Any])
Factory = Callable[[Context[Any]], Any]
"""Makes the context manager of one step, or None where the step needs none."""


class Surroundings:
    """The part of an app that registers code to run around steps and worker processes."""

    def __init__(self) -> None:
        super().__init__()
        self.step_managers: list[Factory] = []
        """The outermost first. Runners keep a reference to this list."""
        self.process_starts: list[Callable[[], Any]] = []
        self.process_stops: list[Callable[[], Any]] = []

    def around_step(self, factory: F, /) -> F:
        """Run every step of this app's tasks and machines inside a context manager: `@app.around_step`.

        A manager with `__enter__` is entered around plain and `async def` steps (on the event loop there: it must not
        block), one with only `__aenter__` around `async def` steps, one with both around each kind by its own methods.
        The first one registered is the outermost. A machine's `handle` runs inside managers of its own.
        What a manager raises is raised by the step. It sees the step's exception and may raise another, but can't
        swallow it: the value of `__exit__` is ignored.

        Args:
            factory: Takes the step's Context; a generator function that yields once (plain or `async`), or a callable
                that returns a context manager, or None for a step that needs none.

        Returns:
            The factory, unchanged.

        Raises:
            DefinitionError: It can't be called with one argument, or is an `async def` function that does not yield.
        """
        _check(factory, "around_step", 1)
        wrapped: Any = factory
        if inspect.isgeneratorfunction(factory):
            wrapped = contextmanager(factory)
        elif inspect.isasyncgenfunction(factory):
            wrapped = asynccontextmanager(factory)
        elif inspect.iscoroutinefunction(factory):
            raise DefinitionError(
                f"around_step takes an async function that yields once, got {shown(factory)}, which never yields"
            )
        self.step_managers.append(wrapped)
        return factory

    def on_process_start(self, function: F, /) -> F:
        """Call a function in each worker process, after its fork and before its first step: `@app.on_process_start`.

        The place to open connections, pools and clients that steps share; the supervisor opens none before it forks.
        It runs once per process in every pool, in the main thread. When it raises, the process ends without having
        claimed anything, and is replaced after a pause.

        Args:
            function: Takes no arguments.

        Raises:
            DefinitionError: It takes arguments, or is `async def`.
        """
        self.process_starts.append(_hook(function, "on_process_start"))
        return function

    def on_process_stop(self, function: F, /) -> F:
        """Call a function in each worker process when it has run its last step: `@app.on_process_stop`.

        It is not called in a process that is killed, or that leaves a step behind at the end of its drain time. What
        it raises is logged.

        Args:
            function: Takes no arguments.

        Raises:
            DefinitionError: It takes arguments, or is `async def`.
        """
        self.process_stops.append(_hook(function, "on_process_stop"))
        return function


def _hook(function: Any, what: str) -> Callable[[], Any]:
    _check(function, what, 0)
    if inspect.iscoroutinefunction(function):
        raise DefinitionError(f"{what} takes a plain function, got the async {shown(function)}: no loop runs there")
    return function  # type: ignore[no-any-return]


def _check(function: Any, what: str, count: int) -> None:
    arguments = "no argument" if count == 0 else "the Context"
    if not callable(function):
        raise DefinitionError(f"{what} takes a function of {arguments}, got {shown(function)}")
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        raise DefinitionError(f"{what} takes a function of {arguments}, got {shown(function)}") from None
    except ValueError:  # a built-in without a signature
        return


def around(
    factories: Sequence[Factory], context: Context[Any], is_async: bool, call: Callable[[], Any]
) -> Callable[[], Any]:
    """Return what calls a step inside its managers; of an `async def` step, what makes its coroutine."""
    return partial(_acalled if is_async else _called, factories, context, call)


@interruption.transparent
def _called(factories: Sequence[Factory], context: Context[Any], call: Callable[[], Any]) -> Any:
    with ExitStack() as stack:
        for factory in factories:
            manager = factory(context)
            if _has(manager, "__enter__"):
                stack.enter_context(_Passing(manager))
            else:
                _check_manager(manager, factory)
        try:
            value = call()
        except BaseException as error:
            if forks.strayed:  # no manager is left in a child that the step has forked
                forks.end(error)
            raise
        if forks.strayed:
            forks.end()
        return value


@interruption.transparent
async def _acalled(
    factories: Sequence[Factory], context: Context[Any], call: Callable[[], Coroutine[Any, Any, Any]]
) -> Any:
    async with AsyncExitStack() as stack:
        for factory in factories:
            manager = factory(context)
            if _has(manager, "__aenter__"):
                await stack.enter_async_context(_AsyncPassing(manager))
            elif _has(manager, "__enter__"):
                stack.enter_context(_Passing(manager))
            else:
                _check_manager(manager, factory)
        return await forks.acontained(call())


def _has(manager: Any, method: str) -> bool:
    return hasattr(type(manager), method)


def _check_manager(manager: Any, factory: Factory) -> None:
    if manager is not None and not _has(manager, "__aenter__"):
        raise DefinitionError(
            f"around_step {shown(factory)} returned {shown(manager)}; it must return a context manager, or None"
        )


class _Passing:
    """A manager that can't swallow what a step raises."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    @interruption.transparent
    def __enter__(self) -> Any:
        return self._manager.__enter__()

    @interruption.transparent
    def __exit__(self, *raised: Any) -> None:
        self._manager.__exit__(*raised)


class _AsyncPassing:
    """`_Passing` for an asynchronous manager."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    @interruption.transparent
    async def __aenter__(self) -> Any:
        return await self._manager.__aenter__()

    @interruption.transparent
    async def __aexit__(self, *raised: Any) -> None:
        await self._manager.__aexit__(*raised)
