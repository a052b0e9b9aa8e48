"""Typed state: built and checked when enqueued, loaded before each step, saved after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypedDict

import attrs
import msgspec
import pytest

from durable import Context, Done, Durable, Machine, Next, TaskFailed, step
from durable.errors import ValidationError
from tests.machines.driver import Driver, View


@dataclass
class Dataclass:
    order: int
    paid: int = 0
    tags: list[str] = field(default_factory=list)


class Typed(TypedDict, total=False):
    order: int
    paid: int
    tags: list[str]


@attrs.define
class Attrs:
    order: int
    paid: int = 0
    tags: list[str] = attrs.field(factory=list)


class Struct(msgspec.Struct):
    order: int
    paid: int = 0
    tags: list[str] = msgspec.field(default_factory=list)


@cache
def _pydantic() -> Any:
    pydantic = pytest.importorskip("pydantic")
    return pydantic.create_model("Model", order=(int, ...), paid=(int, 0), tags=(list[str], []))


TYPES: dict[str, Any] = {
    "dict": lambda: None,
    "dataclass": lambda: Dataclass,
    "TypedDict": lambda: Typed,
    "attrs": lambda: Attrs,
    "msgspec": lambda: Struct,
    "pydantic": _pydantic,
}
every_type = pytest.mark.parametrize("kind", TYPES)
every_checked_type = pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "dict"])


def get(state: Any, name: str) -> Any:
    return state[name] if isinstance(state, dict) else getattr(state, name)


def put(state: Any, name: str, value: Any) -> None:
    if isinstance(state, dict):
        state[name] = value
    else:
        setattr(state, name, value)


def machine(app: Durable, kind: str, serializer: str | None = None) -> type[Machine]:
    type_ = TYPES[kind]()

    class Typed(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            assert type(ctx.state) is (type_ if type_ not in (None, TYPES["TypedDict"]()) else dict)
            put(ctx.state, "paid", get(ctx.state, "order") * 2)
            put(ctx.state, "tags", ["a", "ü"])
            return Next(self.end, ctx.state)

        @step
        def end(self, ctx: Context) -> Any:
            return Done([get(ctx.state, name) for name in ("order", "paid", "tags")])

    if type_ is not None:
        Typed.State = type_  # type: ignore[attr-defined]
    return app.machine(Typed, name="typed", serializer=serializer)  # type: ignore[no-any-return]


@every_type
def test_a_state_goes_through_every_step_as_its_type(app: Durable, driver: Driver, view: View, kind: str) -> None:
    result = machine(app, kind).delay(order=21)
    driver.step()
    assert view.state(result.id) == {"order": 21, "paid": 42, "tags": ["a", "ü"]}
    driver.drain()
    assert result.get(timeout=5) == [21, 42, ["a", "ü"]]


@every_type
def test_a_state_may_be_given_as_an_object(app: Durable, driver: Driver, kind: str) -> None:
    type_ = TYPES[kind]() or dict
    defined = machine(app, kind)
    (result,) = app.insert_many([(defined, {"state": type_(order=4)})])
    driver.drain()
    assert result.get(timeout=5) == [4, 8, ["a", "ü"]]


@every_type
def test_a_state_goes_through_msgpack_too(app: Durable, driver: Driver, view: View, kind: str) -> None:
    result = machine(app, kind, "msgpack").delay(order=21)
    driver.drain()
    assert result.get(timeout=5) == [21, 42, ["a", "ü"]]
    assert view.rows("SELECT state_type FROM {schema}.history") == [("msgpack",)]


@every_checked_type
def test_wrong_fields_are_refused_when_enqueued_and_nothing_is_written(app: Durable, view: View, kind: str) -> None:
    defined = machine(app, kind)
    with pytest.raises(TypeError, match="no field 'ordr'; did you mean 'order'"):
        defined.delay(ordr=1)
    with pytest.raises(ValidationError, match="order"):
        defined.delay(order="not a number")
    if kind != "TypedDict":
        with pytest.raises(ValidationError, match="order"):
            defined.delay(paid=1)
    with pytest.raises(ValidationError, match="state of typed"):
        app.insert(defined, state=17)
    with pytest.raises(ValidationError, match="entry 1"):
        app.insert_many([(defined, {"kwargs": {"order": 1}}), (defined, {"kwargs": {"order": []}})])
    with pytest.raises(TypeError, match="keyword arguments"):
        app.insert(defined, args=(1,))
    with pytest.raises(TypeError, match="not both"):
        app.insert(defined, state={"order": 1}, kwargs={"order": 1})
    with pytest.raises(ValidationError, match="no step 'strat'; did you mean 'start'"):
        app.insert(defined, kwargs={"order": 1}, step="strat")
    assert view.count("instances") == 0


@pytest.mark.parametrize("kind", ["dataclass", "attrs", "msgspec", "TypedDict"])
def test_an_object_with_wrong_values_is_refused_when_enqueued(app: Durable, view: View, kind: str) -> None:
    with pytest.raises(ValidationError, match="order"):
        app.insert(machine(app, kind), state=TYPES[kind]()(order="not a number"))
    assert view.count("instances") == 0


@every_checked_type
def test_a_state_that_does_not_load_fails_the_instance_and_asks_nobody(
    app: Durable, driver: Driver, connection: Any, kind: str
) -> None:
    defined = machine(app, kind)
    defined.handle = lambda self, error, ctx: Done("handled")  # type: ignore[method-assign]
    result = defined.delay(order=1)
    connection.execute(f"UPDATE {app.schema}.instances SET state = %s", [b'{"order": "many"}'])
    driver.drain()
    with pytest.raises(TaskFailed, match="order"):
        result.get(timeout=5)
    assert driver.steps(result.id) == ["start"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"null", b"\xff"])
def test_a_state_that_is_no_mapping_fails_the_instance(
    app: Durable, driver: Driver, connection: Any, body: bytes
) -> None:
    result = machine(app, "dict").delay(order=1)
    connection.execute(f"UPDATE {app.schema}.instances SET state = %s", [body])
    driver.drain()
    assert result.status == "failed"


def test_a_state_of_another_type_is_an_error_of_the_step(app: Durable, driver: Driver) -> None:
    @app.machine(name="wrong")
    class Wrong(Machine):
        State = Dataclass

        @step
        def start(self, ctx: Context[Dataclass]) -> Any:
            return Next(self.start, Attrs(order=1))

    result = Wrong.delay(order=1)
    driver.drain()
    failure = result.error
    assert failure is not None
    assert "must be a Dataclass, got Attrs" in failure.message


@dataclass
class Inner:
    at: datetime
    note: str | None = None


@dataclass
class Rich:
    inner: Inner
    by_number: dict[int, str]
    names: set[str]
    pair: tuple[int, str]
    raw: bytes = b""


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_nested_values_come_back_as_they_were(app: Durable, driver: Driver, serializer: str) -> None:
    seen: list[Rich] = []

    @app.machine(name="rich", serializer=serializer)
    class Machinery(Machine):
        State = Rich

        @step(initial=True)
        def start(self, ctx: Context[Rich]) -> Any:
            seen.append(ctx.state)
            return Next(self.end, ctx.state)

        @step
        def end(self, ctx: Context[Rich]) -> Any:
            seen.append(ctx.state)
            return Done()

    given = Rich(Inner(datetime(2030, 1, 2, tzinfo=UTC)), {1: "a", 2: "b"}, {"x"}, (1, "y"), b"\x00\xff")
    result = app.insert(Machinery, state=given)
    driver.drain()
    result.get(timeout=5)
    assert seen == [given, given]
