"""Signature: a call yet to be made, and calls put together: chain, group, chord. Plain data with methods.

    add.s(2, 2)                              one call
    chain(add.s(2, 2), double.s())           or add.s(2, 2) | double.s(): a result goes in front of the next's arguments
    group(add.s(n, n) for n in range(10))    side by side; the result is the list, in order
    chord(header, total.s())                 or group(...) | total.s()

A signature is a dict, so that it can be stored, and passed as an argument; `app.signature(...)` makes one of a dict.
Nothing here knows how it is run: that is its `home`, the app.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from typing import Any, Protocol, cast

from durable.errors import DefinitionError, ValidationError
from durable.insertion import InsertOptions
from durable.instance import NewInstance
from durable.outcomes import MAX_CHILDREN
from durable.result import AsyncResult
from durable.validation import near, shown

ON_ERROR = ("fail", "pass")
OPTIONS = {"countdown": "schedule_in", "eta": "schedule_at", **{own.name: own.name for own in fields(InsertOptions)}}
"""Options a signature may carry, and what `insert` calls them."""
REMEDIES = {
    "link": "chain the signatures: first.s() | then.s()",
    "link_error": "give the task a base class with on_failure, or the group on_error='pass'",
    "chord": "write chord(header, body)",
    "task_id": "ids are the database's; a name of your own is correlation_key",
    "routing_key": "give queue",
    "exchange": "give queue",
    "retries": "an instance counts its attempts itself",
    "shadow": "give the task that name, or a correlation_key",
    "ignore_result": "give it to @app.task",
    "serializer": "give it to @app.task",
    "compression": "set it for the app",
}


class Home(Protocol):
    """What a signature needs of the app."""

    def row(self, signature: Signature, options: Mapping[str, Any]) -> NewInstance: ...
    def start(
        self, signature: Signature, connection: Any, notify: bool, timeout: float | None = None
    ) -> AsyncResult[Any]: ...
    async def astart(
        self, signature: Signature, connection: Any, notify: bool, timeout: float | None = None
    ) -> AsyncResult[Any]: ...
    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any: ...


class Signature(dict[str, Any]):
    """A task with its arguments, a chain or a group of signatures; made by `task.s()`, `chain` and their kin.

    kind     "task": with task (its name), args, kwargs, immutable; "chain", "group": with parts
    options  of its insert: queue, countdown, ...
    """

    def __init__(self, data: Mapping[str, Any], home: Home | None = None) -> None:
        super().__init__(_checked(data))
        self.home = home

    @property
    def kind(self) -> str:
        """task, chain or group."""
        return str(self["kind"])

    def clone(self, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Signature:
        """Return a copy; `args` go before its own, `kwargs` and options over its own; immutable ones take options only.

        A chain hands the arguments to its first part, a group to every one.
        """
        new = Signature(self, self.home)
        new["options"] = {**self["options"], **_options(options)}
        args, kwargs = list(args), dict(kwargs or {})
        if self.kind == "task":
            if not self["immutable"]:
                new["args"] = [*args, *self["args"]]
                new["kwargs"] = {**self["kwargs"], **kwargs}
        elif args or kwargs:
            new["parts"] = [
                part.clone(args, kwargs) if self.kind == "group" or index == 0 else part
                for index, part in enumerate(self["parts"])
            ]
        return new

    def set(self, immutable: bool | None = None, **options: Any) -> Signature:
        """Put options on it, and return it. Raises ValidationError for an unknown one, naming what to do instead."""
        self["options"] = {**self["options"], **_options(options)}
        if immutable is not None:
            self["immutable"] = immutable
        return self

    def apply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Enqueue it, the arguments added as `clone` does; return the handle on the whole.

        Raises UnknownTaskError for any task in it that is not registered, TypeError for arguments that don't fit one,
        and what `task.apply_async` raises; nothing is written then.
        """
        whole = self.clone(args, kwargs, **options)
        return self._at_home().start(whole, connection, notify_in_transaction, timeout)

    async def aapply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """`apply_async` for coroutines."""
        whole = self.clone(args, kwargs, **options)
        return await self._at_home().astart(whole, connection, notify_in_transaction, timeout)

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """`apply_async` with arguments only."""
        return self.apply_async(args, kwargs)

    async def adelay(self, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """`delay` for coroutines."""
        return await self.aapply_async(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A task's: call the function here and now. A chain's, group's or chord's: enqueue it, return the handle."""
        whole = self.clone(args, kwargs)
        if self.kind != "task":
            return whole.apply_async()
        return self._at_home().call(whole["task"], whole["args"], whole["kwargs"])

    def group(self) -> Signature:
        """Return it as a group; what `task.chunks()` returns is one already."""
        return self if self.kind == "group" else group(self)

    def new(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> NewInstance:
        """Return the checked row for it; `options` are those of `insert`."""
        return self._at_home().row(self.clone(args, kwargs), options)

    def _at_home(self) -> Home:
        if self.home is None:
            raise DefinitionError(f"{self!r} belongs to no app: make it with app.signature(...) or task.s(...)")
        return self.home

    def __or__(self, other: Any) -> Signature:  # type: ignore[override]
        return chain(self, other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Any) -> Signature:  # type: ignore[override]
        return chain(other, self) if isinstance(other, Mapping) else NotImplemented

    def __invert__(self) -> Any:
        """`~signature`: enqueue it and wait for the result."""
        return self.apply_async().get()

    def __repr__(self) -> str:
        if self.kind == "task":
            shown_args = [repr(value) for value in self["args"]]
            shown_args += [f"{name}={value!r}" for name, value in self["kwargs"].items()]
            return f"{self['task']}({', '.join(shown_args)})"
        return f"{self.kind}({', '.join(map(repr, self['parts']))})"


def signature(
    target: Any,
    args: Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    immutable: bool = False,
    home: Home | None = None,
    **options: Any,
) -> Signature:
    """Return the signature of a task or the task of that name, or the one that a dict is."""
    if isinstance(target, Mapping):
        return Signature(target, home or getattr(target, "home", None)).clone(args, kwargs, **options)
    data = {
        "kind": "task",
        "task": target if isinstance(target, str) else target.name,
        "args": list(args),
        "kwargs": dict(kwargs or {}),
        "options": _options(options),
        "immutable": immutable,
    }
    return Signature(data, home or getattr(target, "home", None))


def chain(*parts: Any) -> Signature:
    """Return signatures to be run one after another: `chain(a.s(1), b.s())` or `chain([a.s(1), b.s()])`.

    Each one's result goes in front of the next one's arguments, unless that is immutable (`.si()`). It stops at the
    first that fails, and fails with that error.
    """
    steps: list[Signature] = []
    for part in _several(parts, "chain"):
        # A chain within loses nothing by being taken apart, unless it has options of its own.
        steps += part["parts"] if part.kind == "chain" and not part["options"] else [part]
    return Signature({"kind": "chain", "parts": steps, "options": {}}, _home(steps))


def group(*parts: Any, on_error: str = "fail") -> Signature:
    """Return signatures to be run side by side; the result is the list of theirs, in order.

    on_error  "fail": when all have ended, the whole fails if one of them did, naming those
              "pass": it never does; a part that failed has {"failed": {"id", "type", "message"}} in the list
    """
    members = _several(parts, "group")
    return Signature({"kind": "group", "parts": members, "options": {}, "on_error": on_error}, _home(members))


class Header:
    """A chord that lacks its body: `chord(header)(body)` runs it."""

    def __init__(self, header: Signature) -> None:
        self._header = header

    def __call__(self, body: Any, **options: Any) -> AsyncResult[Any]:
        """Enqueue the header with this body; return the handle on the whole."""
        return chain(self._header, body).apply_async(**options)

    def __or__(self, body: Any) -> Signature:
        return chain(self._header, body)


def chord(header: Any, body: Any = None, *, on_error: str = "fail") -> Any:
    """Return a group whose list of results is handed to `body`: `chord(header, body)`, or `chord(header)(body)` to run.

    on_error  as in `group`: "fail" ends it, when all of the header have ended, without running the body
    """
    if isinstance(header, Mapping) and header.get("kind") == "group":
        first = Signature(header, getattr(header, "home", None))
        if on_error != "fail":
            first["on_error"] = _on_error(on_error)
    else:
        first = group(header, on_error=on_error)
    return Header(first) if body is None else chain(first, body)


def insert_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a signature's options under the names that `insert` has for them."""
    return {OPTIONS[name]: value for name, value in options.items() if value is not None}


def instead_of(name: str) -> str:
    """Return what to do instead of an option that an insert does not have, to be put behind a message."""
    return f"; {REMEDIES[name]}" if name in REMEDIES else near(name, OPTIONS)


def _several(parts: Sequence[Any], what: str) -> list[Signature]:
    if len(parts) == 1 and not isinstance(parts[0], Mapping) and isinstance(parts[0], Iterable):
        parts = list(parts[0])
    if len(parts) > MAX_CHILDREN:
        raise ValidationError(f"a {what} takes at most {MAX_CHILDREN:,} parts, got {len(parts):,}; use task.chunks()")
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise ValidationError(f"part {index} of a {what} is {shown(part)}, not a signature; write task.s(...)")
    return [Signature(part, getattr(part, "home", None)) for part in parts]


def _home(parts: Iterable[Signature]) -> Home | None:
    return next((part.home for part in parts if part.home is not None), None)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in OPTIONS:
            raise ValidationError(f"a signature has no option {name!r}{instead_of(name)}")
    return {name: value.total_seconds() if isinstance(value, timedelta) else value for name, value in options.items()}


def _on_error(value: Any) -> str:
    if value not in ON_ERROR:
        raise ValidationError(f"on_error must be 'fail' or 'pass', got {shown(value)}")
    return cast(str, value)


def _checked(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep enough copy of what a signature is, or raise ValidationError."""
    kind = data.get("kind")
    if kind == "task":
        name, args, kwargs = data.get("task"), data.get("args", ()), data.get("kwargs", {})
        if isinstance(name, str) and isinstance(args, list | tuple) and isinstance(kwargs, Mapping):
            return {
                "kind": "task",
                "task": name,
                "args": list(args),
                "kwargs": dict(kwargs),
                "options": _options(data.get("options", {})),
                "immutable": bool(data.get("immutable", False)),
            }
    elif kind in ("chain", "group") and isinstance(data.get("parts"), list | tuple):
        if kind == "chain" and not data["parts"]:
            raise ValidationError("a chain needs at least one part")
        parts = [Signature(part, getattr(part, "home", None)) for part in data["parts"]]
        checked = {"kind": kind, "parts": parts, "options": _options(data.get("options", {}))}
        return checked if kind == "chain" else {**checked, "on_error": _on_error(data.get("on_error", "fail"))}
    raise ValidationError(f"{shown(dict(data))} is no signature: make it with task.s(), chain(), group() or chord()")
