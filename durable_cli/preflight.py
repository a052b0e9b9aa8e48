"""The look at the database that a worker takes before it forks, in a process of its own.

The supervisor never opens a socket that stays nor starts a thread; so a forked child connects, and what it found comes
back through a pipe.
"""

from __future__ import annotations

import json
import os
import traceback
from typing import Any, NamedTuple

from durable import Durable
from durable.runtime.process import describe_exit, fork
from durable.storage import control, inspection, migrations
from durable.storage.session import run
from durable_cli.exits import CONFIG, EXPECTED, CommandError, explain
from durable_cli.output import scrub
from durable_cli.session import connected


class Found(NamedTuple):
    """The database, and a remark on its schema."""

    server: inspection.ServerFacts
    remark: str | None
    concurrency: dict[str, int]
    """Queue -> processes that are ordered for it."""


def look(app: Durable) -> Found:
    """Return what the database is, if this code can work on it; an embedded one is started, and its schema made.

    Raises CommandError with code CONFIG, and ConfigError for settings that do not fit each other and for a wrong entry
    of `beat_schedule`, which the forked processes could only die of.
    """
    app.conf.update()  # what was assigned one by one is checked together
    app.schedules()
    if app.database.embedded:
        # Held by this process, not by the child that looks: the server has to outlive the look. Nothing stays open
        # but a locked file.
        app.database.dsn()
    reader, writer = os.pipe()
    pid = fork(lambda: _tell(app, reader, writer), "durable-check")
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        answer = answers.read()
    _, status = os.waitpid(pid, 0)
    if not answer:
        raise CommandError(f"the process that looked at the database {describe_exit(status)}", CONFIG)
    told: dict[str, Any] = json.loads(answer)
    if "error" in told:
        raise CommandError(told["error"], CONFIG)
    app.embedded_schema_made = True  # so that not each forked process makes sure of it again
    return Found(inspection.ServerFacts(*told["server"]), told["remark"], told["concurrency"])


def _tell(app: Durable, reader: int, writer: int) -> int:
    os.close(reader)
    told: dict[str, Any]
    try:
        with connected(app, schema_needed=False) as connection:
            remark = migrations.check(connection, app.schema)
            states = run(connection, app.sql, control.concurrencies())
            server = run(connection, app.sql, inspection.server())
            told = {"server": server, "remark": remark, "concurrency": states}
    except EXPECTED as error:
        told = {"error": scrub(explain(error)[0])}
    except Exception:
        told = {"error": "looking at the database failed:\n" + scrub(traceback.format_exc())}
    with os.fdopen(writer, "wb") as answers:
        answers.write(json.dumps(told).encode())
    return 0
