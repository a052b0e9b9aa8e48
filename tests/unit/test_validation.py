"""Values given to producer calls: what is taken, and the one line that refuses the rest."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from durable import validation
from durable.errors import DurableError, ValidationError
from durable.instance import LIVE
from durable.validation import MAX_ID

NAN, INFINITY = float("nan"), float("inf")
TEN_YEARS = 10 * 366 * 86400


def seconds(value: Any) -> float:
    return validation.seconds(value, "countdown")


def moment(value: Any) -> datetime:
    return validation.moment(value, "eta")


def text(value: Any) -> str:
    return validation.text(value, "correlation_key")


ACCEPTED: list[tuple[Callable[[Any], Any], list[Any]]] = [
    (validation.queue, ["default", "a", "0", "emails.high-prio_2", "q" * 63]),
    (validation.schema, ["durable", "_x", "t_0", "a" * 40]),
    (validation.priority, [0, -32768, 32767]),
    (seconds, [0, 0.0, 1, 0.25, TEN_YEARS]),
    (moment, [datetime(1970, 1, 1, tzinfo=UTC), datetime.now(timezone(timedelta(hours=14)))]),
    (validation.max_attempts, [1, 20, 1_000_000]),
    (text, ["k", "order:42", "é" * 127, "😀", " "]),
    (validation.instance_id, [1, MAX_ID]),
    (validation.timeout, [None, 0, 0.5, 86400]),
]
REFUSED: list[tuple[Callable[[Any], Any], str, list[Any]]] = [
    (
        validation.queue,
        "queue must be 1 to 63 of a-z",
        [
            "",
            " ",
            "q" * 64,
            "q;DROP TABLE x",
            "q'",
            "../x",
            "é",
            "a\n",
            "a\x00",
            "😀",
            "%s",
            "{}",
            "*",
            "Q",
            "-q",
            ".q",
            None,
            5,
            b"q",
            ["q"],
        ],
    ),
    (
        validation.schema,
        "schema must be 1 to 40 of a-z",
        ["", "pg_x", "Public", "a" * 41, 'a"b', "a b", '"; drop', "1a", "a-b", "é", "a\n", None, 5],
    ),
    (
        validation.priority,
        "priority must be an integer from -32768 to 32767",
        [40000, -32769, 1.5, 1.0, "high", "1", True, None, NAN],
    ),
    (
        seconds,
        "countdown must be",
        [NAN, INFINITY, -INFINITY, -5, -0.001, "5", None, True, 1e15, TEN_YEARS + 1, 10**400],
    ),
    (
        moment,
        "eta",
        [
            datetime(2026, 1, 1),
            datetime.max,
            datetime.max.replace(tzinfo=UTC),
            datetime.min.replace(tzinfo=UTC),
            datetime(1900, 1, 1, tzinfo=UTC),
            datetime(9999, 1, 1, tzinfo=UTC),
            "tomorrow",
            5,
            None,
            datetime.now(UTC).date(),
        ],
    ),
    (validation.max_attempts, "max_attempts must be an integer from 1", [0, -1, 10**9, True, 1.0, "3", None]),
    (text, "correlation_key", ["", "k" * 256, "é" * 128, "k" * 3000, "a\0b", "\ud800", b"bytes", 5, None]),
    (validation.instance_id, "an instance id is an integer from 1 to", ["42", -1, 0, 2**63, True, 1.0, None, "id"]),
    (validation.timeout, "timeout must be", [-1, NAN, INFINITY, "5", True]),
    (
        validation.scope,
        "correlation_scope",
        ["done", None, 5, ["finished"], [None], [["done"]], {"done": 1, "finnished": 2}],
    ),
]


def rows(table: list[Any]) -> list[Any]:
    return [
        pytest.param(*entry[:-1], value, id=f"{entry[0].__name__}-{ascii(value)[:30]}")
        for entry in table
        for value in entry[-1]
    ]


@pytest.mark.parametrize(("check", "value"), rows(ACCEPTED))
def test_a_good_value_is_returned_as_it_was(check: Callable[[Any], Any], value: Any) -> None:
    assert check(value) == value


@pytest.mark.parametrize(("check", "message", "value"), rows(REFUSED))
def test_a_bad_value_is_refused_in_one_short_line(check: Callable[[Any], Any], message: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        check(value)
    assert isinstance(caught.value, DurableError)
    assert isinstance(caught.value, ValueError)
    line = str(caught.value)
    assert len(line) < 320
    assert "\n" not in line
    line.encode()


def test_a_refused_value_is_shown_cut() -> None:
    with pytest.raises(ValidationError, match=r"'qqqqqq.*\.\.\.$"):
        validation.queue("q" * 10_000)


def test_a_value_whose_repr_raises_is_still_refused_with_our_error() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(ValidationError, match="unprintable Rude"):
        validation.queue(Rude())


def test_a_moment_without_time_zone_is_never_guessed() -> None:
    with pytest.raises(ValidationError, match=r"eta has no time zone.*tzinfo=datetime\.UTC"):
        moment(datetime(2026, 1, 1))


def test_an_unknown_status_in_a_scope_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match="unknown status 'dome'; did you mean 'done'"):
        validation.scope(["dome"])


def test_an_empty_scope_means_no_uniqueness() -> None:
    assert validation.scope([]) == ()
    assert validation.scope(set()) == ()


@pytest.mark.parametrize(
    "given", [["done"], ("failed", "done"), {"scheduled"}, ["runnable", "cancelled"], sorted(LIVE)]
)
def test_a_scope_always_holds_every_live_status(given: Any) -> None:
    """Else an instance could enter a status in which another holds its key: a commit the index must refuse."""
    assert set(validation.scope(given)) == LIVE | set(given)


def test_near_names_help_and_far_ones_list_what_there_is() -> None:
    assert validation.near("emial", ["email", "sms"]) == "; did you mean 'email'?"
    assert validation.near("xyz", ["email", "sms"]) == "; known: email, sms"
    assert validation.near("xyz", []) == ""
