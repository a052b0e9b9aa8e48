"""Tasks: definition, names, signatures, and the row a call makes."""

from __future__ import annotations

import asyncio
import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from durable import Context, Durable
from durable.errors import DefinitionError, DurableError, PayloadError, UnknownTaskError, ValidationError
from durable.instance import LIVE, NewInstance
from durable.task import AsyncTask, Task

NOWHERE = "postgresql://nobody@127.0.0.1:1/none"


@pytest.fixture
def app() -> Durable:
    """An app that never connects."""
    return Durable("unit", dsn=NOWHERE)


def send(to: str, subject: str = "hi", *, urgent: bool = False) -> str:
    """Send a mail."""
    return f"{to}: {subject}"


def payload_of(app: Durable, new: NewInstance) -> Any:
    return app.codec.decode(*new.state)


# Definition


def test_a_task_is_still_a_plain_function(app: Durable) -> None:
    task = app.task(send)
    assert task("a@b.c", subject="yo") == "a@b.c: yo"
    assert (task.__name__, task.__doc__, task.__module__) == ("send", "Send a mail.", __name__)
    assert task.__wrapped__ is send
    assert (task.name, task.queue, task.version) == (f"{__name__}.send", "default", 1)


def test_the_decorator_takes_options_or_none(app: Durable) -> None:
    task = app.task(name="mail", queue="emails", priority=5, version=3, max_attempts=2)(send)
    assert (task.name, task.queue, task.version) == ("mail", "emails", 3)
    new = task.new(("x",))
    assert (new.queue, new.priority, new.machine_version, new.step) == ("emails", 5, 3, "run")


def test_async_functions_become_async_tasks(app: Durable) -> None:
    @app.task(name="fetch")
    async def fetch(url: str) -> str:
        return url * 2

    assert isinstance(fetch, AsyncTask)
    assert fetch.is_async
    assert asyncio.run(fetch("ab")) == "abab"


def test_bind_hides_the_context_from_the_signature(app: Durable) -> None:
    @app.task(bind=True, name="bound")
    def bound(ctx: Context, x: int) -> int:
        return x

    bound.new((1,))
    bound.new((), {"x": 1})
    with pytest.raises(TypeError, match=r"bound\(\): missing a required argument: 'x'"):
        bound.new(())
    with pytest.raises(TypeError, match="too many"):
        bound.new((1, 2))


def test_bind_works_with_a_catch_all_signature(app: Durable) -> None:
    app.task(bind=True, name="all")(lambda *args: None).new((1, 2, 3))


@pytest.mark.parametrize("function", [lambda: None, lambda *, ctx: None, lambda **kwargs: None])
def test_bind_needs_a_first_parameter(app: Durable, function: Callable[..., Any]) -> None:
    with pytest.raises(DefinitionError, match="bind=True, so its first parameter must take the context"):
        app.task(bind=True, name="bound")(function)


def test_lambdas_and_nested_functions_need_a_name(app: Durable) -> None:
    def nested() -> None: ...

    for function in (nested, lambda: None):
        with pytest.raises(DefinitionError, match=r"lambda or a nested function.*name=\.\.\."):
            app.task(function)
        app.task(name="named")(function)
        app.definitions.clear()


@pytest.mark.parametrize("thing", ["emails", 5, functools.partial(send, "a")], ids=lambda thing: type(thing).__name__)
def test_what_is_no_named_function_is_refused_with_a_hint(app: Durable, thing: Any) -> None:
    with pytest.raises(DefinitionError, match=r"must be a function|name=\.\.\."):
        app.task(thing)


def test_a_partial_with_a_name_is_a_task(app: Durable) -> None:
    task = app.task(name="half")(functools.partial(send, "a"))
    assert task() == "a: hi"


def test_a_script_names_its_tasks_by_its_file(tmp_path: Path) -> None:
    script = tmp_path / "shop.py"
    script.write_text(
        "from durable import Durable\n"
        f"app = Durable('s', dsn={NOWHERE!r})\n"
        "@app.task\ndef pay(): ...\n"
        "print(pay.name)\n"
    )
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert printed.stdout == "shop.pay\n"


def test_a_name_used_twice_is_refused_with_both_places(app: Durable) -> None:
    @app.task(name="same")
    def one() -> None: ...

    with pytest.raises(
        DefinitionError, match=r"'same' version 1 is defined twice: .*test_task\.py:\d+ and .*test_task\.py:\d+"
    ) as caught:

        @app.task(name="same")
        def two() -> None: ...

    lines = [int(part.split(":")[1].split()[0].rstrip(";")) for part in str(caught.value).split("test_task.py")[1:]]
    assert lines[0] < lines[1]
    assert app.tasks["same", 1].function is one.function


