"""A machine's state: between plain data and the type its class declares.

`State` may be absent (a plain dict), a dataclass, a TypedDict, an attrs class, a msgspec Struct or a pydantic model.
msgspec converts and validates all but the last, for which pydantic itself does when it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec

from durable.errors import ValidationError
from durable.validation import near

# What the payload's serializer writes and restores itself must reach it as it is.
_KEPT_TYPES = (bytes,)


class StateType:
    """Converts one machine's state; `type` None means a plain dict."""

    def __init__(self, type_: type[Any] | None, machine: str) -> None:
        self.type = type_
        self._machine = machine
        self._load: Callable[[Any], Any]
        self._dump: Callable[[Any], Any]
        if type_ is None:
            self._load = self._dump = _plain
        elif _is_pydantic(type_):
            self._load = type_.model_validate
            self._dump = lambda value: value.model_dump(mode="json")
        else:
            self._load = lambda data: msgspec.convert(data, type_, strict=True, str_keys=True)
            self._dump = lambda value: msgspec.to_builtins(value, builtin_types=_KEPT_TYPES, str_keys=True)

    def build(self, arguments: dict[str, Any]) -> Any:
        """Return plain data for a state given as keyword arguments, checked. Raises TypeError, ValidationError."""
        if self.type is not None:
            known = set(getattr(self.type, "model_fields", None) or get_type_hints(self.type))
            unknown = sorted(set(arguments) - known)
            if unknown:
                raise TypeError(f"{self._machine}: the state has no field {unknown[0]!r}{near(unknown[0], known)}")
        return self.dump(self.load(arguments))

    def load(self, data: Any) -> Any:
        """Return the state object for plain data. Raises ValidationError naming the field that doesn't fit."""
        try:
            return self._load(data)
        except Exception as error:  # constructors, `__post_init__` and validators raise whatever they like
            raise ValidationError(f"state of {self._machine}: {_without_values(error)}") from error

    def dump(self, state: Any) -> Any:
        """Return plain data for a state object. Raises ValidationError for a state of another type."""
        if self.type is not None and not self._fits(state):
            raise ValidationError(
                f"state of {self._machine} must be a {self.type.__name__}, got {type(state).__name__}"
            )
        try:
            return self._dump(state)
        except (TypeError, ValueError) as error:
            raise ValidationError(f"state of {self._machine}: {error}") from error

    def _fits(self, state: Any) -> bool:
        if self.type is not None and isinstance(state, dict) and issubclass(self.type, dict):
            return True  # a TypedDict is a dict at run time
        return self.type is not None and not issubclass(self.type, dict) and isinstance(state, self.type)


def _plain(state: Any) -> Any:
    if not isinstance(state, dict):
        raise TypeError(f"expected a dict, got {type(state).__name__}")
    return state


def _without_values(error: Exception) -> str:
    """Return what is wrong with a state. pydantic's own text quotes the values, which must not get into a log."""
    module = sys.modules.get("pydantic")
    if module is None or not isinstance(error, module.ValidationError):
        expected = isinstance(error, msgspec.ValidationError | ValueError | TypeError)
        return str(error) if expected else f"{type(error).__name__}: {error}"
    found = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(f"{entry['msg']} - at `$.{'.'.join(map(str, entry['loc']))}`" for entry in found)


def _is_pydantic(type_: type[Any]) -> bool:
    module = sys.modules.get("pydantic")  # a pydantic model cannot exist before pydantic was imported
    return module is not None and isinstance(type_, type) and issubclass(type_, module.BaseModel)
