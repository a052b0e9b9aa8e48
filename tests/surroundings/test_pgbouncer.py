"""PgBouncer in transaction mode between everybody and the server."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from durable import Durable
from durable.errors import DatabaseUnavailableError
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.fix_pgbouncer import PgBouncer
from tests.surroundings.load import SCHEMA, Load
from tests.surroundings.server import OwnServer

CHILDREN, POOL = 16, 4
AWAY = "the database can't be reached"
LISTENING = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'"


def serving(bouncer: PgBouncer) -> int:
    """How many sessions it has on the server."""
    return len(bouncer.order("SHOW SERVERS"))


@pytest.mark.parametrize("listens", [True, False], ids=["listen_dsn", "polling"])
def test_sixteen_processes_share_four_sessions_through_a_pause_a_reload_and_a_crash_of_the_pooler(
    own_server: Callable[..., OwnServer],
    pgbouncer: Callable[..., PgBouncer],
    load: Callable[..., Load],
    durable_worker: Callable[..., Command],
    listens: bool,
) -> None:
    server = own_server()
    bouncer = pgbouncer(server.dsn, default_pool_size=POOL, query_wait_timeout=1)
    settings = {"pooler": True, **({"listen_dsn": server.dsn} if listens else {})}
    producing = load(bouncer.dsn, server.admin, **settings)
    worker = durable_worker("worker", "-c", str(CHILDREN), **producing.environment)
    wait_until(lambda: len(worker.children()) == CHILDREN + 1, 60, "sixteen worker processes and their agent")
    before = worker.children()
    producing.start()
    producing.finished()
    wait_until(lambda: serving(bouncer) == POOL, what="a pool in full use")
    assert len(bouncer.order("SHOW CLIENTS")) > CHILDREN
    wait_until(lambda: server.run(LISTENING) == [(int(listens),)], what="a listener, if it may")

    bouncer.order("PAUSE")
    wait_until(lambda: producing.said("query_wait_timeout") >= 2, what="producers that waited long enough")
    bouncer.order("RESUME")
    producing.progress()
    producing.finished()

    bouncer.reload()
    wait_until(lambda: "SIGHUP" in bouncer.log(), what="a reload")
    producing.progress()
    producing.finished()

    met, missed = len(producing.errors), worker.output().count(AWAY)
    bouncer.kill()
    wait_until(lambda: len(producing.errors) >= met + 2, what="producers without a pooler")
    wait_until(lambda: worker.output().count(AWAY) > missed, what="workers without a pooler")
    bouncer.start()
    producing.progress()
    producing.finished()

    assert serving(bouncer) <= POOL
    assert worker.children() == before
    producing.settle(longest=8.0)
    assert worker.stop() == 0


def test_a_pooler_that_nobody_told_of_is_found_and_nothing_is_left_in_its_sessions(
    own_server: Callable[..., OwnServer],
    pgbouncer: Callable[..., PgBouncer],
    load: Callable[..., Load],
    durable_worker: Callable[..., Command],
) -> None:
    server = own_server()
    bouncer = pgbouncer(server.dsn, default_pool_size=2)
    producing = load(server.dsn, server.admin)
    tasks = producing.effects.with_name("tasks.py")
    tasks.write_text(tasks.read_text().replace(repr(server.dsn), repr(bouncer.dsn)))

    worker = durable_worker("worker", "-c", "4", DURABLE_LISTEN_DSN=bouncer.dsn, **producing.environment)
    producing.start()
    producing.finished(200)
    producing.settle()
    said = worker.output()
    assert "the DSN leads through a pooler in transaction mode" in said
    assert "listen_dsn leads through a pooler in transaction mode" in said
    assert "set pooler=True" in said
    assert "until then nothing is kept in sessions of the pooler" in said
    assert "prepared statement" not in said
    assert server.run(LISTENING) == [(0,)]
    with psycopg.connect(bouncer.dsn, prepare_threshold=None) as one, psycopg.connect(bouncer.dsn) as two:
        for client in (one, two):
            assert client.execute("SHOW search_path").fetchone() == ('"$user", public',)
    assert worker.stop() == 0


def test_a_producer_that_was_not_told_of_a_pooler_hears_what_to_set(
    own_server: Callable[..., OwnServer], pgbouncer: Callable[..., PgBouncer]
) -> None:
    bouncer = pgbouncer(own_server().dsn, default_pool_size=1)
    apps = [Durable("around", dsn=bouncer.dsn, schema=SCHEMA, pool_size=1) for _ in range(2)]
    for app in apps:
        app.task(name="work")(lambda n: n)
    apps[0].insert("work", args=(1,))
    with pytest.raises(DatabaseUnavailableError, match="set pooler=True"):
        apps[1].insert("work", args=(2,))
    for app in apps:
        app.close()
