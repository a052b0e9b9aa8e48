"""Timeouts of the server that are set low for our role while work goes on, and back again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from durable import AsyncResult, Context, Done, Machine, step
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.surroundings.load import Load
from tests.surroundings.server import ROLE, OwnServer

# The step itself is quick, or slow while nothing is sent; a machine without a `handle` fails at its first error.
NOTE = """
from durable import Done, Machine, Retry, step

@app.machine(name="note")
class Note(Machine):
    @step(initial=True)
    def note(self, ctx):
        ctx.connection.execute("INSERT INTO around.notes VALUES (%s)", [ctx.id])
        {nap}
        return Done()
    {handle}
"""
NAP = "if os.path.exists('nap'): time.sleep(1.2)"
HANDLE = """
    def handle(self, error, ctx):
        return Retry(delay=0.1)
"""


@contextmanager
def locked(server: OwnServer) -> Iterator[None]:
    """Keep everybody from the table of instances."""
    with psycopg.connect(server.admin) as holder:
        holder.execute("LOCK TABLE around.instances IN ACCESS EXCLUSIVE MODE")
        yield
        holder.rollback()


def a_note(producing: Load, server: OwnServer) -> type[Machine]:
    """The machine as the producer knows it, and the table that it writes."""
    server.run("CREATE TABLE around.notes (id bigint)")
    server.run(f"GRANT ALL ON around.notes TO {ROLE}")

    @producing.app.machine(name="note")
    class Note(Machine):
        @step(initial=True)
        def note(self, ctx: Context[Any]) -> Done: ...

    return Note


def inserted(note: type[Machine], count: int, producing: Load, server: OwnServer) -> list[AsyncResult[Any]]:
    """Insert so many, by somebody who has all the time in the world."""
    with psycopg.connect(server.admin, autocommit=True) as patient:
        return producing.app.insert_many([(note, {})] * count, connection=patient)


def written(server: OwnServer) -> list[int]:
    """The ids that steps have written, each as often as it was."""
    return [row[0] for row in server.run("SELECT id FROM around.notes ORDER BY 1")]


@contextmanager
def lowered(server: OwnServer, setting: str) -> Iterator[None]:
    """Have every session of the role that begins within the block, all of them, so impatient."""
    server.run(f"ALTER ROLE {ROLE} SET {setting} = '500ms'")
    assert server.recycle() >= 3
    yield
    server.run(f"ALTER ROLE {ROLE} RESET {setting}")
    server.recycle()


@pytest.mark.parametrize("setting", ["statement_timeout", "lock_timeout"])
def test_role_timeout_ends_only_statements_of_steps(
    own_server: Callable[..., OwnServer],
    load: Callable[..., Load],
    durable_worker: Callable[..., Command],
    setting: str,
) -> None:
    server = own_server()
    producing = load(server.dsn, server.admin, more=NOTE.format(nap="time.sleep(0.03)", handle=""))
    note = a_note(producing, server)
    worker = durable_worker("worker", "-c", "2", **producing.environment)
    before = worker.started(count=3)
    producing.start()
    said = f"canceling statement due to {setting.replace('_', ' ')}"

    notes = []
    with lowered(server, setting):
        newcomer = durable_worker("worker", "-c", "1", **producing.environment)
        for _ in range(3):
            notes += inserted(note, 20, producing, server)
            producing.progress(5)
            with locked(server):
                # A producer and a worker wait for longer than twice the role's timeout.
                time.sleep(1.2)
    assert server.said(said) > 0
    if setting != "lock_timeout":  # a worker's own is shorter than this lock
        assert not [line for line in worker.output().splitlines() if said in line and "trying on" in line]
    assert producing.said(said) == 0

    producing.progress()
    producing.finished()
    assert worker.children() == before
    producing.settle()
    assert [result.get(timeout=5) for result in notes] == [None] * len(notes)
    assert written(server) == sorted(result.id for result in notes)
    assert f"{setting} is 500 ms" in newcomer.output()
    assert (worker.stop(), newcomer.stop()) == (0, 0)


def test_transactions_that_are_ended_for_idling_lose_nothing_and_are_done_once_they_may_take_their_time(
    own_server: Callable[..., OwnServer],
    load: Callable[..., Load],
    durable_worker: Callable[..., Command],
    tmp_path: Any,
) -> None:
    server, nap, setting = own_server(), tmp_path / "nap", "idle_in_transaction_session_timeout"
    producing = load(server.dsn, server.admin, more=NOTE.format(nap=NAP, handle=HANDLE))
    note = a_note(producing, server)
    worker = durable_worker("worker", "-c", "2", **producing.environment)
    before = worker.started(count=3)
    producing.start()

    nap.touch()
    with lowered(server, setting):
        newcomer = durable_worker("worker", "-c", "1", **producing.environment)
        notes = inserted(note, 10, producing, server)
        wait_until(
            lambda: server.said("terminating connection due to idle-in-transaction timeout") >= 5, what="ended sessions"
        )
    nap.unlink()

    producing.progress()
    assert worker.children() == before
    producing.settle()
    assert [result.get(timeout=5) for result in notes] == [None] * len(notes)
    assert written(server) == sorted(result.id for result in notes)
    assert f"{setting} is 500 ms" in newcomer.output()
    assert (worker.stop(), newcomer.stop()) == (0, 0)
