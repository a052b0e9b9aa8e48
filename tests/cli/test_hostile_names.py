"""Names, results and errors are anybody's text: what commands print of it is nothing that a terminal obeys (68)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from durable import Durable
from durable.storage import workers
from durable.storage.workers import Identity
from durable_cli import output
from tests.cli.conftest import Ran
from tests.fix_rows import Rows, done

EVIL = "\x1b[31mred\x1b]0;title\x07\u202e<script>=cmd()\x9b2J\r\n\u2028end"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def instances(tasks_module: Callable[[str], Path], app: Durable, rows: Rows) -> list[str]:
    """Ids of a waiting, a failed, a finished and an executing instance, whose every text is hostile."""
    tasks_module(f"""
        from durable import every

        @app.task(name={EVIL!r})
        def evil(value=None):
            return value

        @app.periodic(every(3600), name={EVIL!r})
        @app.task(name="regular")
        def regular():
            pass

        app.close()
    """)
    evil = app.task(name=EVIL)(lambda value=None: value)
    app.task(name="wait")(lambda: None)
    me = Identity("worker", EVIL, EVIL, "b", 7, 6, "s", "default", tasks=[f"{EVIL}:1"])
    worker = rows.run(workers.register(me, 600.0))
    made = [evil.apply_async((EVIL,), {}, correlation_key=EVIL + str(n)).id for n in range(4)]
    claimed = {row.id: row for row in rows.claim(worker, 3)}
    error = Jsonb({"type": EVIL, "message": EVIL, "traceback": EVIL})
    rows.flush(worker, done(claimed[made[0]], result=app.codec.encode(EVIL)))
    rows.flush(worker, done(claimed[made[1]], status="failed", result=None, error=output.dumps(error.obj)))
    rows.fetch("UPDATE {schema}.instances SET reason = %s, awaits = %s", [EVIL, [EVIL]])
    app.signal(made[3], EVIL, EVIL, dedup_key=EVIL)
    rows.fetch("INSERT INTO {schema}.queues (name, paused_at, reason) VALUES ('default', now(), %s)", [EVIL])
    rows.fetch("INSERT INTO {schema}.limits (kind, name, allowed) VALUES ('concurrency', %s, 1)", [EVIL])
    return [str(instance) for instance in made]


READERS = ["list", "status", "queues", "workers", "limits list", "schedules list", "inspect active",
           "inspect registered", "doctor", "check", "migrate --status", *(f"{command} #{n}" for n in range(4)
           for command in ("show", "result --no-wait", "cancel", "retry"))]  # fmt: skip


@pytest.mark.parametrize("json", [False, True], ids=["text", "json"])
def test_no_command_prints_what_a_terminal_obeys(durable: Callable[..., Ran], instances: list[str], json: bool) -> None:
    shown: dict[str, str] = {}
    for reader in READERS:
        words = [instances[int(word[1:])] if word.startswith("#") else word for word in reader.split()]
        ran = durable(*words, *(["--json"] if json else []), "--debug")
        assert ran.code in (0, 1), f"{reader}: {ran.err}"
        shown[reader] = ran.out + ran.err
    assert {reader: text for reader, text in shown.items() if OBEYED.search(text)} == {}
    seen = [reader for reader, text in shown.items() if "script>" in text]
    assert {"list", "status", "queues", "workers", "limits list", "show #0", "show #1", "result --no-wait #0"} <= set(
        seen
    )


def test_an_app_that_fails_at_import_says_so_in_a_line_that_is_safe(
    durable: Callable[..., Ran], tasks_module: Callable[[str], Path]
) -> None:
    tasks_module(f"raise ValueError({EVIL!r})\n")
    ran = durable("list")
    assert ran.code == 3
    assert "script>" in ran.error
    assert not OBEYED.search(ran.err), ascii(ran.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-A", EVIL, "list"),
        ("-A", f"tasks:{EVIL}", "list"),
        ("call", EVIL),
        ("call", "keep", "--args", EVIL),
        ("result", EVIL),
        ("signal", EVIL, "paid"),
        ("pause", EVIL),
        ("list", "--status", EVIL),
        ("worker", "-Q", EVIL),
        ("worker", "-n", EVIL * 20),
        ("workers", "stop", EVIL),
        ("schedules", "run", EVIL),
        ("limits", "reset", EVIL),
        ("migrate", "--grant", EVIL),
        ("list", "--dsn", f"{EVIL}://x"),
        ("list", "--dsn", "postgresql:///x", "--schema", EVIL),
        (EVIL,),
        ("list", f"--{EVIL}"),
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[:24],
)
def test_no_refusal_prints_what_a_terminal_obeys(
    durable: Callable[..., Ran], tasks_module: Callable[[str], Path], app: Durable, arguments: tuple[Any, ...]
) -> None:
    tasks_module("@app.task(name='keep')\ndef keep(value=None):\n    return value\n")
    ran = durable(*arguments)
    assert ran.code in (1, 2, 3)
    assert ran.error
    assert not OBEYED.search(ran.out + ran.err), ascii(ran.err)
