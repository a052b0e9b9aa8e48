"""Large batches go in by COPY: the rows are those that an INSERT makes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.errors import ConnectionUsageError
from durable.instance import NewInstance, Payload
from durable.storage import instances
from durable.storage.instances import COPY_FROM
from durable.storage.session import arun
from tests.fix_rows import Rows, new

SOON = datetime.now(UTC) + timedelta(hours=2)
LONG_AGO = datetime(1999, 5, 1, tzinfo=UTC)

KINDS: list[Callable[[], NewInstance]] = [
    lambda: new(),
    lambda: new(queue="é.mails", priority=-7, step="ship", machine="shop.Ordé", machine_version=3),
    lambda: new(state=Payload("msgpack+gzip", bytes(range(256)) * 40)),
    lambda: new(state=Payload("json", b"")),
    lambda: new(delay=0.0),
    lambda: new(delay=90.25, expires_in=1000.5),
    lambda: new(at=SOON, expires_at=SOON + timedelta(microseconds=1)),
    lambda: new(at=LONG_AGO, expires_in=0.75),
    lambda: new(max_attempts=9, parent_id=2**40, parent_round=4, trace="00-0af7651916cd-01"),
    lambda: new(concurrency_key="tenant:é", rate_limit="mails:x", weight=5),
    lambda: new(concurrency_key="tenant:2", delay=30.0),
]


def a_batch() -> list[NewInstance]:
    return [kind() for kind in KINDS] * (COPY_FROM // len(KINDS) + 1)


def as_written(rows: Rows, ids: list[int]) -> list[dict[str, Any]]:
    """Every column; moments as tenths of seconds from the row's making."""
    found = rows.fetch(
        "SELECT * FROM {schema}.instances WHERE id = ANY (%s) ORDER BY array_position(%s, id)", [ids, ids]
    )
    for row in found:
        made = row.pop("created_at")
        del row["id"]
        for moment in ("eligible_at", "expires_at"):
            if row[moment] not in (None, SOON, SOON + timedelta(microseconds=1)):
                row[moment] = round((row[moment] - made).total_seconds(), 1)
    return found


def test_a_copied_row_is_the_one_that_would_have_been_inserted(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = rows.atomically(instances.insert_many(a_batch()))
    monkeypatch.setattr(instances, "COPY_FROM", 10**6)
    inserted = rows.atomically(instances.insert_many(a_batch()))
    assert as_written(rows, copied) == as_written(rows, inserted)
    assert copied == sorted(copied)


def test_only_large_batches_without_keys_are_copied(rows: Rows) -> None:
    def statements(batch: list[NewInstance]) -> list[str]:
        names: list[str] = []
        operation, sent = instances.insert_many(batch), None
        while True:
            try:
                name, parameters = operation.send(sent)
            except StopIteration:
                return names
            names.append(name)
            sent = rows.run(one(name, parameters))

    def one(name: str, parameters: Any) -> Any:
        return (yield name, parameters)

    few, many = [new()] * (COPY_FROM - 1), [new()] * COPY_FROM
    keyed = [new(correlation_key=f"k{n}") for n in range(COPY_FROM)]
    assert statements(few) == ["insert_many"]
    assert statements(many) == ["new_ids", "copy_instances"]
    assert statements([*many, *keyed]) == ["new_ids", "insert_many_keyed", "copy_instances"]


@pytest.mark.parametrize("count", [3, COPY_FROM + 1])
def test_ids_rise_in_the_given_order_whatever_the_keys(rows: Rows, count: int) -> None:
    taken = rows.run(instances.insert(new(correlation_key="k1")))
    batch = [new(correlation_key=None if n % 2 else f"q{count - n:03}") for n in range(count)]
    batch[1:1] = [new(correlation_key="k1")]
    ids = rows.atomically(instances.insert_many(batch))
    assert ids.pop(1) is None
    assert ids == sorted(ids, key=lambda one: one or 0)
    assert rows.fetch("SELECT count(*) FROM {schema}.instances WHERE id = ANY (%s)", [[taken, *ids]]) == [
        {"count": count + 1}
    ]


def test_rows_with_keys_are_sent_in_statements_that_fit_a_message(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "MOST_BYTES", 100)
    batch = [
        new(correlation_key=f"k{n}", state=Payload("json", b"1" * size)) for n, size in enumerate((40, 60, 1, 300, 1))
    ]
    assert [len(chunk) for chunk in instances._chunks_by_size([0, 1, 2, 3, 4], batch)] == [2, 1, 1, 1]
    assert None not in rows.atomically(instances.insert_many(batch))


def test_a_coroutines_connection_copies_too(rows: Rows) -> None:
    async def copy() -> list[int | None]:
        async with await psycopg.AsyncConnection.connect(rows.dsn, autocommit=True) as connection:
            return await arun(connection, rows.sql, instances.insert_many([new()] * COPY_FROM))

    ids = asyncio.run(copy())
    assert len(set(ids)) == COPY_FROM
    assert rows.fetch("SELECT count(*) FROM {schema}.instances WHERE id = ANY (%s)", [ids]) == [{"count": COPY_FROM}]


def test_nothing_of_a_copied_batch_stays_when_a_row_is_refused(rows: Rows) -> None:
    wrong = [*[new()] * COPY_FROM, new(max_attempts=0)]
    with pytest.raises(psycopg.errors.CheckViolation):
        rows.atomically(instances.insert_many(wrong))
    assert rows.fetch("SELECT FROM {schema}.instances") == []


def test_a_batch_on_the_callers_connection_is_copied_into_its_transaction(rows: Rows, app: Durable) -> None:
    task = app.task(name="theirs")(lambda: None)
    with psycopg.connect(rows.dsn) as connection:
        app.insert_many([(task, {})] * COPY_FROM, connection=connection)
        connection.rollback()
        kept = app.insert_many([(task, {})] * COPY_FROM, connection=connection)
    found = rows.fetch("SELECT id FROM {schema}.instances ORDER BY id")
    assert [row["id"] for row in found] == [result.id for result in kept]


def test_a_pipeline_is_refused(rows: Rows, app: Durable) -> None:
    task = app.task(name="piped")(lambda: None)
    refused = pytest.raises(ConnectionUsageError, match="in a pipeline")
    with psycopg.connect(rows.dsn) as connection, connection.pipeline(), refused:
        task.apply_async(connection=connection)
    assert rows.fetch("SELECT FROM {schema}.instances") == []
