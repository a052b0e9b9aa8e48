"""Durable: an app. Its settings, its tasks, and the producer's calls.

Knows no worker; workers, beats and the CLI are built from an app. Importing or constructing one opens nothing: the
first call that needs the database connects, per process and per event loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import cached_property
from typing import Any, TypeVar

import psycopg

from durable import dsn as dsn_module
from durable import validation
from durable.batch import Batch, collecting
from durable.config import Config
from durable.errors import (
    ConnectionUsageError,
    UnknownTaskError,
    ValidationError,
)
from durable.instance import NewInstance, Payload, Snapshot
from durable.registry import Registry
from durable.result import AsyncResult, Watcher
from durable.serialization import Codec
from durable.sql import Statements
from durable.storage import instances, migrations
from durable.storage.pool import ProducerPool
from durable.storage.session import Operation, arun, run, translated
from durable.task import Task
from durable.wakeups import Wakeups

R = TypeVar("R")
T = TypeVar("T")


class Durable(Registry):
    """An app.

    name     for logs and `application_name`
    dsn      of the database; falls back to DURABLE_DSN, then to the embedded server
    schema   where its tables are; several apps share a database by schema
    settings every one of `durable.config.Config`
    Raises ConfigError for a wrong setting or DSN, naming it.
    """

    def __init__(self, name: str, *, dsn: str | None = None, schema: str = "durable", **settings: Any) -> None:
        self.name = validation.text(name, "an app's name", 60)
        self.schema = validation.schema(schema)
        self.conf = Config.load(**settings)
        self.database = dsn_module.Database(dsn)
        self.sql = Statements(self.schema)
        super().__init__(self._encode, self._submit, self._asubmit)
        self.embedded_schema_made = False
        """Whether the embedded server is known to have the schema; a command sets it before it forks."""
        self._watchers: dict[int, Watcher] = {}

    # Producing

    def insert(
        self,
        target: Task[..., R] | str,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        connection: Any = None,
        notify_in_transaction: bool = True,
        **options: Any,
    ) -> AsyncResult[R]:
        """Insert an instance of a task (or of the registered task of that name); options as in `Task.new`."""
        new = self._resolve(target).new(args, kwargs, **options)
        return self._submit(new, connection, notify_in_transaction)

    async def ainsert(
        self,
        target: Task[..., R] | str,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        connection: Any = None,
        notify_in_transaction: bool = True,
        **options: Any,
    ) -> AsyncResult[R]:
        """`insert` for coroutines."""
        new = self._resolve(target).new(args, kwargs, **options)
        return await self._asubmit(new, connection, notify_in_transaction)

    def insert_many(
        self,
        targets: Iterable[tuple[Task[..., Any] | str, Mapping[str, Any]]],
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
    ) -> list[AsyncResult[Any]]:
        """Insert many instances in few statements and one transaction: `[(task, {"args": (1,)}), ...]`.

        Returns the results of those inserted, in order; those whose correlation key is occupied are dropped.
        Raises ValidationError naming the index of a bad one; nothing is inserted then.
        """
        ids = self.insert_rows(self._prepare_many(targets), connection, notify_in_transaction)
        return [AsyncResult(instance_id, self) for instance_id in ids if instance_id is not None]

    async def ainsert_many(
        self,
        targets: Iterable[tuple[Task[..., Any] | str, Mapping[str, Any]]],
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
    ) -> list[AsyncResult[Any]]:
        """`insert_many` for coroutines."""
        ids = await self.ainsert_rows(self._prepare_many(targets), connection, notify_in_transaction)
        return [AsyncResult(instance_id, self) for instance_id in ids if instance_id is not None]

    def batch(self, *, connection: Any = None) -> Batch:
        """Return a context manager that groups the `.delay()` calls inside it into one statement.

        Results get their ids when the block ends; an exception inside it inserts nothing. Works as `async with` too.
        """
        return Batch(self, connection)

    def cancel(self, target: int | str, reason: str | None = None) -> bool:
        """Cancel an instance by id or correlation key; False when it is finished already or unknown.

        A waiting one ends `cancelled` at once; an executing one when its step ends, whatever that returns.
        """
        operation = self._cancel(target, reason)
        with self._pool.connection() as connection, connection.transaction():
            return run(connection, self.sql, operation)

    async def acancel(self, target: int | str, reason: str | None = None) -> bool:
        """`cancel` for coroutines."""
        operation = self._cancel(target, reason)
        async with self._pool.aconnection() as connection, connection.transaction():
            return await arun(connection, self.sql, operation)

    def result(self, instance_id: int) -> AsyncResult[Any]:
        """Return the handle on an instance; asks nothing yet. Raises ValidationError for what is no id."""
        return AsyncResult(validation.instance_id(instance_id), self)

    def migrate(self) -> list[str]:
        """Create or upgrade the schema and return the names of the migrations applied."""
        with self._pool.connection() as connection:
            return [migration.name for migration in migrations.migrate(connection, self.schema)]

    def close(self) -> None:
        """Close this process's connections; the app can be used again."""
        if "_pool" in self.__dict__:
            self._pool.close()

    async def aclose(self) -> None:
        """Close this event loop's connections."""
        if "_pool" in self.__dict__:
            await self._pool.aclose()

    # What results need (result.ResultSource)

    def fetch(self, instance_id: int) -> Snapshot | None:
        """Return where an instance stands."""
        return self.run(instances.snapshot(instance_id))

    async def afetch(self, instance_id: int) -> Snapshot | None:
        """`fetch` for coroutines."""
        async with self._pool.aconnection() as connection:
            return await arun(connection, self.sql, instances.snapshot(instance_id))

    def wait_for(self, instance_id: int) -> Future[Snapshot]:
        """Return a future of the finished snapshot."""
        return self._watcher.wait_for(instance_id)

    def stop_waiting(self, instance_id: int, waiter: Future[Snapshot]) -> None:
        """Forget a future of `wait_for`."""
        self._watcher.stop_waiting(instance_id, waiter)

    def decode_result(self, snapshot: Snapshot) -> Any:
        """Return the value a finished instance ended with."""
        if snapshot.result_type is None:
            return None
        return self.codec.decode(snapshot.result_type, snapshot.result or b"", f"result of instance {snapshot.id}")

    # Within

    def run(self, operation: Operation[T]) -> T:
        """Run a storage operation on a connection of the producer's pool."""
        with self._pool.connection() as connection:
            return run(connection, self.sql, operation)

    @cached_property
    def codec(self) -> Codec:
        """The payload codec, made from the settings when first needed."""
        conf = self.conf
        return Codec(conf.serializer, conf.accept_content, conf.compression, conf.max_payload_bytes)

    def dsn(self) -> str:
        """Return the DSN; an embedded server is started or joined, and its schema made, when there is none."""
        dsn = self.database.dsn()
        if self.database.embedded and not self.embedded_schema_made:
            self.embedded_schema_made = True
            with psycopg.connect(dsn, autocommit=True) as connection:
                migrations.migrate(connection, self.schema)
        return dsn

    @cached_property
    def wakeups(self) -> Wakeups:
        """Decides which inserts notify."""
        return Wakeups(self.schema, self.conf.notify)

    @cached_property
    def _pool(self) -> ProducerPool:
        return ProducerPool(
            self.dsn, self.schema, self.name, self.conf.pool_size, self.conf.connect_timeout, pooler=self.conf.pooler
        )

    @property
    def _watcher(self) -> Watcher:
        # By process: a forked child has the parent's object but not its thread.
        pid = os.getpid()
        watcher = self._watchers.get(pid)
        if watcher is None:
            watcher = self._watchers[pid] = Watcher(
                lambda ids: self.run(instances.finished(ids)), self.fetch, self._send_owed_wakeups
            )
        return watcher

    def _send_owed_wakeups(self) -> None:
        for operation in self.wakeups.owed():
            self.run(operation)

    def _encode(self, value: Any, what: str, serializer: str | None) -> Payload:
        return self.codec.encode(value, what, serializer)

    def _resolve(self, target: Task[..., Any] | str) -> Task[..., Any]:
        if isinstance(target, Task):
            return target
        if isinstance(target, str):
            return self.find_task(target)
        raise ValidationError(f"a target is a task or the name of one, got {validation.shown(target)}")

    def _prepare_many(self, targets: Iterable[tuple[Task[..., Any] | str, Mapping[str, Any]]]) -> list[NewInstance]:
        prepared = []
        for index, entry in enumerate(targets):
            try:
                target, options = entry
                prepared.append(self._resolve(target).new(**options))
            except (ValidationError, UnknownTaskError, TypeError, ValueError) as error:
                raise ValidationError(f"insert_many, entry {index}: {error}") from error
        return prepared

    def _cancel(self, target: int | str, reason: str | None) -> Operation[bool]:
        text = "cancelled" if reason is None else validation.text(reason, "reason", 16_384)
        if isinstance(target, str):
            return _cancel_key(validation.text(target, "correlation_key"), text)
        return instances.cancel(validation.instance_id(target), text)

    def _submit(self, new: NewInstance, connection: Any, notify_in_transaction: bool) -> AsyncResult[Any]:
        if connection is None:
            batch = collecting(self)
            if batch is not None:
                return batch.add(new)
            with self._pool.connection() as own:
                instance_id = run(own, self.sql, instances.insert(new))
                for operation in self.wakeups.after_insert((new,)):
                    run(own, self.sql, operation)
            return AsyncResult(instance_id, self)
        _usable(connection, psycopg.Connection)
        with translated(self.schema):
            instance_id = run(connection, self.sql, instances.insert(new), foreign=True)
            for operation in self._wakeups_on(connection, (new,), notify_in_transaction):
                run(connection, self.sql, operation, foreign=True)
        return AsyncResult(instance_id, self)

    async def _asubmit(self, new: NewInstance, connection: Any, notify_in_transaction: bool) -> AsyncResult[Any]:
        if connection is None:
            batch = collecting(self)
            if batch is not None:
                return batch.add(new)
            async with self._pool.aconnection() as own:
                instance_id = await arun(own, self.sql, instances.insert(new))
                for operation in self.wakeups.after_insert((new,)):
                    await arun(own, self.sql, operation)
            return AsyncResult(instance_id, self)
        _usable(connection, psycopg.AsyncConnection)
        with translated(self.schema):
            instance_id = await arun(connection, self.sql, instances.insert(new), foreign=True)
            for operation in self._wakeups_on(connection, (new,), notify_in_transaction):
                await arun(connection, self.sql, operation, foreign=True)
        return AsyncResult(instance_id, self)

    def insert_rows(
        self, batch: Sequence[NewInstance], connection: Any = None, notify_in_transaction: bool = True
    ) -> list[int | None]:
        """Insert prepared rows in one transaction; return an id per row, None where the key was occupied."""
        if not batch:
            return []
        operation = instances.insert_many(batch)
        if connection is None:
            with self._pool.connection() as own:
                with own.transaction():
                    ids = run(own, self.sql, operation)
                for wakeup in self.wakeups.after_insert(batch):
                    run(own, self.sql, wakeup)
            return ids
        _usable(connection, psycopg.Connection)
        with translated(self.schema), connection.transaction() if connection.autocommit else nullcontext():
            ids = run(connection, self.sql, operation, foreign=True)
            for wakeup in self._wakeups_on(connection, batch, notify_in_transaction):
                run(connection, self.sql, wakeup, foreign=True)
        return ids

    async def ainsert_rows(
        self, batch: Sequence[NewInstance], connection: Any = None, notify_in_transaction: bool = True
    ) -> list[int | None]:
        """`insert_rows` for coroutines."""
        if not batch:
            return []
        operation = instances.insert_many(batch)
        if connection is None:
            async with self._pool.aconnection() as own:
                async with own.transaction():
                    ids = await arun(own, self.sql, operation)
                for wakeup in self.wakeups.after_insert(batch):
                    await arun(own, self.sql, wakeup)
            return ids
        _usable(connection, psycopg.AsyncConnection)
        with translated(self.schema):
            async with connection.transaction() if connection.autocommit else nullcontext():
                ids = await arun(connection, self.sql, operation, foreign=True)
                for wakeup in self._wakeups_on(connection, batch, notify_in_transaction):
                    await arun(connection, self.sql, wakeup, foreign=True)
        return ids

    def _wakeups_on(
        self, connection: Any, batch: Sequence[NewInstance], notify_in_transaction: bool
    ) -> Sequence[Operation[Any]]:
        """A raw connection has no after-commit hook: its transaction carries one constant payload, or none."""
        if connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            return self.wakeups.after_insert(batch)
        return self.wakeups.in_transaction(batch) if notify_in_transaction else ()

    def __repr__(self) -> str:
        return f"<Durable {self.name!r}, schema {self.schema!r}, {len(self.tasks)} tasks>"


def _cancel_key(key: str, reason: str) -> Operation[bool]:
    instance_id = yield from instances.occupant(key)
    return False if instance_id is None else (yield from instances.cancel(instance_id, reason))


def _usable(connection: Any, kind: type[Any]) -> None:
    if not isinstance(connection, kind):
        raise ConnectionUsageError(
            f"connection= must be a {kind.__module__}.{kind.__name__}, got {type(connection).__name__}"
        )
    if connection.closed:
        raise ConnectionUsageError("connection= is closed")
    if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
        raise ConnectionUsageError("connection= is in a failed transaction; roll it back first")
    if connection.info.encoding != "utf-8":
        raise ConnectionUsageError(
            f"connection= has client_encoding {connection.info.encoding}; open it with client_encoding='utf8'"
        )
