"""Limits as producers and steps give them: options of every call, what is refused, Next, children, testing."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from durable import ConcurrencyLimit, Done, Durable, Machine, Next, RateLimit, ScheduleChildren, step
from durable.errors import ConfigError, OutcomeError, ValidationError
from durable.limit_rows import LimitRows
from durable.storage import limits
from durable.storage.session import run
from durable.testing import drain
from tests.machines.driver import Driver, View

LIMITS: dict[str, Any] = {
    "rate_limits": {"mail": RateLimit(5, 3600.0, burst=5)},
    "concurrency_limits": {"vendor": ConcurrencyLimit(2)},
}


@pytest.fixture
def app(database: str, schema: str) -> Any:
    app = Durable("test", dsn=database, schema=schema, **LIMITS)
    app.migrate()

    @app.task(name="work")
    def work(n: int = 0) -> int:
        return n

    yield app
    app.close()


def limits_of(view: View, instance: int) -> tuple[Any, ...]:
    return view.of(instance, "concurrency_key", "rate_limit", "weight")


def test_every_call_takes_the_options(app: Durable, view: View) -> None:
    options = {"concurrency_key": "vendor:1", "rate_limit": ("mail", "eu"), "weight": 2}
    task = app.find_task("work")

    async def produce() -> list[int]:
        made = [await task.aapply_async(**options), await app.ainsert("work", **options)]  # type: ignore[union-attr]
        made += await app.ainsert_many([("work", options)])
        await app.aclose()
        return [result.id for result in made]

    results = [task.apply_async(**options), app.insert("work", **options)]  # type: ignore[union-attr]
    results += app.insert_many([("work", options)])
    ids = [result.id for result in results] + asyncio.run(produce())
    assert {limits_of(view, i) for i in ids} == {("vendor:1", "mail:eu", 2)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rate_limit": "mial"}, "mail"),
        ({"rate_limit": "nothing:eu"}, "durable limits set"),
        ({"rate_limit": ""}, "1 to 255"),
        ({"rate_limit": ":eu"}, "limit's name"),
        ({"rate_limit": ("mail",)}, "partition"),
        ({"rate_limit": ("ma:il", "x")}, "colon"),
        ({"rate_limit": 7}, "text"),
        ({"rate_limit": "mail:" + "x" * 251}, "255"),
        ({"rate_limit": "mail", "weight": 0}, "weight"),
        ({"rate_limit": "mail", "weight": -1}, "weight"),
        ({"rate_limit": "mail", "weight": math.nan}, "NaN"),
        ({"rate_limit": "mail", "weight": 1.0}, "weight"),
        ({"rate_limit": "mail", "weight": True}, "weight"),
        ({"rate_limit": "mail", "weight": 6}, "burst"),
        ({"weight": 2}, "rate_limit"),
        ({"concurrency_key": ""}, "concurrency_key"),
        ({"concurrency_key": "k" * 256}, "255"),
        ({"concurrency_key": "a\0b"}, "NUL"),
        ({"concurrency_key": "\ud800"}, "surrogate"),
        ({"concurrency_key": 7}, "concurrency_key"),
    ],
)
@pytest.mark.parametrize("how", ["insert", "insert_many", "batch", "adelay"])
def test_bad_input_is_refused_and_nothing_is_written(
    app: Durable, view: View, how: str, options: dict[str, Any], named: str
) -> None:
    task: Any = app.find_task("work")

    async def produce() -> None:
        try:
            await app.ainsert("work", **options)
        finally:
            await app.aclose()

    def batch() -> None:
        with app.batch():
            task.delay()
            task.apply_async(**options)

    call = {
        "insert": lambda: app.insert("work", **options),
        "insert_many": lambda: app.insert_many([("work", {}), ("work", options)]),
        "batch": batch,
        "adelay": lambda: asyncio.run(produce()),
    }[how]
    with pytest.raises(ValidationError, match=named):
        call()
    assert view.count("instance_view") == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: RateLimit(0),
        lambda: RateLimit(1, 0.0),
        lambda: RateLimit(1, math.nan),
        lambda: RateLimit(1, math.inf),
        lambda: RateLimit(1, burst=0),
        lambda: RateLimit(1, burst=2, shards=3),
        lambda: RateLimit(1_000_000, 0.001),
        lambda: RateLimit(1, 366 * 86400.0, burst=1001),
        lambda: RateLimit(True),
        lambda: ConcurrencyLimit(0),
        lambda: ConcurrencyLimit(-1),
        lambda: ConcurrencyLimit(2, shards=3),
        lambda: ConcurrencyLimit(100, shards=65),
        lambda: ConcurrencyLimit(2, shards=0),
        lambda: ConcurrencyLimit(1.5),  # type: ignore[arg-type]
        lambda: ConcurrencyLimit(2**31),
        lambda: ConcurrencyLimit(True),
        lambda: Durable("x", rate_limits={"a:b": RateLimit(1)}),
        lambda: Durable("x", rate_limits={"": RateLimit(1)}),
        lambda: Durable("x", rate_limits={"a": ConcurrencyLimit(1)}),  # type: ignore[dict-item]
        lambda: Durable("x", concurrency_limits=[ConcurrencyLimit(1)]),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_limit_is_a_wrong_setting(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_configured_limits_are_stored_updated_and_left_alone_when_pinned(app: Durable) -> None:
    def declare(**given: Any) -> None:
        with app._pool.connection() as connection, connection.transaction():
            run(connection, app.sql, LimitRows(**given).declare())

    def stored() -> dict[str, tuple[int, bool]]:
        return {row.name: (row.allowed, row.pinned) for row in app.run(limits.read())}

    assert stored() == {"mail": (5, False), "vendor": (2, False)}
    declare(rate_limits={"mail": RateLimit(9)}, concurrency_limits={"new": ConcurrencyLimit(1)})
    assert stored() == {"mail": (9, False), "vendor": (2, False), "new": (1, False)}
    app.run(limits.put({("rate", "mail"): RateLimit(3)}, pin=True))
    declare(rate_limits={"mail": RateLimit(9)})
    assert stored()["mail"] == (3, True)
    app.run(limits.unpin("rate", "mail"))
    declare(rate_limits={"mail": RateLimit(9)})
    assert stored()["mail"] == (9, False)


def test_limits_that_are_configured_and_missing_are_stored_before_the_first_enqueue(app: Durable, view: View) -> None:
    app.run(limits.drop("rate", "mail"))
    app.insert("work", rate_limit="mail")
    assert view.rows("SELECT kind, name FROM {schema}.limits ORDER BY 2") == [
        ("rate", "mail"),
        ("concurrency", "vendor"),
    ]


def test_a_limit_made_by_hand_is_known_at_once_and_one_that_shrank_soon(app: Durable, view: View) -> None:
    app.insert("work", rate_limit="mail", weight=5)
    app.run(limits.put({("rate", "fresh"): RateLimit(1)}, pin=True))
    app.insert("work", rate_limit="fresh")
    app.run(limits.put({("rate", "mail"): RateLimit(5, 3600.0, burst=7)}, pin=True))
    app.insert("work", rate_limit="mail", weight=7)
    assert view.count("instances") == 3


# Steps


def machine(app: Durable, outcomes: dict[str, Any], **options: Any) -> type[Machine]:
    @app.machine(name="chain", **options)
    class Chain(Machine):
        @step(initial=True)
        def one(self, ctx: Any) -> Any:
            return outcomes["one"]

        @step
        def two(self, ctx: Any) -> Any:
            return outcomes.get("two", Done())

        @step
        def three(self, ctx: Any) -> Any:
            return Done()

        def handle(self, error: BaseException, ctx: Any) -> Any:
            return Next("three", state={"error": f"{type(error).__name__}: {error}"})

    return Chain


def test_next_sets_the_limits_of_the_step_and_the_next_one_loses_the_rate(
    app: Durable, driver: Driver, view: View
) -> None:
    outcomes = {"one": Next("two", rate_limit="mail:eu", weight=3), "two": Next("three")}
    chain = machine(app, outcomes).delay()
    app_key = app.insert(machine_of(app), concurrency_key="vendor:1").id
    driver.step()
    driver.step()
    assert limits_of(view, chain.id) == (None, "mail:eu", 3)
    assert limits_of(view, app_key) == ("vendor:1", "mail:eu", 3)
    driver.step()
    assert limits_of(view, chain.id)[1:] == (None, 1)


def machine_of(app: Durable) -> Any:
    return app.find_task("chain")


@pytest.mark.parametrize("inline", [True, False])
def test_a_switch_of_key_frees_the_old_one_and_draws_the_new(
    app: Durable, driver: Driver, view: View, inline: bool
) -> None:
    machine(
        app, {"one": Next("two", concurrency_key="vendor:2"), "two": Next("three", concurrency_key=None)}, inline=inline
    )
    chain = app.insert("chain", concurrency_key="vendor:1")
    claimed = driver.claim()
    assert (claimed.concurrency_key, claimed.gate_shard) == ("vendor:1", 0)
    driver.flush(driver.execute(claimed))
    used = "SELECT key, used FROM {schema}.gates ORDER BY key"
    assert view.rows(used) == [("vendor:1", 0)]
    claimed = driver.claim()
    assert (claimed.concurrency_key, claimed.step) == ("vendor:2", "two")
    assert view.rows(used) == [("vendor:1", 0), ("vendor:2", 1)]
    driver.flush(driver.execute(claimed))
    assert view.rows(used) == [("vendor:1", 0), ("vendor:2", 0)]
    assert limits_of(view, chain.id)[0] is None
    driver.drain()
    assert view.status(chain.id) == "done"


def test_an_inline_chain_that_keeps_its_key_stays_on_its_claim(app: Durable, driver: Driver, view: View) -> None:
    machine(app, {"one": Next("two"), "two": Next("three")}, inline=True)
    first, second = (app.insert("chain", concurrency_key="acct:1", rate_limit="mail") for _ in range(2))
    claimed = driver.claim()
    driver.flush(driver.execute(claimed))
    hop = driver.claim()
    assert (hop.id, hop.token, hop.step, hop.rate_limit) == (first.id, claimed.token, "two", None)
    assert limits_of(view, first.id) == ("acct:1", None, 1)
    assert view.of(second.id, "lane") == ("key acct:1",)
    driver.flush(driver.execute(hop))
    driver.drain()
    assert view.status(second.id) == "done"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rate_limit": "mial"}, "did you mean 'mail'"),
        ({"rate_limit": "mail", "weight": 6}, "burst"),
        ({"rate_limit": "mail", "weight": 0}, "weight"),
        ({"weight": 2}, "rate_limit"),
        ({"concurrency_key": ""}, "concurrency_key"),
        ({"concurrency_key": "a\0b"}, "NUL"),
    ],
)
def test_wrong_limits_in_next_are_errors_of_the_step(
    app: Durable, driver: Driver, view: View, arguments: dict[str, Any], named: str
) -> None:
    class Lazy:
        """The outcome is made inside of the step."""

        def __getitem__(self, key: str) -> Any:
            return Next("two", **arguments)

    chain = machine(app, Lazy()).delay()  # type: ignore[arg-type]
    driver.step()
    assert view.of(chain.id, "step") == ("three",)
    assert named in view.state(chain.id)["error"]


def test_children_have_limits_of_their_own_and_wrong_ones_are_an_error_of_the_step(
    app: Durable, driver: Driver, view: View
) -> None:
    children = [("work", {"args": (n,), "concurrency_key": "acct:9", "rate_limit": "mail"}) for n in range(3)]
    chain = machine(app, {"one": ScheduleChildren(children, then="three")}).delay()
    driver.step()
    lanes = view.rows("SELECT lane FROM {schema}.instances WHERE parent_id = %s ORDER BY id", chain.id)
    assert lanes == [(None,), ("key acct:9",), ("key acct:9",)]
    driver.drain()
    assert view.status(chain.id) == "done"


def test_a_child_with_an_unknown_limit_is_an_error_of_the_step(app: Durable, driver: Driver, view: View) -> None:
    chain = machine(app, {"one": ScheduleChildren([("work", {"rate_limit": "mial"})], then="two")}).delay()
    driver.step()
    assert "did you mean 'mail'" in view.state(chain.id)["error"]
    assert view.count("instances") == 1


def test_a_next_that_cannot_be_is_refused_where_it_is_made() -> None:
    with pytest.raises(OutcomeError, match="weight"):
        Next("two", rate_limit="mail", weight=0)
    assert Next("two", rate_limit=("mail", "eu")).rate_limit == "mail:eu"


def test_a_retried_instance_keeps_its_limits(app: Durable, driver: Driver, view: View) -> None:
    @app.task(name="fails", max_attempts=1)
    def fails() -> None:
        raise ValueError("no")

    result = app.insert("fails", concurrency_key="acct:1", rate_limit="mail", weight=2)
    driver.drain()
    assert view.status(result.id) == "failed"
    assert app.retry(result.id)
    assert limits_of(view, result.id) == ("acct:1", "mail", 2)
    driver.drain()
    assert view.status(result.id) == "failed"


def test_a_drain_in_a_test_runs_limited_rows_as_if_their_tokens_had_come(app: Durable) -> None:
    app.insert_many([("work", {"args": (n,), "rate_limit": "mail", "concurrency_key": "acct:1"}) for n in range(12)])
    assert drain(app) == {"steps": 12, "done": 12}
