"""Periodic work: when it is due (cron expressions in a time zone, intervals), and what is inserted. No database.

What happens when clocks change is Debian cron's rule, which cronsim implements:

* A fixed time (neither minute nor hour begins with `*`) that does not exist on that day is due at the first moment
  after the gap; one that exists twice is due once, the first time.
* An expression with `*` in its minute or hour goes by elapsed time: it skips what does not exist, and is due in both of
  the hours that come twice.
* Intervals know no time zone: they are multiples of their length since 1970 in UTC, whoever computes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from durable import tracing
from durable.errors import DefinitionError
from durable.instance import NewInstance, Payload
from durable.validation import MAX_DELAY, shown

MISFIRE = ("once", "skip", "all")
OVERLAP = ("allow", "skip")
LEAST_INTERVAL = 0.1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_WEEK = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_WEEKDAY = re.compile(r"\b(sun|mon|tue|wed|thu|fri|sat)[a-z]*day\b")
_EVERY = re.compile(r"every (\d+) us")


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression of five fields, in a time zone."""

    expression: str
    tz: str = "UTC"

    def __post_init__(self) -> None:
        zone = _zone(self.tz)
        if len(self.expression.split()) != 5:
            raise DefinitionError(
                f"crontab {self.expression!r} must have five fields: minute, hour, day of month, month, day of week"
            )
        try:
            CronSim(self.expression, datetime(2000, 1, 1, tzinfo=zone))
        except CronSimError as error:
            raise DefinitionError(f"crontab {self.expression!r}: {str(error).lower()}") from error

    @property
    def text(self) -> str:
        """What is stored; `parse` reads it."""
        return self.expression

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first occurrence after a moment, in UTC; None when there is none within fifty years."""
        # Asked within the second pass of an hour that comes twice, cronsim names times of the first pass before those
        # that really follow.
        for found in CronSim(self.expression, moment.astimezone(_zone(self.tz))):
            occurrence = found.astimezone(UTC)
            if occurrence > moment:
                return occurrence
        return None


@dataclass(frozen=True, slots=True)
class Every:
    """A fixed interval in seconds."""

    seconds: float
    tz: str = "UTC"

    @property
    def text(self) -> str:
        """What is stored; `parse` reads it."""
        return f"every {round(self.seconds * 1_000_000)} us"

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first occurrence after a moment, in UTC."""
        period = round(self.seconds * 1_000_000)
        passed = (moment - _EPOCH) // _MICROSECOND
        return _EPOCH + (passed // period + 1) * period * _MICROSECOND


Schedule = Cron | Every


@dataclass(frozen=True, slots=True)
class Periodic:
    """One declaration.

    misfire  what happens to occurrences that were missed by more than a minute: "once" makes up for them with one,
             "all" with one each, "skip" not at all
    overlap  "skip" leaves an occurrence out while the instance of the one before is not finished
    new      the row to insert
    """

    name: str
    schedule: Schedule
    misfire: str
    overlap: str
    new: NewInstance


def template(new: NewInstance) -> dict[str, Any]:
    """Return a row without its payload, as JSON keeps it: what differs from the defaults."""
    values = {name: getattr(new, name) for name in new.__struct_fields__ if name != "state"}
    with tracing.declaring():
        defaults = NewInstance(new.machine, new.state)
    return {name: value for name, value in values.items() if value != getattr(defaults, name) or name == "machine"}


def from_template(values: Mapping[str, Any], state: Payload) -> NewInstance:
    """Return the row again. Raises TypeError for one that newer code has written."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return NewInstance(state=state, **values)


def parse(text: str, tz: str) -> Schedule:
    """Return a stored schedule. Raises DefinitionError for one that newer code has written."""
    match = _EVERY.fullmatch(text)
    return Every(int(match[1]) / 1_000_000, tz) if match else Cron(text, tz)


def every(interval: float | timedelta) -> Every:
    """Return an interval, in seconds or as a timedelta: due at its multiples since 1970, so every(3600) on the hour.

    Raises DefinitionError for less than a tenth of a second, or more than ten years.
    """
    seconds = interval.total_seconds() if isinstance(interval, timedelta) else interval
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not LEAST_INTERVAL <= seconds <= MAX_DELAY:
        raise DefinitionError(f"every() takes from {LEAST_INTERVAL} seconds to ten years, got {shown(interval)}")
    return Every(float(seconds))


def crontab(
    minute: Any = "*",
    hour: Any = "*",
    day_of_month: Any = "*",
    month_of_year: Any = "*",
    day_of_week: Any = "*",
    *,
    tz: str = "UTC",
) -> Cron:
    """Return a cron schedule: `crontab(minute=0, hour="*/3", day_of_week="mon-fri")`, or `crontab("0 9 * * 1")`.

    Fields are numbers, cron's text, or collections of numbers; Sunday is 0 or 7. tz is the name of a time zone.
    Raises DefinitionError for what no cron understands.
    """
    if isinstance(minute, str) and len(minute.split()) > 1:
        if (hour, day_of_month, month_of_year, day_of_week) != ("*", "*", "*", "*"):
            raise DefinitionError(
                f"crontab({minute!r}, ...): give one expression of five fields, or the fields by name"
            )
        return Cron(" ".join(minute.split()), tz)
    if day_of_month != "*" and day_of_week != "*":
        raise DefinitionError(
            "crontab with day_of_month and day_of_week: Celery means days that are both, cron days that are either; "
            "write the expression, crontab('0 0 13 * 5'), for cron's meaning, or look at the date in the task"
        )
    fields = {
        "minute": minute,
        "hour": hour,
        "day_of_month": day_of_month,
        "month_of_year": month_of_year,
        "day_of_week": day_of_week,
    }
    return Cron(" ".join(_field(name, value) for name, value in fields.items()), tz)


def as_schedule(value: Any) -> Schedule:
    """Return a schedule from what Celery's `beat_schedule` takes: one of ours, seconds, or a timedelta."""
    return value if isinstance(value, Cron | Every) else every(value)


def _field(name: str, value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return _weekdays("".join(value.split()).lower()) if name == "day_of_week" else "".join(value.split())
    values = [value] if isinstance(value, int) else list(value) if isinstance(value, Iterable) else []
    if isinstance(value, str) or not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise DefinitionError(f"crontab's {name} must be a number, cron's text or numbers, got {shown(value)}")
    return ",".join(str(v) for v in sorted(values))


def _weekdays(text: str) -> str:
    """Return cron's text for Celery's: full names become their first three letters, `fri-mon` the days themselves."""
    parts = []
    for part in _WEEKDAY.sub(lambda match: match[1], text).split(","):
        ends = [
            _WEEK.index(day) if day in _WEEK else int(day) for day in part.split("-") if day in (*_WEEK, *"0123456")
        ]
        wraps = part.count("-") == 1 and len(ends) == 2 and ends[1] < ends[0]
        parts.append(",".join(str(day) for day in range(7) if day <= ends[1] or day >= ends[0]) if wraps else part)
    return ",".join(parts)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError, TypeError) as error:
        raise DefinitionError(f"unknown time zone {shown(name)}; give a name like 'Europe/Berlin'") from error
