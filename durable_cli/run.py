"""`durable worker` and `durable beat`: look at the database, say what runs here, run it."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from psycopg.conninfo import conninfo_to_dict

from durable import Durable, __version__, telemetry, validation
from durable.runtime.beat import Beat
from durable.runtime.places import SPARE
from durable.runtime.process import name_process
from durable.runtime.slots import ASYNCIO, POOLS, PREFORK, THREADS
from durable.runtime.supervisor import Supervisor
from durable_cli import logs, metrics, preflight
from durable_cli.output import flush, note, print_json
from durable_cli.session import Session, app_options
from durable_cli.values import AUTOSCALE, BYTES, NAME, PREFETCH, SECONDS, Checked

log = logging.getLogger(__name__)

MOST_PROCESSES = 1000
MOST_SLOTS = 20_000
SPARE_CONNECTIONS = 2
"""Connections of a worker command besides one per process: its agent's."""


def _queues(text: str) -> dict[str, int | None]:
    """Return queue -> processes, None where -c says how many."""
    queues: dict[str, int | None] = {}
    for part in text.split(","):
        name, separator, count = part.strip().partition(":")
        validation.queue(name)
        if separator and not (re.fullmatch(r"[0-9]{1,5}", count) and 1 <= int(count) <= MOST_SLOTS):
            raise ValueError(
                f"{part.strip()!r}: after the colon comes a number of processes, or slots, from 1 to {MOST_SLOTS}"
            )
        if name in queues:
            raise ValueError(f"queue {name!r} is given twice")
        queues[name] = int(count) if separator else None
    return queues


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(count: int | None, autoscale: tuple[int, int] | None, pool: str) -> int:
    """How many processes or slots a queue starts with: what was said, else MIN, else what suits the pool."""
    if autoscale is None:
        return count or {THREADS: 10, ASYNCIO: 100}.get(pool) or _cpus()
    least, most = autoscale
    return min(max(count or least, least), most)


loglevel_option = click.option(
    "-l", "--loglevel", type=click.Choice(logs.LEVELS, case_sensitive=False), default="info", show_default=True,
    help="Log from this level on, to stderr.",
)  # fmt: skip
logformat_option = click.option(
    "--log-format", type=click.Choice(logs.FORMATS, case_sensitive=False), default="text", show_default=True,
    help="Log lines for people, or one JSON object a line.",
)  # fmt: skip
name_option = click.option("-n", "--name", type=NAME, help="What others call it; else APP@HOSTNAME.")


@click.command()
@click.option(
    "-Q", "--queues", metavar="QUEUE[:N],...", type=Checked("queues", _queues), default="default", show_default=True,
    help="Queues to serve; each with its own number of processes after a colon, if not that of -c.",
)  # fmt: skip
@click.option(
    "-c", "--concurrency", type=click.IntRange(1, MOST_SLOTS), metavar="N",
    help="Worker processes, threads or coroutines per queue; else one per CPU, 10 threads, 100 coroutines.",
)  # fmt: skip
@click.option(
    "-P", "--pool", type=click.Choice(POOLS), default=PREFORK, show_default=True,
    help="What runs steps: processes, or in one process per queue N threads or N coroutines.",
)  # fmt: skip
@click.option(
    "--autoscale", type=AUTOSCALE, metavar="MIN,MAX",
    help="Processes per queue: more when work waits a second, fewer when some are free; -c is where it starts.",
)  # fmt: skip
@click.option("-B", "--beat", is_flag=True, help="Run a beat inside.")
@loglevel_option
@logformat_option
@name_option
@click.option("--prefetch", type=PREFETCH, metavar="auto|N", help="Most instances a process claims ahead.")
@click.option("--drain-timeout", type=SECONDS, metavar="SECONDS", help="What running steps get to end at shutdown.")
@click.option(
    "--max-tasks-per-child", type=click.IntRange(1), metavar="N", help="Steps after which a process is replaced."
)
@click.option(
    "--max-memory-per-child", type=BYTES, metavar="SIZE",
    help="Resident size beyond which a process is replaced after its step: 200MB, or a number of KiB.",
)  # fmt: skip
@metrics.options
@app_options
@click.pass_context
def worker(
    ctx: click.Context,
    queues: Mapping[str, int | None],
    concurrency: int | None,
    pool: str,
    autoscale: tuple[int, int] | None,
    beat: bool,
    loglevel: str,
    log_format: str,
    name: str | None,
    prefetch: int | str | None,
    drain_timeout: float | None,
    max_tasks_per_child: int | None,
    max_memory_per_child: int | None,
    metrics_port: int | None,
    metrics_host: str,
) -> None:
    """Run tasks in worker processes.

    SIGTERM or Ctrl-C ends it in order, a second one at once; SIGHUP replaces it by a fresh one.
    """
    session: Session = ctx.obj
    if pool != PREFORK and autoscale is not None:
        raise click.BadParameter(
            f"is for prefork: slots of a {pool} process cost nothing while they are free, so give -c the most",
            param_hint="'--autoscale'",
        )
    counts = {queue: _start(count or concurrency, autoscale, pool) for queue, count in queues.items()}
    processes = sum(max(count, autoscale[1] if autoscale else 0) for count in counts.values())
    if pool != PREFORK:
        processes = len(counts)
        if pool == THREADS and max(counts.values()) > MOST_PROCESSES:
            raise click.BadParameter(f"that makes more than {MOST_PROCESSES} threads", param_hint="'-c'")
    if processes > MOST_PROCESSES:
        raise click.BadParameter(f"that makes {processes} processes, more than {MOST_PROCESSES}", param_hint="'-c'")
    ctx.with_resource(metrics.shared(metrics_port, metrics_host))
    app = session.app()
    given = {
        "prefetch": prefetch,
        "drain_timeout": drain_timeout,
        "max_tasks_per_child": max_tasks_per_child,
        "max_memory_per_child": max_memory_per_child,
    }
    app.conf.update(**{setting: value for setting, value in given.items() if value is not None})
    metrics.serve(metrics_port, metrics_host, "agent")
    name = name or f"{app.name}@{socket.gethostname()}"
    logs.configure(loglevel, log_format)
    name_process("durable-worker")
    found = preflight.look(app)
    facts = {"name": name, **_facts(app, found), "queues": counts, "pool": pool, "beat": beat}
    crowded = connections_warning(processes, found.server.max_connections)
    _announce(session, "worker", facts, log_format, [*found.warnings, *([crowded] if crowded else [])])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # what tasks print is seen when they print it
    room = {
        queue: max(count + SPARE, autoscale[1] if autoscale else 0, found.concurrency.get(queue, 0))
        for queue, count in counts.items()
    }
    ctx.exit(Supervisor(app, counts, name, beat=beat, room=room, autoscale=autoscale, pool=pool).run())


