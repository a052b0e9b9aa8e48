"""No payload, DSN or password in what commands print and log, nor in the command lines that `ps` shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from durable import Durable
from tests.cli.conftest import Ran
from tests.fix_db import wait_until

PASSWORD = "sesame-0pen"
CANARY = "c4n4ry-payload"

BODY = """
@app.task(name="keep")
def keep(secret):
    return secret

@app.task(name="fail", max_attempts=1)
def fail(secret):
    local = secret
    raise ValueError("it failed")

@app.task(name="refused")
def refused(secret):
    return {secret: object()}

@app.task(name="bad_outcome", max_attempts=1)
def bad_outcome(secret):
    from durable import Next
    return Next("nowhere", {"secret": secret})

@app.machine(name="typed")
class Typed(Machine):
    @dataclass
    class State:
        secret: int

    @step(initial=True)
    def begin(self, ctx):
        return Done()
"""


@pytest.fixture
def folder(database: str, schema: str, tmp_path: Path) -> Path:
    parts = conninfo_to_dict(database)
    dsn = (
        f"postgresql://{parts['user']}:{PASSWORD}@/{parts['dbname']}"
        f"?host={str(parts['host']).replace('/', '%2F')}&port={parts['port']}"
    )
    (tmp_path / "tasks.py").write_text(
        "from dataclasses import dataclass\nfrom durable import Done, Durable, Machine, step\n"
        f"app = Durable('test', dsn={dsn!r}, schema={schema!r})\n{BODY}"
    )
    return tmp_path


def insert(connection: psycopg.Connection[Any], schema: str, name: str, step: str, kind: str, state: str) -> None:
    connection.execute(
        f"INSERT INTO {schema}.instances (eligible_at, status, queue, machine, step, state_type, state)"
        " VALUES (now(), 'runnable', 'default', %s, %s, %s, %s)",
        (name, step, kind, state.encode()),
    )


def finished(connection: psycopg.Connection[Any], schema: str) -> int:
    (row,) = connection.execute(f"SELECT count(*) FROM {schema}.history").fetchall()
    return int(row[0])


def command_lines(pids: list[int]) -> str:
    texts = []
    for pid in pids:
        for name in ("cmdline", "comm"):
            texts.append((Path("/proc") / str(pid) / name).read_bytes().replace(b"\0", b" ").decode())
    return "\n".join(texts)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_worker_and_a_beat_at_level_debug_log_no_payload_and_no_password(
    app: Durable,
    folder: Path,
    durable_worker: Callable[..., Any],
    connection: psycopg.Connection[Any],
    schema: str,
    log_format: str,
) -> None:
    for name in ("keep", "fail", "refused", "bad_outcome"):
        insert(connection, schema, name, "run", "json", f'{{"args": ["{CANARY}"]}}')
    insert(connection, schema, "typed", "begin", "json", f'{{"secret": "{CANARY}"}}')
    insert(connection, schema, "typed", "begin", "json", f'{{"secret": "{CANARY}')
    insert(connection, schema, "typed", "begin", "pickle", CANARY)
    insert(connection, schema, "typed", "no", "json", f'{{"secret": "{CANARY}"}}')
    worker = durable_worker("worker", "-l", "debug", "--log-format", log_format)
    beat = durable_worker("beat", "-l", "debug", "--log-format", log_format)
    wait_until(lambda: finished(connection, schema) == 8, what="the ends")
    seen = command_lines([worker.pid, beat.pid, *worker.children(), *beat.children()])
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database() AND application_name LIKE 'durable test%'"
    )
    insert(connection, schema, "keep", "run", "json", f'{{"args": ["{CANARY}"]}}')
    wait_until(lambda: finished(connection, schema) == 9, what="an end after the connections were lost")
    titles = connection.execute("SELECT string_agg(application_name, ' ') FROM pg_stat_activity").fetchone()
    worker.stop()
    beat.stop()
    told = worker.output() + beat.output() + seen + str(titles)
    assert "durable" in seen
    assert CANARY not in told
    assert PASSWORD not in told
    errors = connection.execute(f"SELECT string_agg(error::text, ' ') FROM {schema}.history").fetchone()
    assert CANARY not in str(errors), "an error that is ours quotes a payload"
    assert PASSWORD not in str(errors)


@pytest.mark.parametrize(
    "command",
    [
        ("status",),
        ("queues",),
        ("workers",),
        ("list",),
        ("list", "--json"),
        ("doctor",),
        ("check",),
        ("check", "--json"),
        ("inspect", "active"),
        ("inspect", "registered"),
        ("schedules",),
        ("limits",),
        ("healthcheck",),
        ("migrate", "--status"),
        ("migrate", "--sql"),
        ("pause", "default"),
        ("cancel", "4711"),
        ("result", "4711", "--timeout", "0"),
        ("call", "nothing", "--args", f'["{CANARY}"]'),
        ("--debug", "worker", "-Q", "no good"),
    ],
    ids=lambda command: "-".join(command)[:20].replace(" ", "").replace('"', ""),
)
def test_commands_print_no_payload_and_no_password(
    app: Durable,
    folder: Path,
    process: Callable[..., Ran],
    connection: psycopg.Connection[Any],
    schema: str,
    command: tuple[str, ...],
) -> None:
    insert(connection, schema, "typed", "begin", "json", f'{{"secret": "{CANARY}"}}')
    insert(connection, schema, "typed", "begin", "json", f'{{"secret": "{CANARY}')
    ran = process(*command)
    assert ran.out + ran.err
    assert "Traceback" not in ran.err or command[0] == "--debug"
    assert CANARY not in ran.out + ran.err
    assert PASSWORD not in ran.out + ran.err


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://u:{PASSWORD}@127.0.0.1:1/x",
        f"postgresql://u:{PASSWORD}@nowhere.invalid/x",
        f"host=127.0.0.1 port=1 user=u password={PASSWORD}",
        f"postgresql://u:{PASSWORD}@host:port/x",
        f"redis://:{PASSWORD}@localhost",
        f"postgresql://u:a@b/{PASSWORD}@127.0.0.1/x",
    ],
)
@pytest.mark.parametrize("command", [("worker",), ("migrate", "--debug")])
def test_a_dsn_that_does_not_work_is_told_without_its_password(
    process: Callable[..., Ran], tmp_path: Path, dsn: str, command: tuple[str, ...]
) -> None:
    (tmp_path / "tasks.py").write_text("from durable import Durable\napp = Durable('x')\n")
    ran = process(*command, env={"DURABLE_DSN": dsn})
    assert ran.code == 3
    assert PASSWORD not in ran.out + ran.err
