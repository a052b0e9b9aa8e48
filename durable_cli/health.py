"""`durable healthcheck`: whether the worker and beat commands of this host do their work, for containers."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import click

from durable import Durable
from durable.storage import inspection, migrations, workers
from durable.storage.inspection import ProcessHealth, QueueHead
from durable.storage.session import Connection, connect, run, translated
from durable_cli.exits import EXPECTED, HEALTHY, UNHEALTHY, CommandError, explain
from durable_cli.output import print_json, say
from durable_cli.session import Session, database_options
from durable_cli.values import NAME, SECONDS

CONNECT = 3.0
"""Seconds a connection may take to open."""
LOOKS = 4
LOOK_EVERY = 0.5
"""A worker is stuck when the same instance is first in line, and a slot free, at this many looks so far apart."""


@click.command()
@click.option("-n", "--name", type=NAME, help="The worker or beat of that name, wherever it runs.")
@click.option("--host", metavar="HOST", help="Those of another host; else of this one.")
@click.option("--max-age", type=SECONDS, metavar="SECONDS", help="Oldest heartbeat that is healthy; else lease_ttl.")
@click.option(
    "--max-wait", type=SECONDS, metavar="SECONDS", default="30", show_default=True,
    help="How long an instance may be first in line while slots are free.",
)  # fmt: skip
@click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", default="8", show_default=True,
    help="What takes longer is unhealthy.",
)  # fmt: skip
@database_options
@click.pass_context
def healthcheck(
    ctx: click.Context, name: str | None, host: str | None, max_age: float | None, max_wait: float, timeout: float
) -> None:
    """Exit with 0 when the workers and beats of this host are healthy, else with 1 and the reason.

    Healthy: their leases are live, their heartbeat is recent, no queue of theirs loses one worker process after the
    other, and no instance is kept waiting while slots are free.
    """
    session: Session = ctx.obj
    if name is None and host is None:
        host = socket.gethostname()
    processes: list[ProcessHealth] = []
    reason: str | None
    try:
        with _deadline(timeout):
            app = session.database()
            age = app.conf.lease_ttl if max_age is None else max_age
            with _connected(app, timeout) as connection:
                processes = run(connection, app.sql, inspection.health(name, host))
                reason = (
                    _silent(processes, age, name, host)
                    or _crash_loop(app, connection, processes)
                    or _stuck(app, connection, processes, max_wait)
                )
    except CommandError:
        raise
    except EXPECTED as error:
        reason = explain(error)[0]
    if session.as_json:
        print_json({"healthy": reason is None, "reason": reason, "processes": [row._asdict() for row in processes]})
    elif reason is None:
        say(f"healthy: {len(processes)} process{'' if len(processes) == 1 else 'es'}")
    if reason is None:
        ctx.exit(HEALTHY)
    if session.as_json:
        ctx.exit(UNHEALTHY)
    raise CommandError(f"unhealthy: {reason}", UNHEALTHY)


def _silent(processes: Sequence[ProcessHealth], max_age: float, name: str | None, host: str | None) -> str | None:
    """Return what is wrong with the leases: one agent sends the heartbeats of all processes of its command."""
    if not processes:
        whose = " ".join([*([f"named {name!r}"] if name else []), *([f"on host {host!r}"] if host else [])])
        return f"no worker and no beat {whose} has a lease"
    commands: dict[tuple[str, str, str, int], list[ProcessHealth]] = {}
    for process in processes:
        commands.setdefault((process.kind, process.name, process.host, process.command_pid), []).append(process)
    for (kind, called, where, pid), members in commands.items():
        youngest = min(members, key=lambda member: member.heartbeat_age)
        what = f"{kind} {called} (pid {pid} on {where})"
        if youngest.heartbeat_age > max_age:
            return f"{what} sent its last heartbeat {youngest.heartbeat_age:.1f} s ago, more than {max_age:g} s"
        if not any(member.alive for member in members):
            return f"the lease of {what} has run out"
    return None


def _crash_loop(app: Durable, connection: Connection, processes: Sequence[ProcessHealth]) -> str | None:
    """Return which queue of these processes loses one worker process after the other."""
    served = {process.queue for process in processes}
    for row in run(connection, app.sql, workers.crash_loops()):
        if row.queue in served:
            return (
                f"queue {row.queue} lost {row.deaths} worker processes within {workers.CRASH_WINDOW:g} s; "
                f"the last {row.last}"
            )
    return None


def _stuck(app: Durable, connection: Connection, processes: Sequence[ProcessHealth], max_wait: float) -> str | None:
    """Return which queue's first in line is kept waiting although slots are free, at every look."""
    known = [f"{machine}:{version}" for machine, version in app.definitions] or None
    workers = [process.id for process in processes if process.kind == "worker" and process.alive]
    stuck: dict[str, QueueHead] = {}
    for look in range(LOOKS):
        if look:
            time.sleep(LOOK_EVERY)
        heads = run(connection, app.sql, inspection.queue_heads(workers, known))
        late = {head.queue: head for head in heads if head.free > 0 and head.waited > max_wait}
        stuck = {queue: head for queue, head in late.items() if not look or _same(stuck.get(queue), head)}
        if not stuck:
            return None
    head = next(iter(stuck.values()))
    return (
        f"queue {head.queue}: instance {head.id} has waited for {head.waited:.1f} s, more than {max_wait:g} s, "
        f"while {head.free} slot{'' if head.free == 1 else 's'} were free"
    )


def _same(before: QueueHead | None, now: QueueHead) -> bool:
    return before is not None and before.id == now.id


@contextmanager
def _connected(app: Durable, timeout: float) -> Iterator[Connection]:
    """Lend a connection, opened and asked within the time there is."""
    title = f"durable {app.name} healthcheck"
    with (
        translated(app.schema),
        closing(connect(app.dsn(), title, pooler=app.conf.pooler, timeout=min(timeout, CONNECT))) as connection,
    ):
        migrations.check(connection, app.schema)
        yield connection


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the block is after that time: a name server or a frozen database answers never."""

    def late(*_: Any) -> None:
        raise TimeoutError(None, f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