@click.command()
@loglevel_option
@logformat_option
@name_option
@metrics.options
@app_options
@click.pass_context
def beat(
    ctx: click.Context, loglevel: str, log_format: str, name: str | None, metrics_port: int | None, metrics_host: str
) -> None:
    """Run what goes by the clock: due instances, leases that ran out, garbage. Any number may run."""
    session: Session = ctx.obj
    ctx.with_resource(metrics.shared(metrics_port, metrics_host))
    app = session.app()
    metrics.serve(metrics_port, metrics_host, "beat")
    name = name or f"{app.name}@{socket.gethostname()}"
    logs.configure(loglevel, log_format)
    name_process("durable-beat")
    found = preflight.look(app)
    _announce(session, "beat", {"name": name, **_facts(app, found)}, log_format, found.warnings)
    running = Beat(app, name)
    running.heed_signals()
    with telemetry.process("beat"):
        code = running.run()
    ctx.exit(code)


def _facts(app: Durable, found: preflight.Found) -> dict[str, Any]:
    return {
        "version": __version__,
        "pid": os.getpid(),
        "database": place(app, found.server.database),
        "server_version": found.server.version,
        "schema": app.schema,
        "warnings": found.warnings,
        "tasks": sorted({name for name, _ in (*app.tasks, *app.machines)}),
    }


def connections_warning(processes: int, allowed: int) -> str | None:
    """Return what to say when so many processes can never all be connected."""
    needed = processes + SPARE_CONNECTIONS
    if needed <= allowed:
        return None
    return f"{processes} processes need {needed} connections, but the server's max_connections is {allowed}"


def place(app: Durable, database: str) -> str:
    """Return where the database is, without user and password: host/database, or that it is the embedded one."""
    if app.database.embedded:
        return "embedded"
    parts = conninfo_to_dict(app.database.dsn())
    environment = os.environ.get
    host = str(parts.get("host") or parts.get("hostaddr") or environment("PGHOST") or environment("PGHOSTADDR") or "")
    port = parts.get("port") or environment("PGPORT")
    service = parts.get("service") or environment("PGSERVICE")
    if service and not host:
        return f"service {service}, {database}"
    host = host or "localhost"
    return f"{host}{f':{port}' if port and not host.startswith('/') else ''}/{database}".replace("//", "/")


def _announce(session: Session, what: str, facts: Mapping[str, Any], log_format: str, warnings: Sequence[str]) -> None:
    """Say what starts: for people on stderr, where the log follows; with --json on stdout.

    A log of JSON lines holds nothing else, so that there it is a part of the log.
    """

    def tell(text: str) -> None:
        if log_format == "text":
            note(text)
        else:
            log.info("%s", text.strip())

    if session.as_json:
        print_json(facts)
        flush()
    else:
        tasks = facts["tasks"]
        tell(f"durable {facts['version']} {what} {facts['name']} (pid {facts['pid']})")
        tell(f"  database  {facts['database']} (PostgreSQL {facts['server_version']}), schema {facts['schema']}")
        if "queues" in facts:
            many = {THREADS: " threads", ASYNCIO: " coroutines"}.get(facts["pool"], "")
            queues = ", ".join(f"{queue} x {count}{many}" for queue, count in facts["queues"].items())
            tell(f"  queues    {queues}{', and a beat' if facts['beat'] else ''}")
            tell(f"  tasks     {', '.join(tasks) or 'none: every instance will be handed back'}")
    for warning in warnings:
        if log_format == "text":
            note(f"Warning: {warning}")
        else:
            log.warning("%s", warning)
