"""Steering what is already there: cancelling by id or key, retrying what failed, signalling, pausing queues."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import psycopg

from durable import validation
from durable.errors import DuplicateError
from durable.instance import NewSignal
from durable.storage import control, instances, signals
from durable.storage.instances import Cancelled
from durable.storage.session import Operation
from durable.wakeups import Wakeups
from durable.writer import Write, Writer


class Control:
    """Does what the app's methods of the same names say."""

    def __init__(self, writer: Writer, wakeups: Wakeups) -> None:
        self._writer = writer
        self._wakeups = wakeups

    def cancel(
        self, target: int | str, reason: str | None, cascade: bool, terminate: bool, timeout: float | None = None
    ) -> bool:
        """Return whether there was anything to cancel."""
        marked = self._writer.write(self._marking(target, reason, terminate, timeout)) if cascade else None
        if cascade and marked is None:
            return False
        done = self._writer.write(self._cancelling(target, reason, marked, terminate, timeout))
        return done.found or (marked is not None and marked.cancelled.found)

    async def acancel(
        self, target: int | str, reason: str | None, cascade: bool, terminate: bool, timeout: float | None = None
    ) -> bool:
        """`cancel` for coroutines."""
        marked = await self._writer.awrite(self._marking(target, reason, terminate, timeout)) if cascade else None
        if cascade and marked is None:
            return False
        done = await self._writer.awrite(self._cancelling(target, reason, marked, terminate, timeout))
        return done.found or (marked is not None and marked.cancelled.found)

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

    def pause(self, queue: str, reason: str | None) -> bool:
        """Return whether it was not paused before."""
        return self._writer.write(self._pausing(queue, reason))

    async def apause(self, queue: str, reason: str | None) -> bool:
        """`pause` for coroutines."""
        return await self._writer.awrite(self._pausing(queue, reason))

    def resume(self, queue: str) -> bool:
        """Return whether it was paused."""
        return self._writer.write(self._resuming(queue))

    async def aresume(self, queue: str) -> bool:
        """`resume` for coroutines."""
        return await self._writer.awrite(self._resuming(queue))

    def _pausing(self, queue: str, reason: str | None) -> Write[bool]:
        text = None if reason is None else validation.text(reason, "reason", 16_384)
        name = validation.queue(queue)
        return self._ordering(lambda: control.pause(name, text))

    def _resuming(self, queue: str) -> Write[bool]:
        name = validation.queue(queue)
        return self._ordering(lambda: control.resume(name))

    def _ordering(self, operation: Callable[[], Operation[bool]]) -> Write[bool]:
        return Write(operation, lambda _: self._wakeups.orders(), lambda _: (), atomic=False)

    def _marking(
        self, target: int | str, reason: str | None, terminate: bool, timeout: float | None
    ) -> Write[_Marked | None]:
        operation = partial(_mark, _checked(target), _reason(reason), terminate)

        def wakeups(marked: _Marked | None) -> list[Operation[Any]]:
            return [] if marked is None else self._wakeups_of(marked.cancelled, terminate)

        return Write(operation, wakeups, lambda _: (), timeout=validation.call_timeout(timeout))

    def _wakeups_of(self, done: Cancelled, terminate: bool) -> list[Operation[Any]]:
        killing = self._wakeups.terminations() if terminate and done.running else []
        return [*self._wakeups.became_ready(done.woken), *killing]

    def _cancelling(
        self, target: int | str, reason: str | None, marked: _Marked | None, terminate: bool, timeout: float | None
    ) -> Write[Cancelled]:
        operation = partial(_cancel, _checked(target), _reason(reason), marked, terminate)
        return Write(
            operation,
            lambda done: self._wakeups_of(done, terminate),
            lambda _: (),
            timeout=validation.call_timeout(timeout),
        )

    def _retrying(self, instance_id: int) -> Write[dict[str, int] | None]:
        operation = partial(instances.retry_failed, validation.instance_id(instance_id))
        return Write(operation, lambda ready: self._wakeups.became_ready(ready or {}), lambda _: (), atomic=False)


class _Marked(NamedTuple):
    """The target of a cascading cancel, its mark, and what became of the target."""

    id: int
    mark: int
    cancelled: Cancelled


def _checked(target: int | str) -> int | str:
    if isinstance(target, str):
        return validation.text(target, "correlation_key")
    return validation.instance_id(target)


def _reason(reason: str | None) -> str:
    return "cancelled" if reason is None else validation.text(reason, "reason", 16_384)


def _mark(target: int | str, reason: str, terminate: bool) -> Operation[_Marked | None]:
    """Begin to cancel the tree of an instance, or of the one that occupies a key; None: there is none."""
    instance_id = (yield from instances.occupant(target)) if isinstance(target, str) else target
    if instance_id is None:
        return None
    return _Marked(instance_id, *(yield from instances.begin_cascade(instance_id, reason, terminate)))


def _cancel(target: int | str, reason: str, marked: _Marked | None, terminate: bool) -> Operation[Cancelled]:
    if marked is not None:
        return (yield from instances.cancel(marked.id, reason, True, terminate, marked.mark))
    instance_id = (yield from instances.occupant(target)) if isinstance(target, str) else target
    if instance_id is None:
        return Cancelled()
    return (yield from instances.cancel(instance_id, reason, False, terminate))


def _asking_rival(instance_id: int) -> Write[tuple[str, int | None]]:
    return Write(lambda: instances.rival(instance_id), lambda _: (), lambda _: (), atomic=False)


def delivering(batch: list[NewSignal], wakeups: Wakeups, timeout: float | None = None) -> Write[signals.Delivery]:
    """Return the write of signals to instances."""
    return Write(
        lambda: signals.deliver(batch),
        lambda done: wakeups.became_ready(done.ready),
        lambda done: wakeups.any_queue() if done.ready else (),
        atomic=signals.may_repeat(batch),
        timeout=validation.call_timeout(timeout),
    )


class Controllable(Protocol):
    """What `QueueControl` is mixed into."""

    @property
    def _control(self) -> Control: ...


class QueueControl:
    """The app's calls that steer queues."""

    def pause(self: Controllable, queue: str, reason: str | None = None) -> bool:
        """Have no step of a queue begin any more, by whatever worker, until `resume`; False when it was paused.

        Steps that run go on to their end, what is only claimed goes back to the queue. Inserts, signals, schedules and
        cancels work as ever. What a worker claims at this very moment may still be run.
        """
        return self._control.pause(queue, reason)

    async def apause(self: Controllable, queue: str, reason: str | None = None) -> bool:
        """`pause` for coroutines."""
        return await self._control.apause(queue, reason)

    def resume(self: Controllable, queue: str) -> bool:
        """Have a queue worked off again; False when it was not paused."""
        return self._control.resume(queue)

    async def aresume(self: Controllable, queue: str) -> bool:
        """`resume` for coroutines."""
        return await self._control.aresume(queue)
