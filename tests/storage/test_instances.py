"""Producing instances: one, many, in a batch, in the caller's transaction, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from durable import AsyncResult, DuplicateError, Durable, Task
from durable.errors import DurableError, PayloadTooLargeError, ValidationError
from durable.instance import LIVE
from durable.storage import instances
from durable.storage.instances import INSERT_CHUNK
from tests.fix_rows import Rows, done, new


@pytest.fixture
def add(app: Durable) -> Task[..., Any]:
    @app.task(name="add")
    def add(a: int = 1, b: int = 2) -> int:
        return a + b

    return add


@pytest.fixture
def theirs(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A caller's own connection, with psycopg's defaults: it opens a transaction by itself."""
    with psycopg.connect(database) as connection:
        yield connection


def count(rows: Rows) -> int:
    return int(rows.fetch("SELECT count(*) AS n FROM {schema}.instances")[0]["n"])


# One


def test_a_row_holds_what_was_given_and_defaults(rows: Rows, add: Task[..., Any]) -> None:
    result = add.delay(3, b=4)
    row = rows.live(result.id)
    assert row is not None
    now = rows.fetch("SELECT clock_timestamp() AS now")[0]["now"]
    assert now - timedelta(minutes=1) < row["created_at"] <= now
    assert now - timedelta(minutes=1) < row["eligible_at"] <= now
    assert (row["status"], row["queue"], row["machine"], row["machine_version"]) == ("runnable", "default", "add", 1)
    assert (row["step"], row["priority"], row["attempt"], row["token"], row["version"]) == ("run", 0, 0, 0, 0)
    assert (row["state_type"], row["state"]) == ("json", b'{"args":[3],"kwargs":{"b":4}}')
    assert row["crashes"] == 0
    for name in (
        "worker_id",
        "finished_at",
        "expires_at",
        "max_attempts",
        "correlation_key",
        "result",
        "error",
        "reason",
    ):
        assert row[name] is None, name


def test_every_option_reaches_its_column(rows: Rows, add: Task[..., Any]) -> None:
    eta = datetime.now(UTC) + timedelta(hours=1)
    result = add.apply_async(
        (1,),
        {"b": 2},
        eta=eta,
        expires=eta + timedelta(hours=1),
        priority=-7,
        queue="fast",
        correlation_key="k",
        correlation_scope=["done"],
        max_attempts=3,
    )
    row = rows.live(result.id)
    assert row is not None
    assert (row["status"], row["queue"], row["priority"], row["max_attempts"]) == ("scheduled", "fast", -7, 3)
    assert (row["eligible_at"], row["expires_at"]) == (eta, eta + timedelta(hours=1))
    assert row["correlation_key"] == "k"
    assert set(row["correlation_scope"].strip("{}").split(",")) == LIVE | {"done"}


def test_relative_times_count_from_the_databases_clock(rows: Rows, add: Task[..., Any]) -> None:
    result = add.apply_async(countdown=60, expires=90)
    (row,) = rows.fetch(
        "SELECT status, eligible_at - created_at AS wait, expires_at - eligible_at AS room FROM {schema}.instances"
        " WHERE id = %s",
        [result.id],
    )
    assert row["status"] == "scheduled"
    assert abs(row["wait"] - timedelta(seconds=60)) < timedelta(seconds=1)
    assert row["room"] == timedelta(seconds=30)


@pytest.mark.parametrize("times", [{"countdown": 0}, {"eta": datetime(2020, 1, 1, tzinfo=UTC)}])
def test_what_is_due_already_is_runnable_now_and_takes_no_place_in_the_past(
    rows: Rows, add: Task[..., Any], times: dict[str, Any]
) -> None:
    row = rows.live(add.apply_async(**times).id)
    assert row is not None
    assert row["status"] == "runnable"
    assert row["eligible_at"] >= row["created_at"] - timedelta(seconds=1)


def test_ids_grow_and_never_repeat(add: Task[..., Any]) -> None:
    ids = [add.delay().id for _ in range(5)]
    assert ids == sorted(set(ids))


