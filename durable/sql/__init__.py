"""All SQL of the package, as named statements in the `.sql` files beside this one.

A statement starts with `-- name: words_in_snake_case`, followed by comments that say its parameters, its rows and its
locks, and is whole: nothing is pasted together. `{schema}` stands for the app's schema, and this loader is the one
place that puts it in. Parameters are psycopg's named ones; comments must hold no percent sign.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from durable.errors import DurableError

_NAME = re.compile(r"^-- name: ([a-z_]+)$", re.MULTILINE)


def packaged(folder: str = "") -> list[Traversable]:
    """Return the files beside this one, or in a folder there, by name. Raises DurableError where there are none."""
    place = files(__name__) / folder
    try:
        return sorted(place.iterdir(), key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise DurableError(
            f"durable's SQL is missing, it should be in {place}; a frozen app takes it along: "
            "pyinstaller --collect-all durable --collect-submodules durable_cli"
        ) from error


@cache
def _texts() -> dict[str, str]:
    texts: dict[str, str] = {}
    for file in packaged():
        if not file.name.endswith(".sql"):
            continue
        parts = _NAME.split(file.read_text(encoding="utf-8"))[1:]
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            if name in texts:
                raise RuntimeError(f"statement {name!r} is defined twice (second time in {file.name})")
            texts[name] = text.strip().rstrip(";")
    return texts


def quote_identifier(name: str) -> str:
    """Return `name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Return `text` as a quoted SQL literal, for a server with standard_conforming_strings."""
    return "'" + text.replace("'", "''") + "'"


class Statements:
    """The statements of one schema, by name; each text is made once."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._quoted = quote_identifier(schema)
        self._made: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        text = self._made.get(name)
        if text is None:
            text = self._made[name] = self.render(_texts()[name])
        return text

    def render(self, text: str) -> str:
        """Return `text` with the schema put in."""
        return text.replace("{schema}", self._quoted)

    @staticmethod
    def names() -> list[str]:
        """Return the name of every statement."""
        return list(_texts())
