"""The children of an instance as its parent, or whoever holds its result, reads them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import msgspec

from durable.storage.session import Row

PAGE = 500
"""Children read in the first statement; the next reads as many as PAGE_BYTES hold if they are like those."""
LARGEST_PAGE = 10_000
PAGE_BYTES = 4_000_000
"""States and results, which may take a megabyte each."""


class Child(msgspec.Struct, frozen=True):
    """A child as its parent sees it. `error` is {"type", "message", "traceback"} unless it ended `done`."""

    id: int
    machine: str
    status: str
    state: Any
    result: Any
    error: dict[str, Any] | None


def child_of(row: Sequence[Any], decode: Callable[[str, bytes, str], Any]) -> Child:
    """Return a child from its row as `children` reads it. Raises CorruptRowError for a payload not accepted."""
    child_id, machine, status, state_type, state, result_type, result, error = row
    return Child(
        child_id,
        machine,
        status,
        decode(state_type, state, f"state of instance {child_id}"),
        None if result_type is None else decode(result_type, result, f"result of instance {child_id}"),
        error,
    )


class Children(Sequence[Child]):
    """Children by id. Iterating reads them in pages; `len` and indexing read them all, once."""

    def __init__(self, read: Callable[[int, int], list[Row]], decode: Callable[[str, bytes, str], Any]) -> None:
        self._read = read
        self._decode = decode
        self._all: list[Child] | None = None

    def __iter__(self) -> Iterator[Child]:
        if self._all is not None:
            yield from self._all
            return
        after, limit = 0, PAGE
        while page := self._read(after, limit):
            for row in page:
                yield child_of(row, self._decode)
            if len(page) < limit:
                break
            after, limit = page[-1][0], _next_limit(page, limit)

    def _everything(self) -> list[Child]:
        if self._all is None:
            self._all = [child for child in self]  # noqa: C416 - list() would ask for the length first
        return self._all

    def __len__(self) -> int:
        return len(self._everything())

    def __getitem__(self, index: Any) -> Any:
        return self._everything()[index]


async def acollect(
    read: Callable[[int, int], Awaitable[list[Row]]], decode: Callable[[str, bytes, str], Any]
) -> list[Child]:
    """Return all children by id, read in pages by `read(after, limit)`. Raises CorruptRowError as `child_of`."""
    found: list[Child] = []
    after, limit = 0, PAGE
    while page := await read(after, limit):
        found += [child_of(row, decode) for row in page]
        if len(page) < limit:
            break
        after, limit = page[-1][0], _next_limit(page, limit)
    return found


def _next_limit(page: Sequence[Row], limit: int) -> int:
    size = sum(len(row[4]) + len(row[6] or b"") for row in page)
    return max(PAGE, min(LARGEST_PAGE, PAGE_BYTES * limit // max(size, 1)))
