"""Wrong definitions fail where they are made, and say what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Context, Done, Durable, Machine, step
from durable.errors import DefinitionError, UnknownTaskError, ValidationError


@pytest.fixture
def app() -> Durable:
    """An app without a database: definitions need none."""
    return Durable("test", dsn="postgresql://127.0.0.1:1/nowhere")


class Right(Machine):
    @step(initial=True)
    def start(self, ctx: Context) -> Any:
        return Done()


def test_a_machine_is_named_after_its_module_and_class(app: Durable) -> None:
    assert app.machine(Right) is Right
    assert Right.definition.name == "tests.machines.test_definitions.Right"
    assert (Right.definition.version, Right.definition.queue, Right.definition.initial) == (1, "default", "start")
    assert app.find_task(Right.definition.name) is Right.definition


def test_a_machine_without_a_step_is_refused(app: Durable) -> None:
    class Empty(Machine):
        def start(self, ctx: Context) -> Any:
            return Done()

    with pytest.raises(DefinitionError, match="has no step"):
        app.machine(Empty, name="empty")


@pytest.mark.parametrize("count", [0, 2])
def test_a_machine_has_exactly_one_initial_step(app: Durable, count: int) -> None:
    def body(self: Any, ctx: Any) -> Any:
        return Done()

    def named(name: str, initial: bool) -> Any:
        def function(self: Any, ctx: Any) -> Any:
            return Done()

        function.__name__ = name
        return step(initial=initial)(function)

    steps = {name: named(name, n < count) for n, name in enumerate(("a", "b", "c"))}
    with pytest.raises(DefinitionError, match=f"exactly one @step\\(initial=True\\), it has {count}"):
        app.machine(type("Wrong", (Machine,), steps), name="wrong")


def test_a_single_step_needs_no_mark(app: Durable) -> None:
    class Single(Machine):
        @step
        def only(self, ctx: Context) -> Any:
            return Done()

    app.machine(Single, name="single")
    assert Single.definition.initial == "only"


def _no_machine() -> None:
    raise AssertionError


@pytest.mark.parametrize("target", [int, object(), "text", _no_machine])
def test_what_is_no_machine_is_refused(app: Durable, target: Any) -> None:
    with pytest.raises(DefinitionError, match="takes a subclass of Machine"):
        app.machine(target)


def define(app: Durable, **options: Any) -> type[Machine]:
    class Local(Machine):
        @step
        def only(self, ctx: Context) -> Any:
            return Done()

    return app.machine(Local, **options)  # type: ignore[no-any-return]


def test_two_classes_of_one_name_and_version_are_refused(app: Durable) -> None:
    class Other(Machine):
        @step
        def only(self, ctx: Context) -> Any:
            return Done()

    define(app, name="twice")
    define(app, name="twice", version=2)
    with pytest.raises(DefinitionError, match="'twice' version 1 is defined twice"):
        app.machine(Other, name="twice")
    with pytest.raises(DefinitionError, match="defined twice"):
        app.task(_no_machine, name="twice")


def test_two_classes_that_inherit_their_steps_are_two(app: Durable) -> None:
    class One(Right):
        pass

    class Two(Right):
        pass

    app.machine(One, name="twice")
    with pytest.raises(DefinitionError, match="defined twice"):
        app.machine(Two, name="twice")


def test_a_module_that_is_imported_again_may_define_its_machines_again(app: Durable) -> None:
    first, second = define(app, name="again"), define(app, name="again")
    assert first is not second
    assert app.find_task("again") is second.definition


@pytest.mark.parametrize("version", [0, -1, 1.5, True, "1", 2**31])
def test_a_version_is_an_integer_from_1(app: Durable, version: Any) -> None:
    with pytest.raises(DefinitionError, match="version must be an integer from 1"):
        define(app, name="m", version=version)


def test_an_unknown_option_is_named_with_its_neighbour(app: Durable) -> None:
    with pytest.raises(DefinitionError, match="unknown machine option 'inlin'; did you mean 'inline'"):
        define(app, name="m", inlin=True)
    with pytest.raises(ValidationError, match="queue"):
        define(app, name="m", queue="No Such")


def test_a_nested_class_needs_a_name(app: Durable) -> None:
    with pytest.raises(DefinitionError, match="nested"):
        define(app)


def test_a_step_is_a_method() -> None:
    with pytest.raises(DefinitionError, match="@step marks a method"):
        step(initial=True)("text")  # type: ignore[type-var]


def test_steps_are_inherited_and_may_be_overridden(app: Durable) -> None:
    class Longer(Right):
        @step
        def more(self, ctx: Context) -> Any:
            return Done()

    class Without(Longer):
        more = None  # type: ignore[assignment]

    app.machine(Longer, name="longer")
    app.machine(Without, name="without")
    assert sorted(Longer.definition.steps) == ["more", "start"]
    assert sorted(Without.definition.steps) == ["start"]
    assert Longer.definition.initial == "start"


def test_what_is_not_registered_can_not_be_inserted(app: Durable) -> None:
    class Unregistered(Machine):
        @step
        def only(self, ctx: Context) -> Any:
            return Done()

    class Child(define(app, name="parent")):  # type: ignore[misc]
        pass

    for cls in (Unregistered, Child, Machine):
        with pytest.raises(DefinitionError, match="is not registered"):
            app.insert(cls)
        with pytest.raises(DefinitionError, match="is not registered"):
            cls.delay()
    with pytest.raises(UnknownTaskError, match="did you mean 'parent'"):
        app.insert("parnt")
