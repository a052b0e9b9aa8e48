"""Django's connections in real workers: closed before a fork, and replaced when they were cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from durable import Durable, Machine, step
from tests.fix_app import Command
from tests.fix_db import wait_until

TASKS = """
    import os
    import django
    from django.conf import settings
    from django.db import connection, connections
    from asgiref.sync import sync_to_async
    from durable import Done, Machine, Retry, Stop, step

    postgres = {postgres}
    settings.configure(USE_TZ=True, LOGGING_CONFIG=None, DATABASES={{
        "default": {{**postgres, "CONN_MAX_AGE": 600}},
        "short": postgres,
        "pooled": {{**postgres, "OPTIONS": {{"pool": True}} if django.VERSION >= (5, 1) else {{}}}},
        "lite": {{"ENGINE": "django.db.backends.sqlite3", "NAME": os.path.abspath("lite.sqlite3")}},
    }})
    django.setup()

    def backend(alias="default"):
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return cursor.fetchone()[0]

    open("imported", "w").write(str(backend()))
    at_import = backend("pooled")

    options = dict(max_attempts=2, backoff=lambda attempt: 0)

    @app.task(name="plain", **options)
    def plain(): return backend()

    @app.task(name="coroutine", **options)
    async def coroutine(): return await sync_to_async(backend)()

    @app.machine(name="machine")
    class M(Machine):
        @step(initial=True)
        def go(self, ctx): return Done(backend())
        def handle(self, error, ctx): return Done(backend())

    @app.machine(name="amachine")
    class A(Machine):
        @step(initial=True)
        async def go(self, ctx): return Done(await sync_to_async(backend)())
        def handle(self, error, ctx): return Retry() if ctx.attempt == 0 else Stop(error)

    @app.task(name="open_after")
    def open_after(): return [connections[alias].connection is not None for alias in ("default", "short")]

    @app.task(name="pooled")
    def pooled(): return [at_import, backend("pooled")]

    @app.task(name="short")
    def short(): return backend("short")

    @app.task(name="leave_atomic")
    def leave_atomic():
        from django.db import transaction
        transaction.atomic().__enter__()
        return backend()

    @app.task(name="in_atomic")
    def in_atomic(): return connection.in_atomic_block

    @app.task(name="lite")
    def lite():
        with connections["lite"].cursor() as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS notes (n int)")
            cursor.execute("INSERT INTO notes VALUES (1)")
            cursor.execute("SELECT count(*) FROM notes")
            return cursor.fetchone()[0]

    @app.task(name="iterate")
    async def iterate(name):
        # What `aiterator` does: a server-side cursor that is read in several calls of sync_to_async.
        def begin():
            connection.ensure_connection()
            cursor = connection.chunked_cursor()
            cursor.execute("SELECT generate_series(1, 10)")
            return cursor
        cursor = await sync_to_async(begin)()
        first = await sync_to_async(cursor.fetchone)()
        open(name, "w").write("begun")
        while not os.path.exists(name + ".go"):
            await asyncio.sleep(0.01)
        return [first[0], *[row[0] for row in await sync_to_async(cursor.fetchall)()]]
