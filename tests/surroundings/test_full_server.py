"""A server whose every connection somebody else has taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg

from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.surroundings.load import Load
from tests.surroundings.server import OwnServer

CONNECTIONS, RESERVED = 20, 3
ROOM = CONNECTIONS - RESERVED
FULL = ("too many clients", "remaining connection slots are reserved")


def connected(server: OwnServer) -> set[int]:
    """The pids of worker processes, and of commands for their agents, that have a session: it is named for them."""
    sessions = "SELECT substring(application_name FROM '[0-9]+')::int FROM pg_stat_activity"
    return {row[0] for row in server.run(f"{sessions} WHERE application_name ~ '^durable around (worker|agent)'")}


@contextmanager
def full(server: OwnServer) -> Iterator[None]:
    """Take every connection that an ordinary role may have, away from those who have one too."""
    taken: list[psycopg.Connection[tuple[object, ...]]] = []

    def nothing_is_left() -> bool:
        server.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'durable %'")
        with suppress(psycopg.OperationalError):
            while len(taken) < ROOM:
                taken.append(psycopg.connect(server.dsn))
        return len(taken) == ROOM

    try:
        wait_until(nothing_is_left, what="a server full of bystanders")
        yield
    finally:
        for bystander in taken:
            bystander.close()


def test_a_full_server_is_waited_for_by_workers_old_and_new_and_producers_are_told_why(
    own_server: Callable[..., OwnServer], load: Callable[..., Load], durable_worker: Callable[..., Command]
) -> None:
    server = own_server(max_connections=CONNECTIONS, superuser_reserved_connections=RESERVED)
    producing = load(server.dsn, server.admin)
    worker = durable_worker("worker", "-c", "2", **producing.environment)
    before = worker.started(count=3)
    old = {worker.pid, *worker.children("durable:default")}
    producing.start()
    producing.finished(20)

    with full(server):
        refused = server.said(*FULL)
        newcomer = durable_worker("worker", "-c", "1", wait=False, **producing.environment)
        wait_until(lambda: "waiting for it" in newcomer.output(), what="a newcomer that waits")
        wait_until(lambda: producing.said("raise max_connections") >= 2, what="producers that are refused")
        wait_until(lambda: server.said(*FULL) >= refused + 10, what="ten refusals")
        assert connected(server).isdisjoint(old)
        assert newcomer.process.poll() is None
        assert newcomer.children("durable:default") == []

    newcomer.started("durable:default")
    wait_until(lambda: connected(server) >= old, what="the return of the old ones")
    producing.progress()
    producing.finished()
    assert worker.children() == before
    producing.settle()
    assert (worker.stop(), newcomer.stop()) == (0, 0)
