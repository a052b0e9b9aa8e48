"""What leaves a command is safe on a terminal and readable by machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from durable_cli import output
from durable_cli.logs import LineFormatter

HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07text", "text"),
    ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x9b31mred", "red"),
    ("a\x00b\x08c\x7fd", "abcd"),
    ("over\rwritten", "over written"),
    ("one\r\ntwo\tthree", "one two three"),
    ("\u202eright to left", "right to left"),
    ("half\ud800", "half"),
    ("\x1b", ""),
    ("\x1b[999999", ""),
    ("grün 漢字 🎉", "grün 漢字 🎉"),
]


@pytest.mark.parametrize(("text", "left"), HOSTILE)
def test_nothing_that_a_terminal_obeys_is_left(text: str, left: str) -> None:
    assert output.clean(text) == left
    assert not any(ord(character) < 32 for character in output.clean(text))


def test_line_ends_stay_where_lines_are_wanted() -> None:
    assert output.clean("a\r\nb\n\tc\rd\u2028e", lines=True) == "a\nb\n\tcd\ne"


@pytest.mark.parametrize("text", [text for text, _ in HOSTILE])
def test_json_keeps_hostile_text_whole_and_escaped(text: str) -> None:
    document = output.dumps({"text": text})
    assert json.loads(document) == {"text": text}
    assert output.clean(document, lines=True) == document


def test_json_carries_what_json_has_no_words_for() -> None:
    east = timezone(timedelta(hours=2))
    document = {
        "moment": datetime(2030, 1, 31, 14, tzinfo=east),
        "bytes": b"text",
        "binary": b"\xff",
        "nan": float("nan"),
        "decimal": Decimal("1.50"),
        1: {"a"},
    }
    assert json.loads(output.dumps(document)) == {
        "moment": "2030-01-31T12:00:00Z",
        "bytes": "text",
        "binary": "/w==",
        "nan": "nan",
        "decimal": "1.50",
        "1": ["a"],
    }


def test_json_is_ascii_where_stdout_can_not_say_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Stdout())
    assert output.dumps("grün") == '"gr\\u00fcn"'


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("at postgresql://me:secret@host/db now", "at postgresql://me:***@host/db now"),
        ("at postgresql://me:se@cret@host/db", "at postgresql://me:***@host/db"),
        ("password=secret host=x", "password=*** host=x"),
        ("password='se cr\\'et' host=x", "password=*** host=x"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("give postgresql://user:password@host:port/database", "give postgresql://user:password@host:port/database"),
    ],
)
def test_passwords_are_struck_out(text: str, left: str) -> None:
    assert output.scrub(text) == left


def test_a_table_does_not_cut_or_wrap_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("id", "text", "empty"), [(1, "x" * 500 + "\x1b[31m[bold]", None)], ("id",))
    assert capsys.readouterr().out.splitlines() == ["ID  TEXT", f" 1  {'x' * 500}[bold]"]


def test_a_table_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    output.print_table(("id", "text"), [(1, "y" * 100)])
    lines = [output.clean(line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 20
    assert sum(line.count("y") for line in lines) == 100


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.0061, "6 ms"), (0.44, "0.4 s"), (59.6, "60 s"), (300, "5 min"), (7300, "2 h"), (200_000, "2 d")],
)
def test_ages_are_short(seconds: float | None, text: str) -> None:
    assert output.seconds(seconds) == text


def record(message: str, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("x").makeRecord("x", logging.WARNING, __file__, 1, message, (), None, extra=extra)


def test_a_log_line_has_time_level_process_message_and_fields() -> None:
    made = record("a step failed", instance=42, task="shop.pay", attempt=0, error="ValueError('a b')", other=1)
    made.created = datetime(2030, 1, 31, 12, tzinfo=UTC).timestamp()
    line = LineFormatter().format(made)
    time, rest = line[:23], line[24:]
    assert datetime.fromisoformat(time).astimezone(UTC) == datetime(2030, 1, 31, 12, tzinfo=UTC)
    assert rest.startswith("WARNING ")
    assert rest.endswith("] a step failed  instance=42 task=shop.pay attempt=0 error=\"ValueError('a b')\""), rest


def test_a_log_line_is_one_safe_line() -> None:
    line = LineFormatter().format(record("x\x1b[31m\ny password=secret", task="a\nb"))
    assert line.endswith("] x y password=***  task='a b'")


def test_a_logged_exception_follows_on_its_own_lines() -> None:
    try:
        raise ValueError("no\x1b[31m")
    except ValueError:
        made = logging.getLogger("x").makeRecord("x", logging.ERROR, __file__, 1, "bad", (), sys.exc_info())
    first, *trace = LineFormatter().format(made).splitlines()
    assert first.endswith("] bad")
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "ValueError: no"