"""


@pytest.fixture
def django_worker(
    tasks_module: Callable[[str], Path], database: str, durable_worker: Callable[..., Command]
) -> Callable[..., Command]:
    """Start a worker of that pool, whose tasks.py has asked the database by Django when it was imported."""
    dsn = conninfo_to_dict(database)
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    postgres = {key: str(dsn.get(name) or "") for key, name in names.items()}
    postgres["ENGINE"] = "django.db.backends.postgresql"
    body = TASKS.format(postgres=repr(postgres)).replace("import os\n", "import asyncio\n    import os\n", 1)
    tasks_module(body)

    def start(pool: str, slots: int = 1) -> Command:
        return durable_worker("worker", "-P", pool, "-c", str(slots))

    return start


POOLS = pytest.mark.parametrize("pool", ["prefork", "threads", "asyncio"])


@pytest.fixture
def targets(app: Durable) -> dict[str, Any]:
    """The tasks as a producer sees them."""
    found: dict[str, Any] = {
        name: app.task(name=name)(lambda: None)
        for name in ("plain", "open_after", "short", "pooled", "leave_atomic", "in_atomic", "lite")
    }
    found["iterate"] = app.task(name="iterate")(lambda name: None)

    @app.task(name="coroutine")
    async def coroutine() -> None: ...

    class M(Machine):
        @step(initial=True)
        def go(self, ctx: Any) -> None: ...

    found["coroutine"] = coroutine
    found["machine"] = app.machine(name="machine")(M)
    found["amachine"] = app.machine(name="amachine")(type("A", (M,), {}))
    return found


def alive(connection: psycopg.Connection[Any], pid: int) -> bool:
    return bool(connection.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]).fetchall())


@POOLS
def test_steps_recover_from_a_cut_connection(
    pool: str,
    targets: dict[str, Any],
    django_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    django_worker(pool)
    imported = int((tmp_path / "imported").read_text())
    wait_until(lambda: not alive(connection, imported), what="the end of the connection made at import")
    for name in ("plain", "coroutine", "machine", "amachine"):
        first = targets[name].delay().get(timeout=20)
        assert first != imported
        for _ in range(2):
            connection.execute("SELECT pg_terminate_backend(%s)", [first])
            wait_until(lambda first=first: not alive(connection, first), what="the end of a backend")
            again = targets[name].delay().get(timeout=20)
            assert again != first, name
            first = again


def test_connections_end_with_the_step_by_default(
    targets: dict[str, Any], django_worker: Callable[..., Command], connection: psycopg.Connection[Any]
) -> None:
    django_worker("prefork")
    pid = targets["short"].delay().get(timeout=20)
    wait_until(lambda: not alive(connection, pid), what="the end of the connection")
    kept = targets["plain"].delay().get(timeout=20)
    assert targets["open_after"].delay().get(timeout=20) == [True, False], "CONN_MAX_AGE is kept to"
    assert targets["plain"].delay().get(timeout=20) == kept


def test_a_pool_used_at_import_is_made_anew(
    targets: dict[str, Any], django_worker: Callable[..., Command], connection: psycopg.Connection[Any]
) -> None:
    command = django_worker("prefork")
    at_import, pid = targets["pooled"].delay().get(timeout=20)
    assert at_import != pid
    wait_until(lambda: not alive(connection, at_import), what="the end of the pool's connection")
    assert "importing the app started threads" not in command.output()
    assert "was opened before the worker processes are forked" not in command.output()


def test_an_open_transaction_ends_with_its_step(
    targets: dict[str, Any], django_worker: Callable[..., Command], connection: psycopg.Connection[Any]
) -> None:
    command = django_worker("prefork")
    pid = targets["leave_atomic"].delay().get(timeout=20)
    assert targets["in_atomic"].delay().get(timeout=20) is False
    wait_until(lambda: not alive(connection, pid), what="the end of its session")
    assert "left a transaction of Django's 'default' open" in command.output()


def test_a_file_of_sqlite_serves_step_after_step(
    targets: dict[str, Any], django_worker: Callable[..., Command]
) -> None:
    django_worker("prefork")
    assert [targets["lite"].delay().get(timeout=20) for _ in range(3)] == [1, 2, 3]


def test_a_step_leaves_its_neighbours_connection(
    targets: dict[str, Any], django_worker: Callable[..., Command], tmp_path: Path
) -> None:
    """One iterates while another begins and ends, whose connections are closed."""
    django_worker("asyncio", 2)
    reading = targets["iterate"].delay("reading")
    wait_until((tmp_path / "reading").exists, what="the first row")
    assert targets["coroutine"].delay().get(timeout=20)
    (tmp_path / "reading.go").touch()
    assert reading.get(timeout=20) == list(range(1, 11))
