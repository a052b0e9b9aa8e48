"""Machine: a durable finite-state machine as a class whose methods are steps.

    @app.machine(queue="checkout")
    class Checkout(Machine):
        @dataclass
        class State: order: int

        @step(initial=True)
        def start(self, ctx): return Await("paid", then=self.ship, timeout=3600)

        @step
        def ship(self, ctx): return Done({"order": ctx.state.order})

An instance is a row, not an object: each step gets a fresh object of the class, and what must last goes into the state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, overload

from durable import validation
from durable.errors import DefinitionError, ValidationError
from durable.insertion import OPTION_NAMES, InsertOptions, apply_options
from durable.instance import NewInstance, Payload
from durable.outcomes import Stop
from durable.result import AsyncResult
from durable.states import StateType

F = TypeVar("F", bound=Callable[..., Any])

Encode = Callable[[Any, str, str | None], Payload]


@overload
def step(function: F, /) -> F: ...
@overload
def step(*, initial: bool = False) -> Callable[[F], F]: ...


def step(function: Any = None, /, *, initial: bool = False) -> Any:
    """Mark a method as a step; `initial=True` marks the one instances start with. A single step needs no mark."""

    def mark(function: F) -> F:
        if not callable(function):
            raise DefinitionError(f"@step marks a method, got {validation.shown(function)}")
        function.__durable_step__ = function.__name__  # type: ignore[attr-defined]
        function.__durable_initial__ = initial  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What the decorator was given."""

    name: str
    queue: str = "default"
    priority: int = 0
    version: int = 1
    inline: bool = False
    serializer: str | None = None
    soft_time_limit: float | None = None
    time_limit: float | None = None
    on_unread: str = "keep"

    def __post_init__(self) -> None:
        validation.text(self.name, "a machine's name")
        if self.on_unread not in ("keep", "rerun"):
            raise DefinitionError(
                f"machine {self.name!r}: on_unread must be 'keep' or 'rerun', got {validation.shown(self.on_unread)}"
            )
        validation.time_limits(self.soft_time_limit, self.time_limit, f"machine {self.name!r}")
        validation.queue(self.queue)
        validation.priority(self.priority)
        if isinstance(self.version, bool) or not isinstance(self.version, int) or not 1 <= self.version < 2**31:
            raise DefinitionError(f"machine {self.name!r}: version must be an integer from 1, got {self.version!r}")


class MachineDefinition:
    """A registered machine: its class, steps and state type."""

    def __init__(self, cls: type[Machine], options: MachineOptions, encode: Encode) -> None:
        self.cls = cls
        self.options = options
        self._encode = encode
        self.steps: dict[str, Any] = {
            name: function
            for name, function in inspect.getmembers(cls, callable)
            if getattr(function, "__durable_step__", None) == name
        }
        if not self.steps:
            raise DefinitionError(f"machine {options.name!r} has no step; mark a method with @step")
        self.async_steps = frozenset(name for name, own in self.steps.items() if inspect.iscoroutinefunction(own))
        initial = [name for name, function in self.steps.items() if function.__durable_initial__]
        if len(self.steps) == 1:
            initial = list(self.steps)
        if len(initial) != 1:
            raise DefinitionError(
                f"machine {options.name!r} needs exactly one @step(initial=True), it has {len(initial)}: {initial}"
            )
        self.initial = initial[0]
        self.state_type = StateType(getattr(cls, "State", None), options.name)

    @property
    def name(self) -> str:
        """The name by which workers find it."""
        return self.options.name

    @property
    def version(self) -> int:
        """Its generation; a worker runs only instances of exactly this one."""
        return self.options.version

    @property
    def queue(self) -> str:
        """The queue its instances go to, unless a call says otherwise."""
        return self.options.queue

    def new(
        self,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        state: Any = None,
        step: Any = None,
        **options: Any,
    ) -> NewInstance:
        """Return the checked row for an instance; its state is `state`, or built from the keyword arguments.

        Raises TypeError and ValidationError for a state that does not fit; writes nothing.
        """
        if args:
            raise TypeError(f"{self.name}: a machine's state is built from keyword arguments")
        if state is not None and kwargs:
            raise TypeError(f"{self.name}: give the state, or keyword arguments to build it from, not both")
        data = self.state_type.build(dict(kwargs or {})) if state is None else self.state_type.dump(state)
        if state is not None:
            self.state_type.load(data)  # an object may hold anything in its fields
        name = self.initial if step is None else getattr(step, "__durable_step__", step)
        if name not in self.steps:
            raise ValidationError(
                f"machine {self.name} version {self.version} has no step {validation.shown(name)}"
                f"{validation.near(str(name), self.steps)}"
            )
        new = NewInstance(
            machine=self.name,
            machine_version=self.version,
            step=name,
            state=self._encode(data, "state", self.options.serializer),
            queue=self.options.queue,
            priority=self.options.priority,
        )
        unknown = sorted(set(options) - OPTION_NAMES)
        if unknown:
            raise TypeError(
                f"{self.name}: there is no option {unknown[0]!r}{validation.near(unknown[0], OPTION_NAMES)}"
            )
        apply_options(new, InsertOptions(**options))
        return new

    def __repr__(self) -> str:
        return f"<machine {self.name} v{self.version} on queue {self.queue}, steps {', '.join(self.steps)}>"


class Machine:
    """Base of machines; see the module's head. `handle` turns an exception of a step into an outcome."""

    definition: ClassVar[MachineDefinition]
    _submit: ClassVar[Any]
    _asubmit: ClassVar[Any]

    def handle(self, error: BaseException, ctx: Any) -> Any:
        """Return the outcome for an exception of a step; the default ends the instance as failed."""
        return Stop(error)

    @classmethod
    def delay(cls, **state: Any) -> AsyncResult[Any]:
        """Start an instance; the keyword arguments build its State. Returns its result handle.

        Raises TypeError and ValidationError when they don't fit, DatabaseUnavailableError; nothing is written then.
        """
        new = definition_of(cls).new((), state)
        return cls._submit(new, None, True)  # type: ignore[no-any-return]

    @classmethod
    async def adelay(cls, **state: Any) -> AsyncResult[Any]:
        """`delay` for coroutines."""
        new = definition_of(cls).new((), state)
        return await cls._asubmit(new, None, True)  # type: ignore[no-any-return]


def definition_of(cls: type[Machine]) -> MachineDefinition:
    """Return what a class was registered as itself. Raises DefinitionError for one that was not, whatever its bases."""
    definition: MachineDefinition | None = cls.__dict__.get("definition")
    if definition is None:
        raise DefinitionError(f"{cls.__qualname__} is not registered: decorate it with @app.machine")
    return definition
