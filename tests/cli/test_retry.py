"""`durable retry`: failed instances go on, whatever else is told why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.cli.conftest import Ran


@pytest.fixture
def failed(
    durable: Callable[..., Ran], shop: Path, connection: psycopg.Connection[Any], schema: str
) -> Callable[..., int]:
    """Call `tasks.add` and let it fail, as a worker would; return its id."""

    def make(*options: str) -> int:
        instance = int(durable("call", "tasks.add", "--args", "[1]", *options).out)
        connection.execute(
            f"UPDATE {schema}.instances SET status = 'failed', finished_at = now(), attempt = 3 WHERE id = %s",
            [instance],
        )
        connection.execute(
            f"WITH gone AS (DELETE FROM {schema}.instances WHERE id = %s RETURNING *)"
            f" INSERT INTO {schema}.history SELECT * FROM gone",
            [instance],
        )
        return instance

    return make


def test_failed_instances_go_on(durable: Callable[..., Ran], failed: Callable[..., int]) -> None:
    one, two = failed(), failed()
    ran = durable("retry", str(one), str(two))
    assert (ran.code, ran.out, ran.err) == (0, f"{one}: goes on\n{two}: goes on\n", "")
    shown = durable("show", str(one), "--json").json
    assert (shown["status"], shown["attempt"]) == ("runnable", 0)


def test_what_can_not_be_retried_says_why_and_stops_nobody(
    durable: Callable[..., Ran], failed: Callable[..., int]
) -> None:
    waiting = int(durable("call", "tasks.add", "--args", "[1]").out)
    old = failed("--key", "order:1")
    rival = int(durable("call", "tasks.add", "--args", "[1]", "--key", "order:1").out)
    good = failed()
    ran = durable("retry", str(waiting), str(old), "424242", str(good))
    lines = ran.out.splitlines()
    assert (ran.code, ran.err) == (1, "")
    assert [lines[0], lines[2], lines[3]] == [
        f"{waiting}: not failed: runnable",
        "424242: not found",
        f"{good}: goes on",
    ]
    assert lines[1].startswith(f"{old}: not retried: correlation key 'order:1' is occupied by instance {rival}")
    ran = durable("retry", str(good), str(old), "--json")
    assert ran.code == 1
    assert [(entry["id"], entry["retried"]) for entry in ran.json] == [(good, False), (old, False)]
    assert ran.json[0]["outcome"] == "not failed: runnable"


def test_ids_come_from_stdin_too(durable: Callable[..., Ran], failed: Callable[..., int]) -> None:
    one, two = failed(), failed()
    ran = durable("retry", "-", "--json", stdin=f"{one}\n\n {two} \n")
    assert ran.code == 0
    assert [(entry["id"], entry["retried"], entry["outcome"]) for entry in ran.json] == [
        (one, True, "goes on"),
        (two, True, "goes on"),
    ]


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], "", "give ids of failed instances"),
        (["-"], "", "give ids of failed instances"),
        (["order:1"], "", "no instance id"),
        (["0"], "", "no instance id"),
        (["-"], "1\nx\n", "stdin, line 2: 'x' is no instance id"),
    ],
)
def test_wrong_ids_are_wrong_usage(
    durable: Callable[..., Ran], shop: Path, arguments: list[str], stdin: str, said: str
) -> None:
    ran = durable("retry", *arguments, stdin=stdin)
    assert ran.code == 2
    assert said in ran.error