def test_versions_of_one_name_live_side_by_side(app: Durable) -> None:
    one = app.task(name="same", version=1)(lambda: 1)
    two = app.task(name="same", version=2)(lambda: 2)
    assert app.find_task("same") is two
    assert app.find_task("same", 1) is one
    with pytest.raises(UnknownTaskError, match="no task 'same' version 3"):
        app.find_task("same", 3)


def test_a_module_imported_twice_defines_its_tasks_once(app: Durable) -> None:
    app.task(send)
    app.task(send)
    assert len(app.tasks) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name must be 1 to 255 bytes"),
        ({"name": "n" * 300}, "name must be 1 to 255 bytes"),
        ({"name": "a\0"}, "NUL"),
        ({"name": 5}, "must be text"),
        ({"queue": "No"}, "queue must be"),
        ({"priority": "high"}, "priority must be"),
        ({"version": 0}, "version must be an integer from 1"),
        ({"version": "1"}, "version must be"),
        ({"version": 1.0}, "version must be"),
        ({"version": True}, "version must be"),
        ({"max_attempts": 0}, "max_attempts must be"),
        ({"retry_for": [ValueError, "KeyError"]}, "retry_for holds 'KeyError', which is no exception class"),
        ({"retry_for": int}, "retry_for holds .*int"),
        ({"dont_retry_for": "KeyError"}, "dont_retry_for"),
        ({"dont_retry_for": 5}, "dont_retry_for"),
        ({"backoff": 5}, "backoff must be a function"),
        ({"qeue": "x"}, "unknown task option 'qeue'; did you mean 'queue'"),
    ],
    ids=repr,
)
def test_a_wrong_option_is_refused_at_definition(app: Durable, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DurableError, match=message):
        app.task(**{"name": "t", **options})(lambda: None)
    assert not app.tasks


def test_an_unknown_name_lists_near_ones(app: Durable) -> None:
    app.task(name="shop.pay")(lambda: None)
    with pytest.raises(UnknownTaskError, match=r"no task 'shop.pya' is registered; did you mean 'shop.pay'"):
        app.insert("shop.pya")
    with pytest.raises(ValidationError, match="a target is a task, a machine or the name of one, got 5"):
        app.insert(5)  # type: ignore[arg-type]


def test_an_apps_own_values_are_checked() -> None:
    for arguments in (
        {"name": ""},
        {"name": "n" * 61},
        {"name": "x", "schema": "Public"},
        {"name": "x", "schema": "pg_x"},
    ):
        with pytest.raises(DurableError):
            Durable(**{"dsn": NOWHERE, **arguments})


