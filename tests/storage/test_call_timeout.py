"""Every call of a producer ends in time, also on a connection that stays open and never answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.errors import CallTimeoutError, DatabaseUnavailableError, ValidationError
from tests.fix_proxy import CountingProxy

CALLS: dict[str, Callable[[Durable, float | None], Any]] = {
    "insert": lambda app, timeout: app.insert("task", timeout=timeout),
    "insert_many": lambda app, timeout: app.insert_many([("task", {})], timeout=timeout),
    "apply_async": lambda app, timeout: app.find_task("task").apply_async(timeout=timeout),
    "signature": lambda app, timeout: app.find_task("task").s().apply_async(timeout=timeout),  # type: ignore[union-attr]
    "signal": lambda app, timeout: app.signal(1, "go", timeout=timeout),
    "signal_many": lambda app, timeout: app.signal_many([{"target": 1, "name": "go"}], timeout=timeout),
    "cancel": lambda app, timeout: app.cancel(1, timeout=timeout),
    "cascade": lambda app, timeout: app.cancel("key", cascade=True, timeout=timeout),
    "result.cancel": lambda app, timeout: app.result(1).cancel(timeout=timeout),
    "result.signal": lambda app, timeout: app.result(1).signal("go", timeout=timeout),
}
ACALLS: dict[str, Callable[[Durable, float | None], Any]] = {
    "ainsert": lambda app, timeout: app.ainsert("task", timeout=timeout),
    "ainsert_many": lambda app, timeout: app.ainsert_many([("task", {})], timeout=timeout),
    "aapply_async": lambda app, timeout: app.find_task("task").aapply_async(timeout=timeout),
    "asignal": lambda app, timeout: app.asignal(1, "go", timeout=timeout),
    "acancel": lambda app, timeout: app.acancel(1, timeout=timeout),
}
OTHERS: dict[str, Callable[[Durable], Any]] = {
    "delay": lambda app: app.find_task("task").delay(),  # type: ignore[union-attr]
    "status": lambda app: app.result(1).status,
    "retry": lambda app: app.retry(1),
    "pause": lambda app: app.pause("default"),
    "children": lambda app: list(app.children_of(1)),
}


@pytest.fixture
def silent(app: Durable, counting_proxy: CountingProxy) -> Iterator[Callable[..., Durable]]:
    """Make an app whose one connection, and each that it opens from now on, never answers."""
    made: list[Durable] = []

    def make(**settings: Any) -> Durable:
        other = Durable("silent", dsn=counting_proxy.dsn, schema=app.schema, pool_size=1, **settings)
        other.task(name="task")(lambda: None)
        other.insert("task")
        counting_proxy.silence(new=True)
        made.append(other)
        return other

    yield make
    for other in made:
        other.close()


def ends_in_time(call: Callable[[], Any], seconds: float) -> None:
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError):
        call()
    assert 0.8 * seconds < time.monotonic() - began < seconds + 1.5


def test_call_ends_within_its_timeout(silent: Callable[..., Durable]) -> None:
    app = silent()
    with pytest.raises(CallTimeoutError, match=r"what the call wrote may be there: .*; .*raise call_timeout"):
        app.insert("task", timeout=0.2)
    for call in CALLS.values():  # their connection falls silent while it is opened
        ends_in_time(lambda: call(app, 0.2), 0.2)  # noqa: B023


def test_async_call_ends_within_its_timeout(silent: Callable[..., Durable]) -> None:
    app = silent()

    async def main() -> None:
        for name, call in ACALLS.items():
            began = time.monotonic()
            with pytest.raises(CallTimeoutError):
                await call(app, 0.2)
            assert time.monotonic() - began < 1.7, name
        await app.aclose()

    asyncio.run(main())


def test_silent_async_connection_is_given_up(app: Durable, counting_proxy: CountingProxy) -> None:
    other = Durable("silent", dsn=counting_proxy.dsn, schema=app.schema, pool_size=1)
    task = other.task(name="task")(lambda: None)

    async def main() -> None:
        await task.adelay()
        counting_proxy.silence()
        with pytest.raises(CallTimeoutError, match="may be there"):
            await task.aapply_async(timeout=0.2)
        await task.adelay()
        await other.aclose()

    asyncio.run(main())


def test_call_timeout_bounds_all_other_calls(silent: Callable[..., Durable]) -> None:
    app = silent(call_timeout=0.2)
    for call in OTHERS.values():
        ends_in_time(lambda: call(app), 0.2)  # noqa: B023


def test_next_call_takes_a_new_connection(app: Durable, counting_proxy: CountingProxy) -> None:
    other = Durable("silent", dsn=counting_proxy.dsn, schema=app.schema, pool_size=1)
    other.task(name="task")(lambda: None)
    other.insert("task")
    counting_proxy.silence()
    with pytest.raises(CallTimeoutError):
        other.insert("task", timeout=0.2)
    assert other.insert("task", timeout=5).status == "runnable"
    other.close()


def test_timeout_is_refused_where_it_has_no_effect(app: Durable, database: str) -> None:
    app.task(name="task")(lambda: None)
    with psycopg.connect(database) as theirs:
        with pytest.raises(ValidationError, match="timeout=2 is for connections of the app; with connection="):
            app.insert("task", timeout=2, connection=theirs)
        with pytest.raises(ValidationError, match="timeout=2 is for connections of the app; with connection="):
            app.signal(1, "go", timeout=2, connection=theirs)
    with app.batch(), pytest.raises(ValidationError, match=r"does not work inside app.batch\(\)"):
        app.insert("task", timeout=2)
    for wrong in (0, -1, float("nan"), "soon"):
        with pytest.raises(ValidationError, match="timeout"):
            app.insert("task", timeout=wrong)  # type: ignore[arg-type]
