"""`durable healthcheck`: every way a worker can be unhealthy, and none in which a healthy one is called so."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.cli.conftest import NO_SERVER, Ran
from tests.fix_db import wait_until


@pytest.fixture
def worker(shop: Path, durable_worker: Callable[..., Any], durable: Callable[..., Ran]) -> Any:
    """A worker command on queue default, whose processes have their leases."""
    command = durable_worker("worker", "-c", "2", "-n", "w@test")
    wait_until(lambda: len(durable("workers", "--json").json) == 2)
    return command


def test_a_worker_that_works_is_healthy(worker: Any, durable: Callable[..., Ran]) -> None:
    ran = durable("healthcheck")
    assert (ran.code, ran.out, ran.err) == (0, "healthy: 2 processes\n", "")
    assert durable("healthcheck", "--name", "w@test").code == 0
    told = durable("healthcheck", "--host", socket.gethostname(), "--json").json
    assert (told["healthy"], told["reason"]) == (True, None)
    assert [(row["kind"], row["name"], row["queue"]) for row in told["processes"]] == [
        ("worker", "w@test", "default")
    ] * 2


def test_without_a_worker_it_is_unhealthy(shop: Path, durable: Callable[..., Ran]) -> None:
    ran = durable("healthcheck", "--name", "w@test")
    assert (ran.code, ran.error) == (1, "Error: unhealthy: no worker and no beat named 'w@test' has a lease")
    ran = durable("healthcheck", "--json")
    assert ran.code == 1
    assert ran.json == {
        "healthy": False,
        "reason": f"no worker and no beat on host {socket.gethostname()!r} has a lease",
        "processes": [],
    }


def test_others_do_not_make_it_healthy(worker: Any, durable: Callable[..., Ran]) -> None:
    assert durable("healthcheck", "--host", "elsewhere").code == 1
    assert durable("healthcheck", "--name", "other").code == 1


def test_an_orderly_end_makes_it_unhealthy(worker: Any, durable: Callable[..., Ran]) -> None:
    assert worker.stop() == 0
    assert "has a lease" in durable("healthcheck").error


def test_a_heartbeat_that_is_too_old_is_unhealthy_and_named(
    worker: Any, durable: Callable[..., Ran], connection: psycopg.Connection[Any], schema: str
) -> None:
    (agent,) = worker.started("durable:agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        ran = wait_until(lambda: (ran := durable("healthcheck", "--max-age", "1")).code and ran)
        assert isinstance(ran, Ran)
        assert f"unhealthy: worker w@test (pid {worker.pid} on {socket.gethostname()}) sent its last" in ran.error
        assert "more than 1 s" in ran.error
        connection.execute(f"UPDATE {schema}.workers SET expires_at = now() - interval '1 s'")
        assert "has run out" in durable("healthcheck", "--max-age", "100").error
    finally:
        os.kill(agent, signal.SIGCONT)


def test_a_beat_has_a_health_too(shop: Path, durable_worker: Callable[..., Any], durable: Callable[..., Ran]) -> None:
    durable_worker("beat")
    wait_until(lambda: durable("healthcheck").code == 0)


def test_a_worker_that_claims_nothing_though_slots_are_free_is_stuck(
    shop: Path, durable_worker: Callable[..., Any], durable: Callable[..., Ran]
) -> None:
    worker = durable_worker("worker", "-c", "2", DURABLE_LEASE_TTL="60")
    wait_until(lambda: len(durable("workers", "--json").json) == 2)
    (agent,) = worker.started("durable:agent")
    os.kill(agent, signal.SIGSTOP)  # nobody rings the idle children any more
    try:
        ran = durable("call", "tasks.add", "--args", "[1]")
        instance = int(ran.out)
        wait_until(lambda: durable("healthcheck", "--max-age", "100", "--max-wait", "1").code == 1)
        ran = durable("healthcheck", "--max-age", "100", "--max-wait", "1")
        assert f"queue default: instance {instance} has waited for" in ran.error
        assert "more than 1 s, while 2 slots were free" in ran.error
        assert durable("healthcheck", "--max-age", "100", "--max-wait", "1000").code == 0
    finally:
        os.kill(agent, signal.SIGCONT)
    wait_until(lambda: durable("healthcheck", "--max-wait", "1").code == 0)


def test_what_waits_for_a_task_that_this_worker_does_not_know_does_not_count(
    worker: Any, durable: Callable[..., Ran], connection: psycopg.Connection[Any], schema: str
) -> None:
    connection.execute(
        f"INSERT INTO {schema}.instances (eligible_at, status, queue, machine, step, state_type, state) "
        "VALUES (now() - interval '1 h', 'runnable', 'default', 'elsewhere', 'run', 'json', '{}')"
    )
    assert durable("healthcheck", "--max-wait", "1").code == 0


def test_what_waits_in_a_paused_queue_does_not_count(
    worker: Any, durable: Callable[..., Ran], connection: psycopg.Connection[Any], schema: str
) -> None:
    durable("pause", "default", "checkout")
    connection.execute(
        f"INSERT INTO {schema}.instances (eligible_at, status, queue, machine, step, state_type, state) "
        "VALUES (now() - interval '1 h', 'runnable', 'default', 'tasks.say', 'run', 'json', '{}')"
    )
    assert durable("healthcheck", "--max-wait", "1").code == 0


def test_a_queue_that_moves_is_not_stuck_however_late_it_is(
    worker: Any, durable: Callable[..., Ran], connection: psycopg.Connection[Any], schema: str
) -> None:
    """Between a commit and the next claim every slot looks free: another first in line at each look tells."""
    connection.execute(
        f"INSERT INTO {schema}.instances (eligible_at, status, queue, machine, step, state_type, state) "
        "SELECT now() - interval '1 h', 'runnable', 'default', 'tasks.say', 'run', 'json', "
        "'{\"args\": [1]}' FROM generate_series(1, 3000)"
    )
    assert [durable("healthcheck", "--max-wait", "1").code for _ in range(5)] == [0] * 5


@pytest.mark.parametrize("dsn", [NO_SERVER, "silent"])
def test_without_an_answer_of_the_database_it_is_unhealthy_within_seconds(
    dsn: str, process: Callable[..., Ran], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if dsn == "silent":
            dsn = f"postgresql://me:sesame@127.0.0.1:{silent.getsockname()[1]}/x"
        began = time.monotonic()
        ran = process("healthcheck", env={"DURABLE_DSN": dsn})
        assert time.monotonic() - began < 30  # one that waits for ever is cut off after 60
    assert ran.code == 1
    assert ran.error.startswith("Error: unhealthy: ")
    assert "sesame" not in ran.err


def test_a_database_that_stops_answering_half_way_is_unhealthy_in_time(
    shop: Path, process: Callable[..., Ran], connection: psycopg.Connection[Any], schema: str
) -> None:
    with connection.transaction():
        process("workers")
        connection.execute(f"LOCK TABLE {schema}.workers IN ACCESS EXCLUSIVE MODE")
        ran = process("healthcheck", "--timeout", "2")
    assert ran.code == 1
    assert ran.error == "Error: unhealthy: no answer within 2 s"


def test_it_needs_an_app_or_a_database(durable: Callable[..., Ran], here: Path) -> None:
    assert durable("healthcheck").code == 3
    assert durable("healthcheck", "--max-age", "soon").code == 2
