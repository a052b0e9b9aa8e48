"""Roles by `durable migrate --grant`: each can do its work, and is refused what is not its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from durable import Await, Done, Durable, Machine, RateLimit, step
from durable.errors import DatabaseUnavailableError, DuplicateError, DurableError
from durable.storage import claims, workers
from durable.storage.workers import Identity
from durable.testing import drain
from tests.cli.conftest import Ran
from tests.fix_db import wait_until
from tests.fix_rows import HEAD, Rows
from tests.security.conftest import Role


def shop(dsn: str, schema: str, **settings: Any) -> Durable:
    app = Durable("shop", dsn=dsn, schema=schema, rate_limits={"mails": RateLimit(100)}, **settings)

    @app.task(name="add")
    def add(a: int, b: int = 1) -> int:
        return a + b

    @app.machine(name="order")
    class Order(Machine):
        @step(initial=True)
        def begin(self, ctx: Any) -> Any:
            return Await(["paid"], then=self.paid)

        @step
        def paid(self, ctx: Any) -> Any:
            return Done([signal.payload for signal in ctx.awaited])

    return app


@pytest.fixture
def owner(app: Durable, database: str, schema: str) -> Iterator[Durable]:
    """The app as the role that owns the schema."""
    made = shop(database, schema)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def producer(owner: Durable, role: Role, schema: str) -> Iterator[Durable]:
    """The app as a producer's role."""
    made = shop(role("producer"), schema)
    yield made
    made.close()


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    rows = Rows(database, schema)
    yield rows
    rows.close()


def test_a_producer_inserts_signals_and_reads_results_by_the_whole_api(producer: Durable, owner: Durable) -> None:
    add = producer.find_task("add")
    one = add.delay(1)
    many = producer.insert_many([("add", {"args": (1, 2)}), ("add", {"args": (3,), "rate_limit": "mails"})])
    with producer.batch():
        batched = add.delay(5)
    later = add.apply_async((1,), countdown=1000)
    keyed = add.apply_async((7,), correlation_key="only", concurrency_key="k")
    with pytest.raises(DuplicateError) as refused:
        add.apply_async((7,), correlation_key="only")
    assert refused.value.existing_id == keyed.id
    order = producer.insert("order", correlation_key="order:1")
    drain(owner, with_scheduled=False)
    assert [result.get(timeout=10) for result in (one, *many, batched, keyed)] == [2, 3, 4, 6, 8]
    assert later.status == "scheduled"
    assert order.status == "awaiting_signal"
    assert producer.signal("order:1", "paid", {"amount": 3}, dedup_key="e1")
    assert not producer.signal(order.id, "paid", {"amount": 3}, dedup_key="e1")
    assert producer.signal_many([{"target": order.id, "name": "other"}]) == [True]
    drain(owner, with_scheduled=False)
    assert order.get(timeout=10) == [{"amount": 3}]


def test_a_producer_does_so_in_coroutines_and_in_its_own_transactions(
    producer: Durable, owner: Durable, schema: str
) -> None:
    async def produce() -> list[Any]:
        try:
            add = producer.find_task("add")
            results = [await add.adelay(1), *await producer.ainsert_many([("add", {"args": (2,)})])]
            order = await producer.ainsert("order")
            await asyncio.to_thread(drain, owner, with_scheduled=False)
            await producer.asignal(order.id, "paid", 1)
            await asyncio.to_thread(drain, owner, with_scheduled=False)
            return [await result.aget(timeout=10) for result in [*results, order]]
        finally:
            await producer.aclose()

    assert asyncio.run(produce()) == [2, 3, [1]]
    with psycopg.connect(producer.dsn()) as connection:
        result = producer.find_task("add").apply_async((4,), connection=connection)
    drain(owner, with_scheduled=False)
    assert result.get(timeout=10) == 5


@pytest.mark.parametrize(
    "act",
    [
        lambda app, id: app.cancel(id),
        lambda app, id: app.retry(id),
        lambda app, id: app.pause("default"),
        lambda app, id: app.resume("default"),
        lambda app, id: list(app.children_of(id)),
    ],
    ids=["cancel", "retry", "pause", "resume", "children"],
)
def test_a_producer_is_refused_the_rest_of_the_api(
    producer: Durable, owner: Durable, act: Callable[[Durable, int], Any]
) -> None:
    waiting = owner.find_task("add").delay(1)
    with pytest.raises(DatabaseUnavailableError, match="the database role may not do this: permission denied"):
        act(producer, waiting.id)
    assert waiting.status == "runnable"