def test_an_occupied_key_is_a_duplicate_that_names_its_occupant(rows: Rows, add: Task[..., Any]) -> None:
    first = add.apply_async(correlation_key="order:1")
    with pytest.raises(DuplicateError, match=f"'order:1' is occupied by instance {first.id}") as caught:
        add.apply_async(correlation_key="order:1")
    assert (caught.value.existing_id, caught.value.correlation_key) == (first.id, "order:1")
    assert count(rows) == 1
    assert add.apply_async(correlation_key="order:2").id != first.id


def test_null_keys_and_empty_scopes_never_conflict(rows: Rows, add: Task[..., Any]) -> None:
    for _ in range(2):
        add.delay()
        add.apply_async(correlation_key="k", correlation_scope=())
    add.apply_async(correlation_key="k")
    add.apply_async(correlation_key="k", correlation_scope=())
    assert count(rows) == 6


def test_a_key_is_free_once_its_instance_is_terminal(rows: Rows, add: Task[..., Any]) -> None:
    first = add.apply_async(correlation_key="k")
    worker = rows.worker()
    (claimed,) = rows.claim(worker)
    with pytest.raises(DuplicateError):
        add.apply_async(correlation_key="k")
    assert rows.flush(worker, done(claimed)) == {first.id}
    second = add.apply_async(correlation_key="k")
    with pytest.raises(DuplicateError) as caught:
        add.apply_async(correlation_key="k")
    assert caught.value.existing_id == second.id


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
def test_a_scope_with_a_terminal_status_keeps_the_key_reserved(rows: Rows, add: Task[..., Any], end: str) -> None:
    for scope in ("done", "failed", "cancelled"):
        key = f"{scope} then {end}"
        first = add.apply_async(correlation_key=key, correlation_scope=[scope])
        worker = rows.worker()
        (claimed,) = rows.claim(worker)
        rows.flush(worker, done(claimed, status=end))
        if scope == end:
            assert rows.history(first.id) is None, "a reserved key keeps the row in the live table"
            with pytest.raises(DuplicateError) as caught:
                add.apply_async(correlation_key=key)
            assert caught.value.existing_id == first.id
            assert first.status == end
        else:
            assert rows.live(first.id) is None
            add.apply_async(correlation_key=key)
        rows.fetch("DELETE FROM {schema}.instances")


def test_a_terminal_scope_alone_still_guards_the_live_ones(add: Task[..., Any]) -> None:
    add.apply_async(correlation_key="k", correlation_scope=["done"])
    with pytest.raises(DuplicateError):
        add.apply_async(correlation_key="k", correlation_scope=["done"])


def test_what_is_refused_writes_nothing(rows: Rows, add: Task[..., Any]) -> None:
    for call in (
        lambda: add.delay("x" * 2_000_000),
        lambda: add.delay(a=float("nan")),
        lambda: add.delay(1, 2, 3),
        lambda: add.apply_async(queue="q'"),
        lambda: add.apply_async(correlation_key="a\0b"),
    ):
        with pytest.raises((ValidationError, TypeError)):
            call()
    assert count(rows) == 0


def test_the_database_is_the_second_wall(rows: Rows) -> None:
    """What would get past the checks in Python is refused by constraints, whoever writes."""
    for options in (
        {"correlation_key": ""},
        {"correlation_key": "k" * 256},
        {"max_attempts": 0},
        {"machine_version": 0},
    ):
        with pytest.raises(psycopg.errors.CheckViolation):
            rows.insert(**options)
    (row,) = rows.insert()
    for change in (
        "eligible_at = 'infinity'",
        "eligible_at = '-infinity'",
        "status = 'done'",
        "finished_at = now()",
        "status = 'executing'",
        "worker_id = 5",
        "attempt = -1",
        "crashes = -1",
        "token = -1",
    ):
        with pytest.raises(psycopg.errors.CheckViolation):
            rows.fetch(f"UPDATE {{schema}}.instances SET {change} WHERE id = %s", [row])


