"""Wake-ups alone, with polls an hour apart: what was saved behind a notification is found all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from durable import Durable
from durable.instance import NewInstance
from durable.storage import instances
from durable.storage.session import run, single
from durable.wakeups import payload, queue_channel
from tests.fix_app import Command
from tests.fix_db import wait_until


def test_a_row_saved_behind_the_second_of_two_close_notifications_is_found(
    app: Durable,
    tasks_module: Callable[[str], Any],
    durable_worker: Callable[..., Command],
    connection: psycopg.Connection[Any],
) -> None:
    tasks_module('@app.task(name="noop")\ndef noop(): pass\n')
    worker = durable_worker("worker", "-c", "1", DURABLE_POLL_INTERVAL="3600")
    query = f"SELECT count(*) FROM {app.schema}.workers WHERE dead_at IS NULL"
    wait_until(lambda: connection.execute(query).fetchone() == (1,))
    state = app.codec.encode({})

    def notify() -> None:
        run(
            connection,
            app.sql,
            single("notify", {"channel": queue_channel(app.schema), "payload": payload("default", 1, 0)}),
            foreign=True,
        )

    saved = 0
    for _ in range(20):
        notify()
        # The second comes while the look for the first is due; the row comes without one, as within 50 ms of it.
        until = _clock(connection) + 0.05
        wait_until(lambda until=until: _clock(connection) >= until)
        second = _clock(connection)
        notify()
        until = second + 0.02
        wait_until(lambda until=until: _clock(connection) >= until)
        instance_id = run(connection, app.sql, instances.insert(NewInstance("noop", state)), foreign=True)
        if _clock(connection) - second < 0.05:
            saved += 1
        else:
            notify()  # this machine was busy: a producer would not have saved this one
        wait_until(lambda instance_id=instance_id: app.result(instance_id).ready(), 10, "a row whose wake-up was saved")
    assert saved
    assert worker.process.poll() is None


def _clock(connection: psycopg.Connection[Any]) -> float:
    row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
    assert row is not None
    return float(row[0])
