"""What a SQLSTATE means: every error of the server that has a meaning of ours, raised by a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from durable import Context, Done, Durable, Machine, step
from durable.errors import DatabaseUnavailableError, DurableError, SchemaError, ValidationError
from durable.outcomes import Await
from durable.storage.session import _MEANINGS
from tests.fix_db import wait_until

RAISE = "DO $$ BEGIN RAISE EXCEPTION 'made by a test' USING ERRCODE = '{}'; END $$"
OTHERS: dict[str, tuple[type[Exception], str]] = {
    "42P01": (SchemaError, "run `durable migrate`"),
    "3F000": (SchemaError, "run `durable migrate`"),
    "42703": (SchemaError, "run `durable migrate`"),
    "42883": (SchemaError, "run `durable migrate`"),
    "22021": (ValidationError, "ENCODING 'UTF8'"),
    "22P05": (ValidationError, "ENCODING 'UTF8'"),
    "08006": (DatabaseUnavailableError, "can't be reached: made by a test"),
    "58030": (DatabaseUnavailableError, r"refused the call: made by a test \(SQLSTATE 58030\)"),
    "P0001": (psycopg.errors.RaiseException, "made by a test"),
}
MEANT = {**dict.fromkeys(_MEANINGS, (DatabaseUnavailableError, "made by a test; ")), **OTHERS}


@pytest.mark.parametrize("state", MEANT)
def test_sqlstate_decides_the_error(app: Durable, state: str) -> None:
    kind, says = MEANT[state]
    with pytest.raises(kind, match=says), app._pool.connection() as own:
        own.execute(RAISE.format(state))


@pytest.fixture
def losing(app: Durable, rows: Any) -> Iterator[Callable[..., None]]:
    """Make inserts of instances lose their transaction with a SQLSTATE: all of them, or so many from now on."""

    def lose(state: str, times: int = 1_000_000) -> None:
        # A sequence, because it outlives the transactions that are rolled back.
        rows.fetch("CREATE SEQUENCE {schema}.lost")
        body = (
            f"IF nextval('{app.schema}.lost') <= {times} THEN RAISE EXCEPTION 'lost' USING ERRCODE = '{state}'; END IF"
        )
        rows.fetch(
            f"CREATE FUNCTION {{schema}}.lose() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body}; RETURN NULL; END$$"
        )
        rows.fetch("CREATE TRIGGER lose BEFORE INSERT ON {schema}.instances EXECUTE FUNCTION {schema}.lose()")

    yield lose
    rows.fetch("DROP FUNCTION {schema}.lose() CASCADE")
    rows.fetch("DROP SEQUENCE {schema}.lost")


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_caller_sees_its_lost_transaction(app: Durable, database: str, losing: Callable[..., None], state: str) -> None:
    task = app.task(name="task")(lambda: None)
    losing(state)
    with psycopg.connect(database) as theirs:
        with pytest.raises(psycopg.OperationalError) as caught:
            task.apply_async(connection=theirs)
        assert caught.value.sqlstate == state
        theirs.rollback()


class Sleeping:
    """Two machines that wait for a signal, and a session that locks them in the other order than `signal_many`."""

    def __init__(self, app: Durable) -> None:
        @app.machine(name="sleeper")
        class Sleeper(Machine):
            @step(initial=True)
            def wait(self, ctx: Context[Any]) -> Await:
                return Await("go", then=self.go)

            @step
            def go(self, ctx: Context[Any]) -> Done:
                return Done()

        self.ids = [app.insert(Sleeper).id for _ in range(2)]
        self.lock = f"SELECT FROM {app.schema}.instances WHERE id = %s FOR UPDATE"
        self.messages = [{"target": target, "name": "go"} for target in self.ids]


def test_deadlocked_write_is_made_again(
    app: Durable, database: str, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    sleeping = Sleeping(app)
    told: list[Any] = []
    with psycopg.connect(database) as other:
        other.execute("SET deadlock_timeout = '60s'")  # so that it is ours that is ended
        other.execute(sleeping.lock, [sleeping.ids[1]])
        with app._pool.connection() as own:
            own.execute("SET deadlock_timeout = '1s'")
            pid = own.info.backend_pid
        thread = threading.Thread(target=lambda: told.append(app.signal_many(sleeping.messages)))
        thread.start()
        waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: connection.execute(waits, [pid]).fetchone() == (True,), what="a write that waits")
        other.execute(sleeping.lock, [sleeping.ids[0]])  # returns once ours has lost
        other.commit()
        thread.join(20)
    assert told == [[True, True]]


def test_async_write_is_made_again(app: Durable, losing: Callable[..., None]) -> None:
    task = app.task(name="task")(lambda: None)
    losing("40P01", 2)

    async def main() -> None:
        assert await (await task.adelay()).astatus() == "runnable"
        await app.aclose()

    asyncio.run(main())


def test_endless_deadlocks_say_nothing_is_written(app: Durable, losing: Callable[..., None]) -> None:
    task = app.task(name="task")(lambda: None)
    losing("40P01")
    with pytest.raises(DurableError, match="other transactions were in the way: lost; nothing was written: call again"):
        task.delay()