# In the caller's transaction


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_instance_exists_if_and_only_if_the_callers_transaction_commits(
    rows: Rows, add: Task[..., Any], theirs: psycopg.Connection[Any], end: str
) -> None:
    one = add.apply_async((1,), connection=theirs)
    theirs.execute("SELECT 1")
    assert one.status == "not_found", "not committed yet"
    getattr(theirs, end)()
    assert one.status == ("runnable" if end == "commit" else "not_found")


def test_a_batch_of_the_callers_transaction_goes_with_it(
    app: Durable, rows: Rows, add: Task[..., Any], theirs: psycopg.Connection[Any]
) -> None:
    app.insert_many([(add, {}), (add, {"args": (5,)})], connection=theirs)
    app.insert(add, args=(1,), connection=theirs)
    with app.batch(connection=theirs):
        add.delay()
    theirs.rollback()
    assert count(rows) == 0
    with theirs.transaction():
        app.insert_many([(add, {})], connection=theirs)
        with app.batch(connection=theirs):
            add.delay()
            add.delay()
    assert count(rows) == 3


def test_a_duplicate_leaves_the_callers_transaction_usable(
    app: Durable, rows: Rows, add: Task[..., Any], theirs: psycopg.Connection[Any]
) -> None:
    add.apply_async(correlation_key="k")
    theirs.execute("CREATE TEMP TABLE mine (x int)")
    with pytest.raises(DuplicateError):
        add.apply_async(correlation_key="k", connection=theirs)
    assert app.insert_many([(add, {"correlation_key": "k"})], connection=theirs) == []
    theirs.execute("INSERT INTO mine VALUES (1)")
    add.apply_async(correlation_key="other", connection=theirs)
    theirs.commit()
    assert theirs.execute("SELECT count(*) FROM mine").fetchone() == (1,)
    assert count(rows) == 2


def test_an_autocommit_connection_commits_at_once(rows: Rows, database: str, add: Task[..., Any]) -> None:
    with psycopg.connect(database, autocommit=True) as theirs:
        assert add.apply_async(connection=theirs).status == "runnable"
        assert theirs.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_the_callers_row_factory_and_cursors_do_not_matter(database: str, add: Task[..., Any]) -> None:
    with psycopg.connect(
        database, row_factory=psycopg.rows.dict_row, cursor_factory=psycopg.ClientCursor, autocommit=True
    ) as theirs:
        result = add.apply_async(correlation_key="k", connection=theirs)
        assert result.status == "runnable"
        with pytest.raises(DuplicateError) as caught:
            add.apply_async(correlation_key="k", connection=theirs)
        assert caught.value.existing_id == result.id


# Many


def test_many_are_inserted_in_order_in_one_transaction(app: Durable, rows: Rows, add: Task[..., Any]) -> None:
    results = app.insert_many([(add, {"args": (n,)}) for n in range(20)] + [("add", {"kwargs": {"a": 5}})])
    assert len(results) == 21
    by_id = {row["id"]: row["state"] for row in rows.fetch("SELECT id, state FROM {schema}.instances")}
    assert [by_id[result.id] for result in results[:3]] == [b'{"args":[0]}', b'{"args":[1]}', b'{"args":[2]}']
    assert by_id[results[20].id] == b'{"kwargs":{"a":5}}'


def test_a_batch_is_run_in_the_order_it_was_given(app: Durable, rows: Rows, add: Task[..., Any]) -> None:
    results = app.insert_many([(add, {"args": (n,)}) for n in range(50)])
    claimed = rows.claim(rows.worker(), 50)
    assert [row.id for row in claimed] == [result.id for result in results]


