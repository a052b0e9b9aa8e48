"""`durable limits`, the limit options of `call`, and what `list` and `show` say of a row that waits for a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.cli.conftest import Ran

Connection = psycopg.Connection[Any]


@pytest.fixture
def shop(tasks_module: Callable[[str], Path], here: Path) -> Path:
    """A folder with an app that configures one limit of each kind."""
    return tasks_module("""
        from durable import ConcurrencyLimit, RateLimit
        from durable.limit_rows import LimitRows

        app.limit_rows = LimitRows({"mail": RateLimit(5, 1.0)}, {"vendor": ConcurrencyLimit(2)})
        app.migrate()
        app.close()

        @app.task
        def add(a, b=1):
            return a + b
    """)


def limits(durable: Callable[..., Ran]) -> dict[str, Any]:
    return {row["name"]: row for row in durable("limits", "list", "--json").json}


def test_limits_are_listed_with_who_set_them_and_what_they_govern(durable: Callable[..., Ran], shop: Path) -> None:
    durable("call", "tasks.add", "--args", "[1]", "--rate-limit", "mail")
    found = limits(durable)
    assert (found["mail"]["allowed"], found["mail"]["period"], found["mail"]["burst"]) == (5, 1.0, 5)
    assert (found["vendor"]["kind"], found["vendor"]["allowed"], found["vendor"]["pinned"]) == ("concurrency", 2, False)
    shown = durable("limits", "list").out
    assert "5 in 1 s" in shown
    assert "2 per key" in shown


@pytest.mark.parametrize(
    ("rate", "expected"),
    [("10/s", (10, 1.0)), ("100/60s", (100, 60.0)), ("5/m", (5, 60.0)), ("7/1.5h", (7, 5400.0)), ("1/d", (1, 86400.0))],
)
def test_a_rate_is_written_as_tokens_in_a_period(
    durable: Callable[..., Ran], shop: Path, rate: str, expected: tuple[int, float]
) -> None:
    assert durable("limits", "set", "mail", "--rate", rate, "--burst", "3").code == 0
    row = limits(durable)["mail"]
    assert (row["allowed"], row["period"], row["burst"], row["pinned"]) == (*expected, 3, True)


def test_a_limit_set_by_hand_stays_until_it_is_reset(durable: Callable[..., Ran], shop: Path) -> None:
    assert "until `durable limits reset`" in durable("limits", "set", "vendor", "--concurrency", "7").out
    durable("migrate")
    assert (limits(durable)["vendor"]["allowed"], limits(durable)["vendor"]["pinned"]) == (7, True)
    assert "as the app has it" in durable("limits", "reset", "vendor").out
    assert (limits(durable)["vendor"]["allowed"], limits(durable)["vendor"]["pinned"]) == (2, False)


def test_a_limit_that_no_app_has_is_deleted_by_a_reset(
    durable: Callable[..., Ran], shop: Path, database: str, schema: str
) -> None:
    durable("limits", "set", "extra", "--rate", "1/s")
    bare = ["--dsn", database, "--schema", schema]
    assert "kept" in durable("limits", "reset", "extra", *bare).out
    assert durable("limits", "reset", "extra", "--json").json["outcome"].startswith("deleted")
    assert "extra" not in limits(durable)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["set", "mail"], "--rate or --concurrency"),
        (["set", "mail", "--rate", "1/s", "--concurrency", "2"], "--rate or --concurrency"),
        (["set", "mail", "--concurrency", "2", "--burst", "2"], "--burst"),
        (["set", "mail", "--rate", "ten/s"], "no rate like"),
        (["set", "mail", "--rate", "1/.s"], "no rate like"),
        (["set", "mail", "--rate", "0/s"], "allowed"),
        (["set", "mail", "--rate", "9999999/s"], "allowed"),
        (["set", "mail", "--rate", "1/s", "--burst", "0"], "burst"),
        (["set", "mail", "--rate", "1/s", "--shards", "2"], "shards"),
        (["set", "mail", "--concurrency", "0"], "limit"),
        (["set", "a:b", "--rate", "1/s"], "colon"),
        (["set", "x" * 101, "--rate", "1/s"], "100 bytes"),
        (["reset", "mial"], "did you mean 'mail'"),
        (["reset", "mail", "--kind", "concurrency"], "concurrency"),
    ],
)
def test_what_is_no_limit_is_refused(durable: Callable[..., Ran], shop: Path, arguments: list[str], named: str) -> None:
    before = limits(durable)
    ran = durable("limits", *arguments)
    assert ran.code in (1, 2)
    assert named in ran.err
    assert limits(durable) == before


def test_a_name_of_both_kinds_is_reset_by_its_kind(durable: Callable[..., Ran], shop: Path) -> None:
    durable("limits", "set", "mail", "--concurrency", "3")
    assert "--kind" in durable("limits", "reset", "mail").err
    assert durable("limits", "reset", "mail", "--kind", "concurrency").code == 0
    assert limits(durable)["mail"]["kind"] == "rate"


def test_call_takes_limits_and_show_and_list_say_what_a_row_waits_for(
    durable: Callable[..., Ran], shop: Path, connection: Connection, schema: str
) -> None:
    keyed = durable("call", "tasks.add", "--args", "[1]", "--concurrency-key", "vendor:7").out.strip()
    rated = durable("call", "tasks.add", "--args", "[1]", "--rate-limit", "mail:eu", "--weight", "2").out.strip()
    gone = durable("call", "tasks.add", "--args", "[1]", "--rate-limit", "mail").out.strip()
    for instance, lane in ((keyed, "key vendor:7"), (rated, "rate mail:eu"), (gone, "rate other")):
        connection.execute(f"UPDATE {schema}.instances SET lane = %s WHERE id = %s", (lane, instance))
    connection.execute(f"UPDATE {schema}.instances SET rate_limit = 'other' WHERE id = %s", (gone,))
    shown = durable("show", keyed, "--json").json
    assert (shown["concurrency_key"], shown["waits_for"]) == ("vendor:7", "concurrency key vendor:7")
    shown = durable("show", rated, "--json").json
    assert (shown["rate_limit"], shown["weight"], shown["waits_for"]) == ("mail:eu", 2, "rate limit mail:eu")
    listed = {str(row["id"]): row["waits_for"] for row in durable("list", "--json").json}
    assert listed[gone] == "rate limit other, which does not exist"
    assert "waits for concurrency key vendor:7" in durable("list").out


def test_call_refuses_an_unknown_limit(durable: Callable[..., Ran], shop: Path) -> None:
    ran = durable("call", "tasks.add", "--args", "[1]", "--rate-limit", "mial")
    assert ran.code == 2
    assert "did you mean 'mail'" in ran.error
    assert durable("list", "--json").json == []


def test_a_weight_alone_is_refused(durable: Callable[..., Ran], shop: Path) -> None:
    assert "rate_limit" in durable("call", "tasks.add", "--args", "[1]", "--weight", "2").err
