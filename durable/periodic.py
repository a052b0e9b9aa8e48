"""Periodic work as it is declared: `@app.periodic(...)`, and Celery's `beat_schedule`.

A declaration is a schedule and the row it inserts each time, encoded here and kept in the database: a beat inserts it
without knowing the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from durable import tracing, validation
from durable.config import Config
from durable.errors import ConfigError, DefinitionError, DurableError
from durable.instance import NewInstance
from durable.machine import Machine
from durable.schedules import MISFIRE, OVERLAP, Periodic, as_schedule
from durable.task import Task

D = TypeVar("D")

_TIMES = ("schedule_in", "schedule_at", "countdown", "eta", "connection", "on_conflict")
_CELERY = {"task", "schedule", "args", "kwargs", "options", "relative", "misfire", "overlap"}


class PeriodicWork:
    """The part of an app that declares periodic work."""

    conf: Config

    def __init__(self) -> None:
        self._declared: dict[str, Periodic] = {}

    def prepare(self, target: Any, options: Mapping[str, Any]) -> NewInstance:
        """Return the checked row for a target; the app's."""
        raise NotImplementedError

    def periodic(
        self,
        schedule: Any,
        *,
        name: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        misfire: str = "once",
        overlap: str = "allow",
        **options: Any,
    ) -> Callable[[D], D]:
        """Run a task or machine on a schedule: `@app.periodic(crontab(hour=3))` above its `@app.task`.

        schedule  crontab(...), every(...), seconds or a timedelta
        name      of the schedule; default the task's
        misfire, overlap  as in `Periodic`
        options   those of `app.insert`, but times and connection
        Raises DefinitionError, ValidationError, and TypeError for arguments that don't fit.
        """

        def declare(target: D) -> D:
            if not isinstance(target, Task) and not (isinstance(target, type) and issubclass(target, Machine)):
                raise DefinitionError(
                    f"@app.periodic stands above @app.task or @app.machine, and got {validation.shown(target)}"
                )
            default = target.name if isinstance(target, Task) else target.definition.name
            entry = self._declare(
                default if name is None else name, schedule, target, args, kwargs, misfire, overlap, options
            )
            self._declared[entry.name] = entry
            return target

        return declare

    def schedules(self) -> list[Periodic]:
        """Return everything declared, in code and in `conf.beat_schedule`. Raises ConfigError naming a wrong entry."""
        found = dict(self._declared)
        for name, given in (self.conf.beat_schedule or {}).items():
            if name in found:
                raise ConfigError(f"beat_schedule: {name!r} is declared by @app.periodic too; rename one")
            try:
                found[name] = self._from_celery(name, given)
            except (DurableError, TypeError, ValueError) as error:
                raise ConfigError(f"beat_schedule, entry {name!r}: {error}") from error
        return list(found.values())

    def _from_celery(self, name: str, given: Any) -> Periodic:
        if not isinstance(given, Mapping):
            raise ConfigError(f"must be a mapping with 'task' and 'schedule', got {validation.shown(given)}")
        for key in _unknown(given):
            raise ConfigError(f"unknown key {key!r}{validation.near(key, _CELERY)}")
        if "task" not in given or "schedule" not in given:
            raise ConfigError("needs 'task' and 'schedule'")
        return self._declare(
            name,
            given["schedule"],
            given["task"],
            given.get("args", ()),
            given.get("kwargs"),
            given.get("misfire", "once"),
            given.get("overlap", "allow"),
            dict(given.get("options") or {}),
        )

    def _declare(
        self,
        name: str,
        schedule: Any,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        misfire: str,
        overlap: str,
        options: Mapping[str, Any],
    ) -> Periodic:
        if misfire not in MISFIRE:
            raise DefinitionError(f"misfire must be one of {', '.join(MISFIRE)}, got {validation.shown(misfire)}")
        if overlap not in OVERLAP:
            raise DefinitionError(f"overlap must be one of {', '.join(OVERLAP)}, got {validation.shown(overlap)}")
        for option in _TIMES:
            if option in options:
                raise DefinitionError(f"{option} makes no sense for periodic work: its schedule says when")
        with tracing.declaring():
            new = self.prepare(target, {"args": tuple(args), "kwargs": kwargs, **options})
        if new.expires_at is not None:
            raise DefinitionError("expires must be a number of seconds: it counts from each occurrence")
        return Periodic(validation.text(name, "a schedule's name"), as_schedule(schedule), misfire, overlap, new)


def _unknown(given: Mapping[Any, Any]) -> Iterator[str]:
    yield from sorted(str(key) for key in given if key not in _CELERY)