def test_every_option_works_in_a_batch(app: Durable, rows: Rows, add: Task[..., Any]) -> None:
    eta = datetime.now(UTC) + timedelta(hours=2)
    results = app.insert_many(
        [
            (add, {"schedule_in": 60, "expires": 90, "queue": "b", "priority": 3}),
            (add, {"schedule_at": eta, "max_attempts": 7, "correlation_key": "k", "correlation_scope": ["failed"]}),
            (add, {"correlation_key": "é😀", "correlation_scope": []}),
        ]
    )
    one, two, three = (rows.live(result.id) for result in results)
    assert one is not None
    assert two is not None
    assert three is not None
    assert (one["status"], one["queue"], one["priority"]) == ("scheduled", "b", 3)
    assert one["expires_at"] - one["eligible_at"] == timedelta(seconds=30)
    assert (two["status"], two["eligible_at"], two["max_attempts"]) == ("scheduled", eta, 7)
    assert set(two["correlation_scope"].strip("{}").split(",")) == LIVE | {"failed"}
    assert (three["status"], three["correlation_key"], three["correlation_scope"]) == ("runnable", "é😀", "{}")


def test_duplicates_inside_and_outside_a_batch_are_dropped_and_one_wins(
    app: Durable, rows: Rows, add: Task[..., Any]
) -> None:
    add.apply_async(correlation_key="old")
    results = app.insert_many(
        [
            (add, {"args": (0,), "correlation_key": "old"}),
            (add, {"args": (1,), "correlation_key": "new"}),
            (add, {"args": (2,), "correlation_key": "new"}),
            (add, {"args": (3,)}),
            (add, {"args": (4,), "correlation_key": "zzz"}),
            (add, {"args": (5,), "correlation_key": "new", "correlation_scope": ()}),
        ]
    )
    states = [rows.live(result.id)["state"] for result in results]  # type: ignore[index]
    assert states == [b'{"args":[1]}', b'{"args":[3]}', b'{"args":[4]}', b'{"args":[5]}']


def test_more_than_a_chunk_goes_in_one_transaction_duplicates_across_chunks_included(rows: Rows) -> None:
    size = INSERT_CHUNK + 1000
    batch = [new(correlation_key=f"k{n % 5500:05}") for n in range(size)]
    ids = rows.atomically(instances.insert_many(batch))
    assert sum(instance_id is not None for instance_id in ids) == 5500
    assert all(instance_id is not None for instance_id in ids[:5500])
    assert count(rows) == 5500
    (row,) = rows.fetch("SELECT count(DISTINCT xmin::text) AS n FROM {schema}.instances")
    assert row["n"] == 1


def test_one_bad_row_names_its_index_and_nothing_is_inserted(app: Durable, rows: Rows, add: Task[..., Any]) -> None:
    good = [(add, {})] * 517
    bad: list[tuple[Any, str]] = [
        ((add, {"queue": "No!"}), "queue must be"),
        ((add, {"args": (1, 2, 3)}), "too many"),
        ((add, {"args": ("\0",)}), "NUL"),
        ((add, {"prio": 1}), "prio"),
        (("nothing", {}), "no task 'nothing'"),
        ((5, {}), "a target is a task"),
        ((add,), "unpack"),
        (5, "unpack"),
    ]
    for entry, message in bad:
        with pytest.raises(ValidationError, match=f"insert_many, entry 517: .*{message}"):
            app.insert_many([*good, entry, *good])
    assert count(rows) == 0


def test_a_generator_that_raises_half_way_inserts_nothing(app: Durable, rows: Rows, add: Task[..., Any]) -> None:
    def targets() -> Iterator[tuple[Any, dict[str, Any]]]:
        yield add, {}
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        app.insert_many(targets())
    assert count(rows) == 0


def test_nothing_in_nothing_out(app: Durable, rows: Rows) -> None:
    assert app.insert_many([]) == []
    assert app.insert_many(iter(())) == []
    with app.batch():
        pass
    assert count(rows) == 0


# A block


def test_a_batch_block_inserts_at_its_end_and_gives_ids(app: Durable, rows: Rows, add: Task[..., Any]) -> None:
    with app.batch() as batch:
        one, two = add.delay(1), add.apply_async((2,), queue="b")
        assert count(rows) == 0
        with pytest.raises(DurableError, match="gets its id when its batch ends"):
            one.id
    assert one.id < two.id
    assert rows.live(two.id)["queue"] == "b"  # type: ignore[index]
    assert batch.duplicates == []
    assert add.delay().id > two.id, "after the block calls go out at once again"


