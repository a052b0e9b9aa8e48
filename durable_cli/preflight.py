"""The look at the database that a worker takes before it forks, in a process of its own.

The supervisor never opens a socket that stays nor starts a thread; so a forked child connects, and what it found comes
back through a pipe. A server that is there and lets nobody in is waited for: it is full, or starts at this moment.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from durable import Durable
from durable.errors import DatabaseUnavailableError
from durable.runtime.backoff import Backoff
from durable.runtime.process import describe_exit, fork
from durable.storage import control, doctor, inspection, migrations
from durable.storage.session import admits_nobody, run, translated
from durable_cli import surroundings
from durable_cli.exits import CONFIG, EXPECTED, CommandError, explain
from durable_cli.output import scrub
from durable_cli.session import connected
from durable_cli.surroundings import ERROR, Finding

T = TypeVar("T")
log = logging.getLogger(__name__)

FALLEN_BACK = "until then nothing is kept in sessions of the pooler: no statement is prepared, no notification awaited"


class Found(NamedTuple):
    """The database, and what there is to be said of it."""

    server: inspection.ServerFacts
    warnings: list[str]
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
    app.conf.update(**told["settings"])
    return Found(inspection.ServerFacts(*told["server"]), told["warnings"], told["concurrency"])


def _tell(app: Durable, reader: int, writer: int) -> int:
    os.close(reader)
    told: dict[str, Any]
    try:
        warnings, settings = _in_time(app, _around)
        app.conf.update(**settings)
        told = {**_in_time(app, _inside), "settings": settings}
        told["warnings"] += warnings
    except EXPECTED as error:
        told = {"error": scrub(explain(error)[0])}
    except Exception:
        told = {"error": "looking at the database failed:\n" + scrub(traceback.format_exc())}
    with os.fdopen(writer, "wb") as answers:
        answers.write(json.dumps(told).encode())
    return 0


def _in_time(app: Durable, look: Callable[[Durable], T]) -> T:
    """Look, again and again while the server lets nobody in."""
    backoff, told = Backoff(most=app.conf.max_poll_interval), False
    while True:
        try:
            return look(app)
        except DatabaseUnavailableError as error:
            if not admits_nobody(error):
                raise
            if not told:
                log.warning("%s; waiting for it", error)
                told = True
        time.sleep(backoff.next())


def _around(app: Durable) -> tuple[list[str], dict[str, Any]]:
    """Return what there is to be said of poolers, and the settings without which nothing would work behind them."""
    with translated(app.schema):
        ways = surroundings.ways(app, f"durable {app.name} start")
    warnings = [_said(finding) for finding in surroundings.poolers(ways, app.conf)]
    settings: dict[str, Any] = {}
    if ways.mode == "transaction" and not app.conf.pooler:
        settings["pooler"] = True
    if ways.listen_mode == "transaction":
        settings["listen_dsn"] = None
    return [*warnings, *([FALLEN_BACK] if settings else [])], settings


def _inside(app: Durable) -> dict[str, Any]:
    with connected(app, schema_needed=False) as connection:
        remark = migrations.check(connection, app.schema)
        judged = list(surroundings.settings(run(connection, app.sql, doctor.settings()), app.conf))
        errors = [finding for finding in judged if finding.severity == ERROR]
        if errors:
            raise CommandError("; ".join(map(_said, errors)), CONFIG)
        return {
            "server": run(connection, app.sql, inspection.server()),
            "concurrency": run(connection, app.sql, control.concurrencies()),
            "warnings": [*([remark] if remark else []), *map(_said, judged)],
        }


def _said(finding: Finding) -> str:
    return f"{finding.cause}; {finding.remedy}"
