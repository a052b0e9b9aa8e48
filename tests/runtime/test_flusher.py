"""Group commit under faults, on a real connection whose failures are injected at named points."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from durable import Durable
from durable.instance import Claimed, NewInstance, Payload
from durable.runtime import failures
from durable.runtime import flusher as flusher_module
from durable.runtime.flusher import Flusher
from durable.runtime.identity import own
from durable.runtime.link import Link, Stopped
from durable.runtime.picker import Picker
from durable.storage import claims, workers
from durable.storage.claims import Commit

DONE = Payload("json", b'"ok"')


class Bench:
    """A link, a lease and a flusher, as an engine would have them."""

    def __init__(self, app: Durable) -> None:
        self.app = app
        self.pauses = 0
        self.link = Link(app.dsn, app.sql, "test", pooler=False, most_wait=0.1, pause=self._pause)
        self.worker = self.link.run(workers.register(own("worker", "bench", "default"), 60))
        self.picker = Picker(self.link, "default")
        self.flusher = Flusher(self.link, self._pause)

    def _pause(self, seconds: float) -> bool:
        self.pauses += 1
        time.sleep(min(seconds, 0.01))
        return self.pauses > 200

    def claim(self, count: int) -> list[Claimed]:
        task = self.app.task(name="noop")(_noop)
        with self.app.batch():
            for _ in range(count):
                task.delay()
        rows = self.picker.claim(self.worker, count)
        assert len(rows) == count
        return rows


def _noop() -> None: ...


@pytest.fixture
def bench(app: Durable) -> Iterator[Bench]:
    bench = Bench(app)
    yield bench
    bench.link.drop()


def statuses(app: Durable, connection: psycopg.Connection[Any]) -> dict[int, tuple[str, int]]:
    query = f"SELECT id, status::text, version FROM {app.schema}.instance_view"
    return {row[0]: (row[1], row[2]) for row in connection.execute(query).fetchall()}


def test_a_lost_commit_answer_is_submitted_again_and_counts_as_committed(
    bench: Bench, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench.claim(5)
    real: Callable[..., claims.Flushed] = claims.flush
    calls = []

    def lose_the_first_answer(link: Any, *args: Any) -> claims.Flushed:
        flushed = real(link, *args)
        calls.append(len(flushed.committed))
        if len(calls) == 1:
            link.close()
            raise psycopg.OperationalError("the answer was lost")
        return flushed

    monkeypatch.setattr(flusher_module.claims, "flush", lose_the_first_answer)
    committed = bench.flusher.flush(bench.worker, [Commit(row, "done", DONE) for row in rows]).committed

    assert calls == [5, 0]
    assert committed == {row.id for row in rows}
    assert set(statuses(bench.app, connection).values()) == {("done", 1)}


def test_a_connection_lost_before_the_commit_costs_nothing_either(
    bench: Bench, connection: psycopg.Connection[Any]
) -> None:
    rows = bench.claim(5)
    backend = bench.link.connection.info.backend_pid
    connection.execute("SELECT pg_terminate_backend(%s, 5000)", (backend,))

    committed = bench.flusher.flush(bench.worker, [Commit(row, "done", DONE) for row in rows]).committed

    assert committed == {row.id for row in rows}


def test_one_outcome_that_the_database_refuses_fails_alone(bench: Bench, connection: psycopg.Connection[Any]) -> None:
    rows = bench.claim(41)
    connection.execute(
        f"ALTER TABLE {bench.app.schema}.history"
        " ADD CONSTRAINT no_poison CHECK (result IS DISTINCT FROM 'poison'::bytea)"
    )
    batch = [Commit(row, "done", DONE) for row in rows]
    batch[17].result = Payload("json", b"poison")

    committed = bench.flusher.flush(bench.worker, batch).committed

    assert committed == {row.id for row in rows}
    ended = statuses(bench.app, connection)
    assert ended.pop(rows[17].id) == ("failed", 1)
    assert set(ended.values()) == {("done", 1)}
    error = bench.app.result(rows[17].id).error
    assert error is not None
    assert "no_poison" in error.message


def test_a_missing_partition_is_made_and_the_flush_repeated(bench: Bench, connection: psycopg.Connection[Any]) -> None:
    rows = bench.claim(3)
    names = connection.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = %s::regclass",
        (f"{bench.app.schema}.history",),
    ).fetchall()
    for (name,) in names:
        connection.execute(f"DROP TABLE {name}")

    committed = bench.flusher.flush(bench.worker, [Commit(row, "done", DONE) for row in rows]).committed

    assert committed == {row.id for row in rows}
    assert set(statuses(bench.app, connection).values()) == {("done", 1)}


def test_a_stale_outcome_in_a_batch_is_reported_and_the_others_commit(
    bench: Bench, connection: psycopg.Connection[Any]
) -> None:
    rows = bench.claim(4)
    taken = rows[1]
    bench.link.run_atomically(claims.release(bench.worker, [(taken.id, taken.token)]))

    committed = bench.flusher.flush(bench.worker, [Commit(row, "done", DONE) for row in rows]).committed

    assert committed == {row.id for row in rows} - {taken.id}
    assert statuses(bench.app, connection)[taken.id] == ("runnable", 0)


def test_a_flush_that_can_never_succeed_ends_when_the_process_must(bench: Bench, database: str) -> None:
    rows = bench.claim(1)
    bench.link.drop()
    bench.link._dsn = lambda: "host=/nowhere"  # the database is gone for good

    with pytest.raises(Stopped):
        bench.flusher.flush(bench.worker, [Commit(rows[0], "done", DONE)])


@pytest.fixture(scope="module", params=["LATIN1", "SQL_ASCII"])
def narrow(request: pytest.FixtureRequest, server_dsn: str) -> Iterator[Durable]:
    """An app on a database whose encoding lacks most letters."""
    name = f"narrow_{os.urandom(4).hex()}"
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        admin.execute(
            f"CREATE DATABASE {name} ENCODING '{request.param}' TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C'"
        )
        app = Durable("narrow", dsn=psycopg.conninfo.make_conninfo(server_dsn, dbname=name))
        app.migrate()
        yield app
        app.close()
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


FOREIGN = failures.error_json(ValueError("\u65e5\U0001f600"))
OUTCOMES: dict[str, Callable[[Claimed], Commit]] = {
    "failed": lambda row: Commit(row, "failed", error=FOREIGN),
    "stopped": lambda row: Commit(row, "failed", DONE, error=FOREIGN),
    "retry": lambda row: Commit(row, "scheduled", error=FOREIGN, delay=60.0, attempt=1),
    "next": lambda row: Commit(row, "runnable", kind="next", step="\u65e5"),
    "await": lambda row: Commit(row, "awaiting_signal", kind="await", step="b", awaits=("\u65e5",)),
    "children": lambda row: Commit(
        row, "awaiting_children", kind="children", step="b", children=[NewInstance("\u65e5", Payload("json", b"{}"))]
    ),
}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_foreign_letters_end_the_attempt_once(narrow: Durable, kind: str) -> None:
    bench = Bench(narrow)
    (row,) = bench.claim(1)
    assert bench.flusher.flush(bench.worker, [OUTCOMES[kind](row)]).committed == {row.id}
    assert bench.pauses == 0
    status, error = narrow.result(row.id).status, narrow.fetch(row.id).error  # type: ignore[union-attr]
    if kind == "retry":
        assert (status, error and error["message"]) == ("scheduled", r"\u65e5\U0001f600")
    elif kind in ("failed", "stopped"):
        assert (status, error and error["message"]) == ("failed", r"\u65e5\U0001f600")
    elif status == "failed":
        assert "the database refused this outcome" in error["message"]  # type: ignore[index]
    bench.link.drop()
