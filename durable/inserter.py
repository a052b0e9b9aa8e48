"""Inserting prepared rows: their limits are checked first, wake-ups and Celery's publishing signals go around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from durable.celery_signals import after_task_publish, before_task_publish
from durable.errors import UnknownTaskError, ValidationError
from durable.instance import NewInstance
from durable.limit_rows import LimitRows
from durable.storage import instances
from durable.validation import call_timeout
from durable.wakeups import Wakeups
from durable.writer import Write, Writer

Decode = Callable[[str, bytes, str], Any]


class Inserter:
    """Inserts for one app; `connection` is the caller's, or None."""

    def __init__(self, writer: Writer, wakeups: Wakeups, limits: LimitRows, decode: Decode) -> None:
        self._writer = writer
        self._limits = limits
        self._wakeups = wakeups
        self._decode = decode

    def insert(self, new: NewInstance, connection: Any, notify: bool, timeout: float | None = None) -> int:
        """Insert one row; return its id."""
        self._before((new,))
        instance_id = self._writer.write(self._one(new, timeout), connection, notify)
        self._after((new,), (instance_id,))
        return instance_id

    async def ainsert(self, new: NewInstance, connection: Any, notify: bool, timeout: float | None = None) -> int:
        """`insert` for coroutines."""
        self._before((new,))
        instance_id = await self._writer.awrite(self._one(new, timeout), connection, notify)
        self._after((new,), (instance_id,))
        return instance_id

    def insert_many(
        self, batch: Sequence[NewInstance], connection: Any, notify: bool, timeout: float | None = None
    ) -> list[int | None]:
        """Insert rows in one transaction; return an id per row, None where the key was occupied."""
        self._before(batch)
        ids = self._writer.write(self._many(batch, timeout), connection, notify) if batch else []
        self._after(batch, ids)
        return ids

    async def ainsert_many(
        self, batch: Sequence[NewInstance], connection: Any, notify: bool, timeout: float | None = None
    ) -> list[int | None]:
        """`insert_many` for coroutines."""
        self._before(batch)
        ids = await self._writer.awrite(self._many(batch, timeout), connection, notify) if batch else []
        self._after(batch, ids)
        return ids

    def _one(self, new: NewInstance, timeout: float | None) -> Write[int]:
        return Write(
            lambda: self._limits.before((new,), instances.insert(new)),
            lambda instance_id: self._wakeups.after_insert((new,), (instance_id,)),
            lambda _: self._wakeups.in_transaction((new,)),
            atomic=False,
            timeout=call_timeout(timeout),
        )

    def _many(self, batch: Sequence[NewInstance], timeout: float | None) -> Write[list[int | None]]:
        return Write(
            lambda: self._limits.before(batch, instances.insert_many(batch)),
            lambda ids: self._wakeups.after_insert(batch, ids),
            lambda _: self._wakeups.in_transaction(batch),
            timeout=call_timeout(timeout),
        )

    def _before(self, batch: Sequence[NewInstance]) -> None:
        if before_task_publish.receivers:
            for new in batch:
                before_task_publish.send(
                    new.machine, **self._published(new, None), properties={}, declare=[], retry_policy={}
                )

    def _after(self, batch: Sequence[NewInstance], ids: Sequence[int | None]) -> None:
        if after_task_publish.receivers:
            for new, instance_id in zip(batch, ids, strict=True):
                if instance_id is not None:
                    after_task_publish.send(new.machine, **self._published(new, instance_id))

    def _published(self, new: NewInstance, instance_id: int | None) -> dict[str, Any]:
        state = self._decode(*new.state, "state")
        return {
            "body": (state.get("args", []), state.get("kwargs", {}), {}),
            "exchange": "",
            "routing_key": new.queue,
            "headers": {"task": new.machine, "id": instance_id},
        }


def prepare_many(
    prepare: Callable[[Any, Mapping[str, Any]], NewInstance], targets: Iterable[tuple[Any, Mapping[str, Any]]]
) -> list[NewInstance]:
    """Return the checked rows of `insert_many`. Raises ValidationError naming the index of a bad one."""
    prepared = []
    for index, entry in enumerate(targets):
        try:
            target, options = entry
            prepared.append(prepare(target, options))
        except (ValidationError, UnknownTaskError, TypeError, ValueError) as error:
            raise ValidationError(f"insert_many, entry {index}: {error}") from error
    return prepared
