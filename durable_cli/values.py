"""Types of command line values. Each turns text into a value or ends the command with a line that names it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import click

from durable import validation
from durable.errors import ValidationError
from durable.storage.grants import KINDS
from durable_cli.exits import USAGE, CommandError

T = TypeVar("T")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Checked(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.2 on
    """A type made of a name and a function that raises ValueError with what is wrong."""

    def __init__(self, name: str, check: Callable[[str], Any]) -> None:
        self.name = name
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the checked value; a default that is none any more passes."""
        if not isinstance(value, str):
            return value
        try:
            return self._check(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def instance_id(text: str) -> int:
    """Accept an instance's id."""
    if not re.fullmatch(r"[0-9]{1,19}", text) or not 1 <= int(text) <= validation.MAX_ID:
        raise ValueError(f"{validation.shown(text)} is no instance id, which is an integer from 1")
    return int(text)


def target(text: str) -> int | str:
    """Accept an id or a correlation key; what looks like a list of ids is taken for neither."""
    if re.fullmatch(r"[0-9]+", text):
        return instance_id(text)
    if re.fullmatch(r"[0-9,; ]+", text):
        raise ValueError(f"{validation.shown(text)} is no instance id; separate several ids with spaces")
    return validation.text(text, "a correlation key")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    try:
        return validation.seconds(value, "it")
    except ValidationError:
        raise ValueError(f"{validation.shown(text)} is no number of seconds from 0 to ten years") from None


def _interval(text: str) -> float:
    value = _seconds(text)
    if not 0.1 <= value <= 3600:
        raise ValueError(f"{validation.shown(text)} is no interval from 0.1 to 3600 seconds")
    return value


def _moment(text: str) -> datetime:
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{validation.shown(text)} is no time like 2030-01-31T12:00:00+00:00") from None
    if value.tzinfo is None:
        raise ValueError(f"{validation.shown(text)} has no time zone; add Z for UTC, or an offset like +01:00")
    return validation.moment(value, "the time")


def _seconds_or_moment(text: str) -> float | datetime:
    return _seconds(text) if re.fullmatch(r"[0-9.eE+-]*", text) and text.count("-") < 2 else _moment(text)


def _name(text: str) -> str:
    return validation.text(text, "a signal's name")


def _dedup_key(text: str) -> str:
    return validation.text(text, "a dedup key")


def _json(kind: type, what: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg} "
                f"(near {validation.shown(text[max(0, error.pos - 10) : error.pos + 10])})"
            ) from None
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
        if not isinstance(value, kind):
            raise ValueError(f"must be {what}, got {validation.shown(text)}")
        return value

    return check


def _prefetch(text: str) -> str | int:
    if text == "auto":
        return text
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < 1:
        raise ValueError(f"{validation.shown(text)} is neither auto nor an integer from 1 to 999999")
    return int(text)


def _autoscale(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,4}),([0-9]{1,4})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 1000:
        raise ValueError(f"{validation.shown(text)} is no MIN,MAX with 1 <= MIN <= MAX <= 1000")
    return int(match[1]), int(match[2])


def concurrency(text: str) -> int | str:
    """Accept a number of worker processes, or auto for as each command was started."""
    if text == "auto":
        return text
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= 1000:
        raise ValueError(f"{validation.shown(text)} is neither auto nor a number of processes from 1 to 1000")
    return int(text)


def ageing(text: str) -> float | str:
    """Accept seconds after which a waiting row ages, or off."""
    if text == "off":
        return text
    value = _seconds(text)
    if not 1 <= value <= 10_000_000:
        raise ValueError(f"{validation.shown(text)} is neither off nor a number of seconds from 1 to 10,000,000")
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})(|KB|MB|GB|KiB|MiB|GiB)", text)
    if match is None or int(match[1]) < 1:
        raise ValueError(f"{validation.shown(text)} is no size like 200MB, or a number of KiB")
    power = {"": 1, "K": 1, "M": 2, "G": 3}[match[2][:1]]
    unit = 1000 if match[2] in ("KB", "MB", "GB") else 1024
    return int(int(match[1]) * unit**power)


def _worker_name(text: str) -> str:
    return validation.text(text, "the name", 120)


def lines_of_stdin(check: Callable[[str], T]) -> list[T]:
    """Return the checked lines of stdin, without blank ones. Raises CommandError that names the wrong line."""
    found: list[T] = []
    for number, line in enumerate(sys.stdin or (), 1):
        if line.strip():
            try:
                found.append(check(line.strip()))
            except ValueError as error:
                raise CommandError(f"stdin, line {number}: {error}", USAGE) from error
    return found


def _grant(text: str) -> tuple[str, str]:
    kind, separator, role = text.partition("=")
    if not separator or kind not in KINDS:
        raise ValueError(f"{validation.shown(text)} must be one of {', '.join(f'{kind}=ROLE' for kind in KINDS)}")
    return kind, validation.text(role, "a role's name", 63)


INSTANCE = Checked("id", instance_id)
TARGET = Checked("id or key", target)
QUEUE = Checked("queue", validation.queue)
KEY = Checked("key", lambda text: validation.text(text, "a correlation key"))
REASON = Checked("text", lambda text: validation.text(text, "the reason", 16_384))
SECONDS = Checked("seconds", _seconds)
INTERVAL = Checked("seconds", _interval)
MOMENT = Checked("time", _moment)
SECONDS_OR_MOMENT = Checked("seconds or time", _seconds_or_moment)
JSON_ARRAY = Checked("json", _json(list, "a JSON array like '[1, \"two\"]'"))
JSON_OBJECT = Checked("json", _json(dict, "a JSON object like '{\"n\": 1}'"))
JSON = Checked("json", _json(object, "JSON"))
GRANT = Checked("grant", _grant)
SIGNAL = Checked("name", _name)
DEDUP_KEY = Checked("key", _dedup_key)
BYTES = Checked("size", _bytes)
SCHEDULE = Checked("name", lambda text: validation.text(text, "a schedule's name"))
PREFETCH = Checked("auto|n", _prefetch)
AUTOSCALE = Checked("min,max", _autoscale)
CONCURRENCY = Checked("n|auto", concurrency)
AGEING = Checked("seconds|off", ageing)
NAME = Checked("name", _worker_name)
