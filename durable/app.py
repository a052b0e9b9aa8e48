"""Durable: an app. Its settings, its tasks, and the producer's calls.

Knows no worker; workers, beats and the CLI are built from an app. Importing or constructing one opens nothing: the
first call that needs the database connects, per process and per event loop.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import cached_property, partial
from typing import Any, TypeVar

from psycopg import errors as pg_errors

from durable import dsn as dsn_module
from durable import interruption, validation
from durable.batch import Batch, collecting
from durable.children import Child, Children, acollect
from durable.config import Config
from durable.context import Signal, signals_of
from durable.control import Control, QueueControl, delivering
from durable.eager import Eager
from durable.errors import ValidationError
from durable.inserter import Inserter, prepare_many
from durable.instance import NewInstance, Payload, Snapshot
from durable.limit_rows import LimitRows
from durable.limits import ConcurrencyLimit, RateLimit
from durable.machine import Machine, MachineDefinition, definition_of
from durable.messages import accepted, new_signal, new_signals
from durable.registry import Definition, Registry
from durable.result import AsyncResult, Watcher
from durable.sealing import Sealer
from durable.serialization import Codec
from durable.signatures import Signature
from durable.sql import Statements
from durable.storage import instances, migrations, signals
from durable.storage.pool import ProducerPool
from durable.storage.session import Operation, Row, arun, connect, run, run_repeatedly
from durable.task import Task
from durable.wakeups import Wakeups
from durable.writer import Writer

log = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")
Target = Definition | type[Machine] | Signature | str
"""What can be inserted: a task, a machine, the name of a registered one, or a signature."""


class Durable(Registry, QueueControl):
    """An app.

    name     for logs and `application_name`
    dsn      of the database; falls back to DURABLE_DSN, then to the embedded server
    schema   where its tables are; several apps share a database by schema
    rate_limits, concurrency_limits  by name; stored at migrate and when workers start, unless set by hand
    settings every one of `durable.config.Config`
    Raises ConfigError for a wrong setting or DSN, naming it.
    """

    def __init__(
        self,
        name: str,
        *,
        dsn: str | None = None,
        schema: str = "durable",
        rate_limits: Mapping[str, RateLimit] | None = None,
        concurrency_limits: Mapping[str, ConcurrencyLimit] | None = None,
        **settings: Any,
    ) -> None:
        self.name = validation.text(name, "an app's name", 60)
        self.schema = validation.schema(schema)
        self.conf = Config.load(**settings)
        self.database = dsn_module.Database(dsn)
        self.sql = Statements(self.schema)
        self.limit_rows = LimitRows(rate_limits, concurrency_limits)
        super().__init__(self._encode, self._submit, self._asubmit)
        self.embedded_schema_made = False
        """Whether the embedded server is known to have the schema; a command sets it before it forks."""
        self._watchers: dict[int, Watcher] = {}

    # Producing

    def insert(
        self,
        target: Target,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Insert an instance of a task or machine, or of the one of that name; options as in `InsertOptions`.

        timeout      seconds that the call may take in all, connecting included; else the setting `call_timeout`
        state, step  of a machine: its state instead of `kwargs` to build it from, and the step to start with
        """
        new = self._resolve(target).new(args, kwargs, **options)
        return self._submit(new, connection, notify_in_transaction, timeout)

    async def ainsert(
        self,
        target: Target,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """`insert` for coroutines."""
        new = self._resolve(target).new(args, kwargs, **options)
        return await self._asubmit(new, connection, notify_in_transaction, timeout)

    def insert_many(
        self,
        targets: Iterable[tuple[Target, Mapping[str, Any]]],
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> list[AsyncResult[Any]]:
        """Insert many instances in few statements and one transaction: `[(task, {"args": (1,)}), ...]`.

        Returns the results of those inserted, in order; those whose correlation key is occupied are dropped.
        Raises ValidationError naming the index of a bad one; nothing is inserted then.
        """
        rows = prepare_many(self.prepare, targets)
        if self.conf.task_always_eager:
            return [Eager(self).run(row) for row in rows]
        ids = self.insert_rows(rows, connection, notify_in_transaction, timeout)
        return [AsyncResult(instance_id, self) for instance_id in ids if instance_id is not None]

    async def ainsert_many(
        self,
        targets: Iterable[tuple[Target, Mapping[str, Any]]],
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> list[AsyncResult[Any]]:
        """`insert_many` for coroutines."""
        rows = prepare_many(self.prepare, targets)
        if self.conf.task_always_eager:
            return [Eager(self).run(row) for row in rows]
        ids = await self.ainsert_rows(rows, connection, notify_in_transaction, timeout)
        return [AsyncResult(instance_id, self) for instance_id in ids if instance_id is not None]

    def batch(self, *, connection: Any = None) -> Batch:
        """Return a context manager that groups the `.delay()` calls inside it into one statement.

        Results get their ids when the block ends; an exception inside it inserts nothing. Works as `async with` too.
        """
        return Batch(self, connection)

    def signal(
        self,
        target: int | str,
        name: str,
        payload: Any = None,
        *,
        dedup_key: str | None = None,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> bool:
        """Put a message into the inbox of a live instance, by id or by correlation key.

        Returns True, or False for a redelivery: its `dedup_key` was delivered to that instance before.
        timeout  seconds that the call may take in all, connecting included; else the setting `call_timeout`
        Raises NoTargetError when nothing live is there, PayloadError, ValidationError; nothing is written then.
        """
        batch = [new_signal(self.codec.encode, target, name, payload, dedup_key)]
        delivery = self._writer.write(delivering(batch, self.wakeups, timeout), connection, notify_in_transaction)
        return accepted(delivery.stored, batch)

    async def asignal(
        self,
        target: int | str,
        name: str,
        payload: Any = None,
        *,
        dedup_key: str | None = None,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> bool:
        """`signal` for coroutines."""
        batch = [new_signal(self.codec.encode, target, name, payload, dedup_key)]
        write = delivering(batch, self.wakeups, timeout)
        return accepted((await self._writer.awrite(write, connection, notify_in_transaction)).stored, batch)

    def signal_many(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> list[bool | None]:
        """Deliver many signals in few statements and one transaction: `[{"target": 1, "name": "paid"}, ...]`.

        Returns for each True (new), False (a duplicate of its dedup key) or None (nothing live there).
        """
        write = delivering(new_signals(self.codec.encode, messages), self.wakeups, timeout)
        return self._writer.write(write, connection, notify_in_transaction).stored

    async def asignal_many(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> list[bool | None]:
        """`signal_many` for coroutines."""
        write = delivering(new_signals(self.codec.encode, messages), self.wakeups, timeout)
        return (await self._writer.awrite(write, connection, notify_in_transaction)).stored

    def cancel(
        self,
        target: int | str,
        reason: str | None = None,
        *,
        cascade: bool = False,
        terminate: bool = False,
        timeout: float | None = None,
    ) -> bool:
        """Cancel an instance by id or correlation key; False when it is finished already or unknown.

        A waiting or parked one ends `cancelled` at once; an executing one when its step ends, whatever that returns.
        cascade    its children and theirs too, also those that outlived it; then False says that none of them was live
        terminate  the worker process that runs the step is killed for it
        timeout    seconds that the call may take in all, connecting included; else the setting `call_timeout`
        """
        return self._control.cancel(target, reason, cascade, terminate, timeout)

    async def acancel(
        self,
        target: int | str,
        reason: str | None = None,
        *,
        cascade: bool = False,
        terminate: bool = False,
        timeout: float | None = None,
    ) -> bool:
        """`cancel` for coroutines."""
        return await self._control.acancel(target, reason, cascade, terminate, timeout)

    def retry(self, instance_id: int) -> bool:
        """Have a failed instance go on from its failed step, under the same id; False when it is not failed.

        Its attempts begin again. The step is shown the signals that it was shown when it failed, and those that came
        since. A parent that counted its failure does not count it again.
        Raises DuplicateError when its correlation key is occupied by another.
        """
        return self._control.retry(instance_id)

    async def aretry(self, instance_id: int) -> bool:
        """`retry` for coroutines."""
        return await self._control.aretry(instance_id)

    def result(self, instance_id: int) -> AsyncResult[Any]:
        """Return the handle on an instance; asks nothing yet. Raises ValidationError for what is no id."""
        return AsyncResult(validation.instance_id(instance_id), self)

    def migrate(self) -> list[str]:
        """Create or upgrade the schema and return the names of the migrations applied."""
        with self._pool.connection(timeout=migrations.LONGEST_STATEMENT) as connection:
            applied = migrations.migrate(connection, self.schema)
            run_repeatedly(connection, self.sql, lambda: self.limit_rows.declare())
        return [migration.name for migration in applied]

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
        return await self.arun(instances.snapshot(instance_id))

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

    def children_of(self, instance_id: int) -> Children:
        """Return an instance's children of every round, live and finished."""
        return Children(partial(self.read_children, instance_id, None), self.codec.decode)

    def read_children(self, instance_id: int, children_round: int | None, after: int, limit: int) -> list[Row]:
        """Return rows of an instance's children with ids above `after`, of one round or (None) of all, for Children."""
        return self.run(instances.children(instance_id, children_round, after, limit))

    async def achildren_of(self, instance_id: int) -> list[Child]:
        """Return an instance's children of every round, live and finished."""
        return await acollect(partial(self.aread_children, instance_id, None), self.codec.decode)

    async def aread_children(self, instance_id: int, children_round: int | None, after: int, limit: int) -> list[Row]:
        """`read_children` for coroutines."""
        return await self.arun(instances.children(instance_id, children_round, after, limit))

    def unread_of(self, instance_id: int) -> list[Signal]:
        """Return the signals of a finished instance that no step was shown."""
        return signals_of(self.run(signals.unread(instance_id)), self.codec.decode)

    async def aunread_of(self, instance_id: int) -> list[Signal]:
        """`unread_of` for coroutines."""
        return signals_of(await self.arun(signals.unread(instance_id)), self.codec.decode)

    # Within

    def prepare(self, target: Any, options: Mapping[str, Any]) -> NewInstance:
        """Return the checked row for a task, a machine or the name of one, with the options of `insert`."""
        return self._resolve(target).new(**options)

    def run(self, operation: Operation[T], own: bool = False) -> T:
        """Run a storage operation on a connection of the producer's pool; `own`: not on a borrowed one."""
        with self._pool.connection(own) as connection:
            value = run(connection, self.sql, operation)
        if interruption.late:
            interruption.raise_late()
        return value

    async def arun(self, operation: Operation[T]) -> T:
        """`run` for coroutines."""
        if self._pool.borrowed is not None:
            return self.run(operation)
        async with self._pool.aconnection() as connection:
            value = await arun(connection, self.sql, operation)
        if interruption.late:
            interruption.araise_late()
        return value

    @cached_property
    def codec(self) -> Codec:
        """The payload codec, made from the settings when first needed."""
        conf = self.conf
        sealer = Sealer.of(conf.payload_keys, conf.payload_encryption, conf.accept_unsigned)
        return Codec(conf.serializer, conf.accept_content, conf.compression, conf.max_payload_bytes, sealer)

    def dsn(self) -> str:
        """Return the DSN; an embedded server is started or joined, and its schema made, when there is none."""
        dsn = self.database.dsn()
        if self.database.embedded and not self.embedded_schema_made:
            # Whoever asks meanwhile migrates too, one after the other: nobody goes on before the tables are there.
            with closing(connect(dsn, f"durable {self.name} migrate")) as connection:
                migrations.migrate(connection, self.schema)
            self.embedded_schema_made = True
        return dsn

    @cached_property
    def wakeups(self) -> Wakeups:
        """Decides which inserts notify."""
        return Wakeups(self.schema, self.conf.notify)

    @cached_property
    def _pool(self) -> ProducerPool:
        return ProducerPool(
            self.dsn,
            self.schema,
            self.name,
            self.conf.pool_size,
            self.conf.connect_timeout,
            self.conf.call_timeout,
            pooler=self.conf.pooler,
        )

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self._pool, self.sql)

    @property
    def _control(self) -> Control:
        return Control(self._writer, self.wakeups)

    @property
    def _inserter(self) -> Inserter:
        return Inserter(self._writer, self.wakeups, self.limit_rows, self.codec.decode)

    @property
    def _watcher(self) -> Watcher:
        # By process: a forked child has the parent's object but not its thread.
        pid = os.getpid()
        if pid not in self._watchers:
            self._watchers[pid] = Watcher(
                lambda ids: self.run(instances.finished(ids), own=True),  # its thread must not touch a borrowed one
                lambda instance_id: self.run(instances.snapshot(instance_id), own=True),
                self._send_owed_wakeups,
            )
        return self._watchers[pid]

    def _send_owed_wakeups(self) -> None:
        for operation in self.wakeups.owed():
            with self._pool.connection(own=True) as connection:
                try:
                    run(connection, self.sql, operation)
                except pg_errors.ProgramLimitExceeded as error:  # no reason for a wait to pause
                    log.warning("workers could not be notified, their next poll finds the rows: %s", error)

    def _encode(self, value: Any, what: str, serializer: str | None) -> Payload:
        return self.codec.encode(value, what, serializer)

    def _resolve(self, target: Any) -> Definition | Signature:
        if isinstance(target, Task | MachineDefinition):
            return target
        if isinstance(target, Signature):
            return self.signature(target)
        if isinstance(target, type) and issubclass(target, Machine):
            return definition_of(target)
        if isinstance(target, str):
            return self.find_task(target)
        raise ValidationError(f"a target is a task, a machine or the name of one, got {validation.shown(target)}")

    def _submit(
        self, new: NewInstance, connection: Any, notify_in_transaction: bool, timeout: float | None = None
    ) -> AsyncResult[Any]:
        if self.conf.task_always_eager:
            return Eager(self).run(new)
        batch = collecting(self) if connection is None else None
        if batch is not None:
            return batch.add(new, timeout)
        return AsyncResult(self._inserter.insert(new, connection, notify_in_transaction, timeout), self)

    async def _asubmit(
        self, new: NewInstance, connection: Any, notify_in_transaction: bool, timeout: float | None = None
    ) -> AsyncResult[Any]:
        if self.conf.task_always_eager:
            return Eager(self).run(new)
        batch = collecting(self) if connection is None else None
        if batch is not None:
            return batch.add(new, timeout)
        return AsyncResult(await self._inserter.ainsert(new, connection, notify_in_transaction, timeout), self)

    def insert_rows(
        self,
        batch: Sequence[NewInstance],
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> list[int | None]:
        """Insert prepared rows in one transaction; return an id per row, None where the key was occupied."""
        return self._inserter.insert_many(batch, connection, notify_in_transaction, timeout)

    async def ainsert_rows(
        self,
        batch: Sequence[NewInstance],
        connection: Any = None,
        notify_in_transaction: bool = True,
        timeout: float | None = None,
    ) -> list[int | None]:
        """`insert_rows` for coroutines."""
        return await self._inserter.ainsert_many(batch, connection, notify_in_transaction, timeout)

    def __repr__(self) -> str:
        return f"<Durable {self.name!r}, schema {self.schema!r}, {len(self.tasks)} tasks>"
