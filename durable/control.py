"""Steering instances that are already there: cancelling by id or correlation key, retrying what failed, signalling."""

from __future__ import annotations

from typing import Any

import psycopg

from durable import validation
from durable.errors import DuplicateError
from durable.instance import NewSignal
from durable.storage import instances, signals
from durable.storage.instances import Cancelled
from durable.storage.session import Operation
from durable.wakeups import Wakeups
from durable.writer import Write, Writer


class Control:
    """Does what the app's methods of the same names say."""

    def __init__(self, writer: Writer, wakeups: Wakeups) -> None:
        self._writer = writer
        self._wakeups = wakeups

    def cancel(self, target: int | str, reason: str | None, cascade: bool, terminate: bool) -> bool:
        """Return whether there was anything to cancel."""
        return self._writer.write(self._cancelling(target, reason, cascade, terminate)).found

    async def acancel(self, target: int | str, reason: str | None, cascade: bool, terminate: bool) -> bool:
        """`cancel` for coroutines."""
        return (await self._writer.awrite(self._cancelling(target, reason, cascade, terminate))).found

    def retry(self, instance_id: int) -> bool:
        """Return whether it was failed. Raises DuplicateError."""
        write = self._retrying(instance_id)
        try:
            return self._writer.write(write) is not None
        except psycopg.errors.UniqueViolation as error:
            raise DuplicateError(*self._writer.write(_asking_rival(instance_id))) from error

    async def aretry(self, instance_id: int) -> bool:
        """`retry` for coroutines."""
        write = self._retrying(instance_id)
        try:
            return (await self._writer.awrite(write)) is not None
        except psycopg.errors.UniqueViolation as error:
            raise DuplicateError(*await self._writer.awrite(_asking_rival(instance_id))) from error

    def _cancelling(self, target: int | str, reason: str | None, cascade: bool, terminate: bool) -> Write[Cancelled]:
        text = "cancelled" if reason is None else validation.text(reason, "reason", 16_384)
        if isinstance(target, str):
            operation = _cancel_key(validation.text(target, "correlation_key"), text, cascade, terminate)
        else:
            operation = instances.cancel(validation.instance_id(target), text, cascade, terminate)

        def wakeups(done: Cancelled) -> list[Operation[Any]]:
            killing = self._wakeups.terminations() if terminate and done.running else []
            return [*self._wakeups.became_ready(done.woken), *killing]

        return Write(operation, wakeups, lambda _: ())

    def _retrying(self, instance_id: int) -> Write[dict[str, int] | None]:
        operation = instances.retry_failed(validation.instance_id(instance_id))
        return Write(operation, lambda ready: self._wakeups.became_ready(ready or {}), lambda _: (), atomic=False)


def _cancel_key(key: str, reason: str, cascade: bool, terminate: bool) -> Operation[Cancelled]:
    instance_id = yield from instances.occupant(key)
    if instance_id is None:
        return Cancelled()
    return (yield from instances.cancel(instance_id, reason, cascade, terminate))


def _asking_rival(instance_id: int) -> Write[tuple[str, int | None]]:
    return Write(instances.rival(instance_id), lambda _: (), lambda _: (), atomic=False)


def delivering(batch: list[NewSignal], wakeups: Wakeups) -> Write[signals.Delivery]:
    """Return the write of signals to instances."""
    return Write(
        signals.deliver(batch),
        lambda done: wakeups.became_ready(done.ready),
        lambda done: wakeups.any_queue() if done.ready else (),
        atomic=signals.may_repeat(batch),
    )