FORBIDDEN = {
    "read states": "SELECT state FROM {schema}.instances",
    "read states of finished ones": "SELECT state FROM {schema}.history",
    "read payloads of signals": "SELECT payload FROM {schema}.signals",
    "read everything in the view": "SELECT * FROM {schema}.instance_view",
    "read signals in the view": "SELECT * FROM {schema}.signal_view",
    "claim": "UPDATE {schema}.instances SET status = 'executing', worker_id = 1, token = token + 1",
    "finish": "UPDATE {schema}.instances SET status = 'done', finished_at = now()",
    "write a result": "UPDATE {schema}.instances SET result = 'x', result_type = 'json'",
    "write a state": "UPDATE {schema}.instances SET state = 'x'",
    "insert something finished": "INSERT INTO {schema}.instances (finished_at) VALUES (now())",
    "delete": "DELETE FROM {schema}.instances",
    "delete from history": "DELETE FROM {schema}.history",
    "write history": "UPDATE {schema}.history SET status = 'done'",
    "consume signals": "DELETE FROM {schema}.signals",
    "take a lease": "UPDATE {schema}.workers SET expires_at = now()",
    "look at workers": "SELECT * FROM {schema}.workers",
    "schedule": "SELECT * FROM {schema}.schedules",
    "take a duty": "UPDATE {schema}.duties SET ran_at = now()",
    "pause": "INSERT INTO {schema}.queues (name, paused_at) VALUES ('default', now())",
    "change limits": "UPDATE {schema}.limits SET allowed = 1",
    "draw tokens": "SELECT * FROM {schema}.buckets",
    "forge a migration": "INSERT INTO {schema}.migrations VALUES (99, 'x', 'x', true)",
    "make a partition": "SELECT {schema}.make_partition('2020-01-01')",
    "drop a partition": "SELECT {schema}.drop_partition(current_date)",
    "thin a partition": "SELECT {schema}.thin_partition(current_date, '{{}}')",
}
DDL = {
    "truncate": "TRUNCATE {schema}.instances",
    "create": "CREATE TABLE {schema}.mine (id int)",
    "alter": "ALTER TABLE {schema}.instances ADD COLUMN mine int",
    "drop": "DROP TABLE {schema}.instances CASCADE",
    "drop the schema": "DROP SCHEMA {schema} CASCADE",
    "rule": "CREATE RULE mine AS ON INSERT TO {schema}.instances DO INSTEAD NOTHING",
    "grant": "GRANT ALL ON {schema}.migrations TO PUBLIC",
    "forge a migration": "INSERT INTO {schema}.migrations VALUES (99, 'x', 'x', true)",
}


def refused(dsn: str, schema: str, statement: str) -> bool:
    with psycopg.connect(dsn) as connection:
        try:
            connection.execute(statement.format(schema=f'"{schema}"').encode())
        except psycopg.errors.InsufficientPrivilege:
            return True
        if statement.startswith("GRANT"):  # Postgres only warns
            row = connection.execute(
                "SELECT has_table_privilege('public', %s, 'INSERT')", (f'"{schema}".migrations',)
            ).fetchone()
            return row is not None and not row[0]
        return False


def test_a_producers_role_is_refused_all_else_by_the_database(owner: Durable, role: Role, schema: str) -> None:
    owner.find_task("add").delay(1)
    dsn = role("producer")
    allowed = [what for what, sql in {**FORBIDDEN, **DDL}.items() if not refused(dsn, schema, sql)]
    assert allowed == []


def test_a_workers_role_changes_no_table_and_forges_no_migration(owner: Durable, role: Role, schema: str) -> None:
    dsn = role("worker")
    assert [what for what, sql in DDL.items() if not refused(dsn, schema, sql)] == []


def test_a_role_without_a_grant_sees_nothing(owner: Durable, role: Role, schema: str) -> None:
    dsn = role("")
    assert [what for what, sql in {**FORBIDDEN, **DDL}.items() if not refused(dsn, schema, sql)] == []
    stranger = shop(dsn, schema)
    with pytest.raises(DurableError):
        stranger.find_task("add").delay(1)
    stranger.close()


def test_a_producer_gets_no_lease_and_claims_nothing(owner: Durable, role: Role, schema: str, rows: Rows) -> None:
    owner.find_task("add").delay(1)
    lease = rows.worker()
    producer = Rows(role("producer"), schema)
    try:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            producer.run(workers.register(Identity("worker", "x", "h", "b", 1, 1, "s", "default"), 60))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            producer.run(claims.claim(lease, "default", 1, HEAD, 0, ()))
    finally:
        producer.close()