def test_an_exception_in_the_block_inserts_nothing(app: Durable, rows: Rows, add: Task[..., Any]) -> None:
    def fill() -> None:
        with app.batch():
            results.append(add.delay())
            raise RuntimeError

    results: list[AsyncResult[Any]] = []
    with pytest.raises(RuntimeError):
        fill()
    assert count(rows) == 0
    with pytest.raises(DurableError):
        results[0].id
    assert add.delay().id


def test_a_duplicate_in_a_block_is_dropped_and_its_result_says_so(
    app: Durable, rows: Rows, add: Task[..., Any]
) -> None:
    with app.batch() as batch:
        first = add.apply_async(correlation_key="k")
        second = add.apply_async(correlation_key="k")
    assert batch.duplicates == [second]
    assert first.status == "runnable"
    with pytest.raises(DuplicateError, match="'k' is occupied"):
        second.id
    assert count(rows) == 1


def test_blocks_nest_and_belong_to_their_app(app: Durable, rows: Rows, add: Task[..., Any], database: str) -> None:
    with app.batch():
        with app.batch():
            inner = add.delay()
        assert inner.id
        outer = add.delay()
        assert count(rows) == 1
    assert outer.id
    other = Durable("other", dsn=database, schema=app.schema)
    task = other.task(name="add")(lambda: None)
    with app.batch():
        assert task.delay().id, "another app's batch is not ours"
    other.close()


# Async


def test_the_async_twins_do_the_same(app: Durable, rows: Rows, add: Task[..., Any], database: str) -> None:
    async def main() -> None:
        one = await add.adelay(1, b=2)
        assert rows.live(one.id)["state"] == b'{"args":[1],"kwargs":{"b":2}}'  # type: ignore[index]
        assert await one.astatus() == "runnable"
        two = await add.aapply_async((1,), priority=4, correlation_key="k", countdown=5)
        assert rows.live(two.id)["status"] == "scheduled"  # type: ignore[index]
        with pytest.raises(DuplicateError) as caught:
            await app.ainsert("add", correlation_key="k")
        assert caught.value.existing_id == two.id
        assert len(await app.ainsert_many([(add, {}), (add, {"correlation_key": "k"})])) == 1
        assert await app.ainsert_many([]) == []
        async with app.batch():
            three = await add.adelay()
            four = add.delay()
        assert three.id < four.id
        assert await app.acancel("k")
        assert not await two.acancel()
        assert await app.result(2**40).astatus() == "not_found"
        with pytest.raises(PayloadTooLargeError):
            await add.adelay("x" * 2_000_000)
        await app.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_async_connection_of_the_caller_decides_too(
    app: Durable, rows: Rows, add: Task[..., Any], database: str, end: str
) -> None:
    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(database) as theirs:
            await add.aapply_async(connection=theirs, correlation_key="k")
            with pytest.raises(DuplicateError):
                await app.ainsert(add, connection=theirs, correlation_key="k")
            await app.ainsert_many([(add, {}), (add, {})], connection=theirs)
            async with app.batch(connection=theirs):
                await add.adelay()
            await getattr(theirs, end)()

    asyncio.run(main())
    assert count(rows) == (4 if end == "commit" else 0)


def test_each_event_loop_has_connections_of_its_own(app: Durable, add: Task[..., Any]) -> None:
    async def main() -> int:
        try:
            return (await add.adelay()).id
        finally:
            await app.aclose()

    assert asyncio.run(main()) < asyncio.run(main()) < add.delay().id


def test_many_coroutines_share_few_connections(app: Durable, add: Task[..., Any], rows: Rows) -> None:
    async def main() -> list[Any]:
        try:
            return await asyncio.gather(*(add.adelay(n) for n in range(40)))
        finally:
            await app.aclose()

    assert len({result.id for result in asyncio.run(main())}) == 40
