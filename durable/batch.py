"""`with app.batch():` groups the `.delay()` calls of a block into one statement."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, cast

from durable.errors import DuplicateError, ValidationError
from durable.instance import NewInstance
from durable.result import AsyncResult, ResultSource

_current: ContextVar[Batch | None] = ContextVar("durable_batch", default=None)


class BatchInserter(ResultSource, Protocol):
    """What a batch needs of the app: insert rows in one transaction, None for those whose key was occupied."""

    def insert_rows(self, batch: Sequence[NewInstance], connection: Any) -> list[int | None]: ...
    async def ainsert_rows(self, batch: Sequence[NewInstance], connection: Any) -> list[int | None]: ...


def collecting(app: BatchInserter) -> Batch | None:
    """Return the batch of this app that the calling code is inside of, or None."""
    batch = _current.get()
    return batch if batch is not None and batch.app is app else None


class Batch:
    """Collects `.delay()` calls and inserts them together when the block ends.

    duplicates  results of those that were dropped because their correlation key was occupied
    """

    def __init__(self, app: BatchInserter, connection: Any) -> None:
        self.app = app
        self.duplicates: list[AsyncResult[Any]] = []
        self._connection = connection
        self._rows: list[NewInstance] = []
        self._results: list[AsyncResult[Any]] = []
        self._outer: Batch | None = None

    def add(self, new: NewInstance, timeout: float | None = None) -> AsyncResult[Any]:
        """Take one in and return the result that gets its id later. Raises ValidationError for its own `timeout`."""
        if timeout is not None:
            raise ValidationError(
                f"timeout={timeout!r} does not work inside app.batch(), whose rows are written when it ends; use "
                "insert_many(..., timeout=...), or the setting call_timeout"
            )
        result: AsyncResult[Any] = AsyncResult(None, self.app)
        self._rows.append(new)
        self._results.append(result)
        return result

    def __enter__(self) -> Batch:
        self._outer = _current.get()
        _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.set(self._outer)
        if kind is None:
            self._settle(self.app.insert_rows(self._rows, self._connection))

    async def __aenter__(self) -> Batch:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.set(self._outer)
        if kind is None:
            self._settle(await self.app.ainsert_rows(self._rows, self._connection))

    def _settle(self, ids: Sequence[int | None]) -> None:
        for new, result, instance_id in zip(self._rows, self._results, ids, strict=True):
            if instance_id is not None:
                result._settle(instance_id)
                continue
            key = cast(str, new.correlation_key)
            result._settle(None, lambda key=key: DuplicateError(key, None))  # type: ignore[misc]
            self.duplicates.append(result)
