"""Periodic work as it is declared: `@app.periodic(...)`, and Celery's `beat_schedule`.

A declaration is a schedule and the row it inserts each time, encoded here and kept in the database: a beat inserts it
without knowing the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from durable import tracing, validation
from durable.config import Config
from durable.errors import ConfigError, DefinitionError, DurableError
from durable.insertion import InsertOptions, apply_options
from durable.instance import NewInstance, Payload
from durable.machine import Machine
from durable.schedules import MISFIRE, OVERLAP, Periodic, as_schedule
from durable.task import Task

D = TypeVar("D")

_TIMES = ("schedule_in", "schedule_at", "countdown", "eta", "connection", "on_conflict")
_CELERY = {"task", "schedule", "args", "kwargs", "options", "relative", "misfire", "overlap"}


class PeriodicWork:
    """The part of an app that declares periodic work."""

    conf: Config
    prepare: Callable[[Any, Mapping[str, Any]], NewInstance]
    """The app's: returns the checked row for a target."""

    def __init__(self) -> None:
        self._declared: dict[str, tuple[Any, ...]] = {}
        """Arguments of `_declare`, by name: payloads are encoded when all settings are set."""

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
            own = validation.text(default if name is None else name, "a schedule's name")
            _check_policy(misfire, overlap, options)
            given = (own, as_schedule(schedule), target, tuple(args), dict(kwargs or {}), misfire, overlap, options)
            _check_row(target, given[3], given[4], options)
            taken = self._declared.get(own)
            if taken is not None and _place(taken) != _place(given):  # equal: its module was merely imported again
                raise DefinitionError(f"schedule {own!r} is declared twice; give one of them name=...")
            self._declared[own] = given
            return target

        return declare

    def schedules(self) -> list[Periodic]:
        """Return everything declared, in code and in `conf.beat_schedule`. Raises ConfigError naming a wrong entry."""
        found, wrong = self.declared()
        if wrong:
            raise wrong[0]
        return found

    def declared(self) -> tuple[list[Periodic], list[ConfigError]]:
        """Return what is declared and right, and an error for each entry that is wrong."""
        found: dict[str, Periodic] = {}
        wrong: list[ConfigError] = []
        for name, given in self._declared.items():
            try:
                found[name] = self._declare(*given)
            except (DurableError, TypeError, ValueError) as error:
                wrong.append(ConfigError(f"schedule {name!r}: {error}"))
        for name, entry in (self.conf.beat_schedule or {}).items():
            if name in self._declared:
                wrong.append(ConfigError(f"beat_schedule: {name!r} is declared by @app.periodic too; rename one"))
                continue
            try:
                found[name] = self._from_celery(name, entry)
            except (DurableError, TypeError, ValueError) as error:
                wrong.append(ConfigError(f"beat_schedule, entry {name!r}: {error}"))
        return list(found.values()), wrong

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
        _check_policy(misfire, overlap, options)
        with tracing.declaring():
            new = self.prepare(target, {"args": tuple(args), "kwargs": kwargs, **options})
        if new.expires_at is not None:
            raise DefinitionError("expires must be a number of seconds: it counts from each occurrence")
        return Periodic(validation.text(name, "a schedule's name"), as_schedule(schedule), misfire, overlap, new)


def _unknown(given: Mapping[Any, Any]) -> Iterator[str]:
    yield from sorted(str(key) for key in given if key not in _CELERY)


def _check_policy(misfire: str, overlap: str, options: Mapping[str, Any]) -> None:
    if misfire not in MISFIRE:
        raise DefinitionError(f"misfire must be one of {', '.join(MISFIRE)}, got {validation.shown(misfire)}")
    if overlap not in OVERLAP:
        raise DefinitionError(f"overlap must be one of {', '.join(OVERLAP)}, got {validation.shown(overlap)}")
    for option in _TIMES:
        if option in options:
            raise DefinitionError(f"{option} makes no sense for periodic work: its schedule says when")


def _check_row(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise what preparing the row would, without encoding anything: settings may still change."""
    if isinstance(target, Task):
        target.check_arguments(args, kwargs)
    elif args:
        raise TypeError(f"{target.definition.name}: a machine's state is built from keyword arguments")
    elif options.get("state") is None:
        target.definition.state_type.build(dict(kwargs))
    known = {field.name for field in fields(InsertOptions)}
    row = NewInstance("", Payload("", b""), trace="")
    apply_options(row, InsertOptions(**{name: value for name, value in options.items() if name in known}))
    if row.expires_at is not None:
        raise DefinitionError("expires must be a number of seconds: it counts from each occurrence")
    for name in options:
        if name not in known and (isinstance(target, Task) or name not in ("state", "step")):
            raise DefinitionError(f"unknown option {name!r}{validation.near(name, known)}")


def _place(given: tuple[Any, ...]) -> tuple[Any, ...]:
    name, schedule, target, *rest = given
    return (name, schedule, target.name if isinstance(target, Task) else target.definition.name, *rest)