# Calls


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"test_task\.send\(\): missing a required argument: 'to'"),
        (("a", "b", "c"), {}, "too many positional arguments"),
        (("a",), {"to": "b"}, "multiple values for argument 'to'"),
        (("a",), {"subjct": "b"}, "unexpected keyword argument 'subjct'"),
    ],
)
def test_arguments_are_checked_against_the_signature_when_sent(
    app: Durable, args: Any, kwargs: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        app.task(send).delay(*args, **kwargs)


def test_arguments_that_cannot_be_written_name_their_path(app: Durable) -> None:
    with pytest.raises(PayloadError, match=r"arguments\.kwargs\.subject holds a NUL"):
        app.task(send).delay("a", subject="\0")
    with pytest.raises(PayloadError, match=r"arguments\.args\[0\] is nan"):
        app.task(send).delay(float("nan"))


def test_only_what_was_given_is_stored(app: Durable) -> None:
    task = app.task(send)
    assert payload_of(app, task.new(("a",))) == {"args": ["a"]}
    assert payload_of(app, task.new((), {"to": "a"})) == {"kwargs": {"to": "a"}}


def test_options_of_a_call_win_over_those_of_the_task(app: Durable) -> None:
    task = app.task(queue="emails", priority=1)(send)
    new = task.new(("a",), queue="fast", priority=-5, max_attempts=3, correlation_key="k", correlation_scope=["done"])
    assert (new.queue, new.priority, new.max_attempts, new.correlation_key) == ("fast", -5, 3, "k")
    assert set(new.correlation_scope or ()) == LIVE | {"done"}
    assert task.new(("a",), correlation_key="k").correlation_scope is None


SOON = datetime.now(UTC) + timedelta(hours=1)
LATER = SOON + timedelta(hours=1)

BAD_TIMES = [
    ({"schedule_in": 5, "schedule_at": SOON}, "not both"),
    ({"schedule_in": -1}, "countdown must be"),
    ({"schedule_in": "5"}, "countdown must be"),
    ({"schedule_in": float("nan")}, "countdown must be"),
    ({"schedule_at": datetime.now()}, "eta has no time zone"),
    ({"schedule_at": "2026-01-01"}, "eta must be a datetime"),
    ({"expires": datetime.now(UTC) - timedelta(seconds=1)}, "expires is in the past"),
    ({"expires": datetime.now()}, "expires has no time zone"),
    ({"expires": 0}, "expires"),
    ({"expires": -5}, "expires must be"),
    ({"expires": timedelta(seconds=-5)}, "expires must be"),
    ({"expires": "5"}, "expires must be"),
    ({"expires": 5, "schedule_in": 5}, "expires .* is not after countdown"),
    ({"expires": SOON, "schedule_at": LATER}, "expires .* is not after eta"),
    ({"expires": 60, "schedule_at": SOON}, "expires .* is not after eta"),
    ({"expires": SOON, "schedule_in": 7200}, "expires .* is not after countdown"),
]


@pytest.mark.parametrize(("options", "message"), BAD_TIMES, ids=[str(n) for n in range(len(BAD_TIMES))])
def test_times_that_make_no_sense_are_refused(app: Durable, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        app.task(send).new(("a",), **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule_in": 5}, {"delay": 5.0}),
        ({"schedule_at": SOON}, {"at": SOON}),
        ({"expires": 60}, {"expires_in": 60.0}),
        ({"expires": timedelta(minutes=1)}, {"expires_in": 60.0}),
        ({"expires": LATER, "schedule_at": SOON}, {"expires_at": LATER, "at": SOON}),
        ({"expires": 7201, "schedule_at": SOON}, {"expires_in": 7201.0, "at": SOON}),
        ({"expires": 60, "schedule_in": 59}, {"expires_in": 60.0, "delay": 59.0}),
    ],
    ids=[str(n) for n in range(7)],
)
def test_times_reach_the_row(app: Durable, options: dict[str, Any], expected: dict[str, Any]) -> None:
    new = app.task(send).new(("a",), **options)
    assert {name: getattr(new, name) for name in expected} == expected


def test_a_scope_without_a_key_is_refused(app: Durable) -> None:
    with pytest.raises(ValidationError, match="correlation_scope says when correlation_key is occupied"):
        app.task(send).new(("a",), correlation_scope=["done"])


@pytest.mark.parametrize("target", [-1, 0, 2**63, True, 1.5, None])
def test_an_id_out_of_range_never_reaches_the_database(app: Durable, target: Any) -> None:
    for call in (app.result, app.cancel):
        with pytest.raises(ValidationError, match="an instance id is an integer from 1"):
            call(target)


def test_a_tasks_own_serializer_writes_its_arguments(app: Durable) -> None:
    task = app.task(name="packed", serializer="msgpack")(send)
    assert isinstance(task, Task)
    assert task.new(("a",)).state.type == "msgpack"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"soft_time_limit": 0}, "soft_time_limit of task 't' must be more than 0 seconds"),
        ({"time_limit": "1"}, "time_limit of task 't' must be a number of seconds"),
        ({"soft_time_limit": 5, "time_limit": 5}, r"soft_time_limit \(5 s\) of task 't' must be shorter"),
    ],
    ids=["zero", "text", "not shorter"],
)
def test_a_time_limit_that_makes_no_sense_is_refused(options: dict[str, Any], complaint: str) -> None:
    app = Durable("unit")
    with pytest.raises(ValidationError, match=complaint):
        app.task(name="t", **options)(print)
    assert ("t", 1) not in app.definitions


@pytest.mark.parametrize("given", range(5))
@pytest.mark.parametrize(
    "function",
    [
        lambda: None,
        lambda a, b=1: None,
        lambda a, /, b: None,
        lambda a, *rest: None,
        lambda a, *, named: None,
        lambda a, *, named=1: None,
        lambda **rest: None,
    ],
)
def test_arguments_given_by_position_fit_when_python_would_bind_them(
    app: Durable, function: Callable[..., None], given: int
) -> None:
    task = app.task(name="positional")(function)
    args = (0,) * given
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        with pytest.raises(TypeError):
            task.check_arguments(args, {})
    else:
        task.check_arguments(args, {})
