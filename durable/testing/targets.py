"""Which instance a test means: an id, a correlation key, or a result."""

from __future__ import annotations

from typing import Any

from durable import validation
from durable.app import Durable
from durable.errors import NotFoundError
from durable.result import AsyncResult
from durable.storage import testing

Target = int | str | AsyncResult[Any]


def find(app: Durable, target: Target) -> int:
    """Return the id. A correlation key means who occupies it, else who had it last. Raises NotFoundError."""
    if isinstance(target, AsyncResult):
        return target.id
    if isinstance(target, str):
        found = app.run(testing.newest_of_key(validation.text(target, "correlation_key")))
        if found is None:
            raise NotFoundError(f"there is no instance with correlation key {target!r}")
        return found
    return validation.instance_id(target)