def test_a_worker_command_and_a_beat_run_under_the_workers_role(
    owner: Durable, role: Role, schema: str, tmp_path: Path, durable_worker: Callable[..., Any], rows: Rows
) -> None:
    """Claims, commits, signals, children, limits, ctx.connection, missing partitions and garbage collection."""
    (tmp_path / "tasks.py").write_text(f"""
from durable import Await, Done, Durable, Machine, RateLimit, ScheduleChildren, every, step
app = Durable("shop", dsn={role("worker")!r}, schema={schema!r}, rate_limits={{"mails": RateLimit(100)}},
              retention=3600, gc_interval=1)

@app.task(name="add")
def add(a, b=1):
    return a + b

@app.task(name="write", bind=True)
def write(ctx):
    return ctx.connection.execute("SELECT 5").fetchone()[0]

@app.periodic(every(1))
@app.task(name="tick")
def tick():
    return None

@app.machine(name="order")
class Order(Machine):
    @step(initial=True)
    def begin(self, ctx):
        return Await(["paid"], then=self.paid)

    @step
    def paid(self, ctx):
        return ScheduleChildren([(add, {{"args": (1,)}}), (add, {{"args": (2,)}})], then=self.end)

    @step
    def end(self, ctx):
        return Done(sum(child.result for child in ctx.children))
""")
    rows.fetch(
        "CREATE TABLE {schema}.history_20200101 PARTITION OF {schema}.history"
        " FOR VALUES FROM ('2020-01-01 00:00:00+00') TO ('2020-01-02 00:00:00+00')"
    )
    today = rows.fetch("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD') AS day")[0]["day"]
    rows.fetch(f"DROP TABLE {{schema}}.history_{today}")
    command = durable_worker("worker", "-c", "2")
    beat = durable_worker("beat")
    order = owner.insert("order")
    wait_until(lambda: order.status == "awaiting_signal", what="the park")
    owner.signal(order.id, "paid")
    assert order.get(timeout=20) == 5
    assert owner.find_task("add").apply_async((1,), rate_limit="mails", concurrency_key="k").get(timeout=20) == 2
    rows.insert(1, machine="write")
    wait_until(lambda: rows.fetch("SELECT FROM {schema}.history WHERE machine = 'write' AND status = 'done'"))
    wait_until(lambda: rows.fetch("SELECT FROM {schema}.history WHERE machine = 'tick' AND status = 'done'"))
    wait_until(
        lambda: rows.fetch("SELECT to_regclass('{schema}.history_20200101') IS NULL AS gone")[0]["gone"],
        what="the drop of a partition past retention",
    )
    assert command.stop() == 0
    assert beat.stop() == 0
    assert "permission denied" not in command.output() + beat.output()


def test_an_admins_role_owns_the_schema_and_may_migrate(
    owner: Durable, role: Role, schema: str, durable: Callable[..., Ran], rows: Rows
) -> None:
    dsn = role("admin")
    rows.fetch(
        "DROP FUNCTION {schema}.make_partition(date), {schema}.drop_partition(date),"
        " {schema}.thin_partition(date, bigint[])"
    )
    rows.fetch("DELETE FROM {schema}.migrations WHERE id = 10")
    ran = durable("migrate", "--dsn", dsn, "--schema", schema, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["applied"] == ["0010_partition_functions"]
    assert durable("migrate", "--status", "--dsn", dsn, "--schema", schema).code == 0
    for kind in ("worker", "producer"):
        ran = durable("migrate", "--dsn", role(kind), "--schema", f"{schema}_x")
        assert (ran.code, "permission denied" in ran.err) == (3, True)
    admin = shop(dsn, schema)
    result = admin.find_task("add").delay(1)
    drain(admin)
    assert result.get(timeout=10) == 2
    admin.close()


def test_the_command_grants_and_says_so_and_can_be_given_again(
    owner: Durable, role: Role, schema: str, database: str, durable: Callable[..., Ran]
) -> None:
    dsn = role("")
    name = str(conninfo_to_dict(dsn)["user"])
    for _ in range(2):
        ran = durable("migrate", "--dsn", database, "--schema", schema, "--grant", f"producer={name}")
        assert (ran.code, f"granted producer to {name}\n" in ran.out) == (0, True), ran.err
    producer = shop(dsn, schema)
    producer.find_task("add").delay(1)
    producer.close()
    ran = durable("migrate", "--sql", "--schema", schema, "--dsn", database, "--grant", f"worker={name}")
    assert ran.code == 0
    assert 'TO "' + name.replace('"', '""') + '";' in ran.out


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        ("producer", 2, "must be one of producer=ROLE, worker=ROLE, admin=ROLE"),
        ("king=arthur", 2, "must be one of"),
        ("producer=", 2, "a role's name must be 1 to 63 bytes"),
        ("producer=no such role", 3, "there is no role 'no such role'"),
        ("producer=PUBLIC", 3, "there is no role 'PUBLIC'"),
        ('worker=x"; DROP SCHEMA public; --', 3, "there is no role"),
    ],
)
def test_a_wrong_grant_is_named_and_grants_nothing(
    owner: Durable, schema: str, database: str, durable: Callable[..., Ran], value: str, code: int, says: str
) -> None:
    ran = durable("migrate", "--dsn", database, "--schema", schema, "--grant", value)
    assert (ran.code, says in ran.error) == (code, True), ran.err


def test_partition_functions_are_nobodys_but_the_owners_and_keep_their_search_path(owner: Durable, rows: Rows) -> None:
    found = rows.fetch(
        "SELECT proname, prosecdef, proconfig, proacl::text AS acl FROM pg_proc WHERE pronamespace = %s::regnamespace",
        [rows.schema],
    )
    assert sorted(row["proname"] for row in found) == ["drop_partition", "make_partition", "thin_partition"]
    for row in found:
        assert row["prosecdef"]
        assert row["proconfig"] == ["search_path=pg_catalog, pg_temp"]
        assert "{=" not in row["acl"], "PUBLIC may call it"
        assert ",=" not in row["acl"], "PUBLIC may call it"
