"""`durable doctor`: what is wrong, who causes it, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click

from durable import Durable
from durable.errors import SchemaError
from durable.storage import doctor as looks
from durable.storage import inspection, limits, maintenance, migrations, workers
from durable.storage.doctor import Holder
from durable.storage.inspection import QueueState, WorkerState
from durable.storage.session import Connection, run, translated
from durable_cli import repairing, surroundings
from durable_cli.exits import FAILED, USAGE, CommandError
from durable_cli.output import note, print_json, print_table, say, seconds
from durable_cli.repairing import SLACK, counted
from durable_cli.session import Session, connected, database_options
from durable_cli.surroundings import ERROR, WARNING, Finding
from durable_cli.values import SECONDS

CROWDED, FULL = 0.8, 0.95
"""Parts of the server's connections that are in use."""
NOTIFICATIONS = 0.5


class Limits(NamedTuple):
    """What counts as too much: seconds, transactions, rows, seconds, seconds."""

    age: float
    xids: int
    dead: int
    wait: float
    lock: float


@click.command()
@click.option(
    "--max-age", type=SECONDS, metavar="SECONDS", default="300", show_default=True,
    help="How long a transaction may hold back vacuum.",
)  # fmt: skip
@click.option(
    "--max-xids", type=click.IntRange(0), metavar="N", default=1_000_000, show_default=True,
    help="How many transactions a standby or a replication slot may hold it back.",
)  # fmt: skip
@click.option(
    "--max-dead", type=click.IntRange(0), metavar="N", default=100_000, show_default=True,
    help="Dead rows that a table may have.",
)  # fmt: skip
@click.option(
    "--max-wait", type=SECONDS, metavar="SECONDS", default="30", show_default=True,
    help="How long work may wait in a queue that no worker serves.",
)  # fmt: skip
@click.option(
    "--max-lock", type=SECONDS, metavar="SECONDS", default="5", show_default=True,
    help="How long a session may hold locks in the schema's tables.",
)  # fmt: skip
@click.option("--fix", is_flag=True, help="First mend rows that contradict each other, and say which.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --fix.")
@database_options
@click.pass_context
def doctor(
    ctx: click.Context,
    max_age: float,
    max_xids: int,
    max_dead: int,
    max_wait: float,
    max_lock: float,
    fix: bool,
    yes: bool,
) -> None:
    """Say what is wrong and who causes it; exit with 1 if anything is, else with 0.

    Looks only, and changes nothing without --fix, which mends rows whose parent is gone, barriers that count wrongly,
    signals that nobody would see. With a role that may not see other roles' sessions it sees less (grant pg_monitor).
    """
    session: Session = ctx.obj
    if yes and not fix:
        raise CommandError("--yes is for --fix; without it nothing is changed", USAGE)
    app = session.database()
    repaired: list[dict[str, Any]] = []
    with translated(app.schema):
        ways = surroundings.ways(app, f"durable {app.name} doctor")
    poolers = list(surroundings.poolers(ways, app.conf))
    app.conf.pooler = ways.mode is not None  # nothing of ours is left in a pooler's sessions
    with connected(app, app.database.dsn(), schema_needed=False) as connection:
        if fix:
            migrations.check(connection, app.schema)
            repaired = repairing.repair(app, connection, yes=yes)
        found = [*examine(app, connection, Limits(max_age, max_xids, max_dead, max_wait, max_lock)), *poolers]
        blind = not run(connection, app.sql, looks.sees_others())
    found.sort(key=lambda finding: finding.severity)
    if blind:
        note("Note: this role sees only its own sessions; `GRANT pg_monitor` shows who holds back vacuum")
    if session.as_json:
        document = {"healthy": not found, "findings": [finding._asdict() for finding in found]}
        print_json({**document, "repaired": repaired} if fix else document)
        ctx.exit(FAILED if found else 0)
    for report in repaired:
        ids = f": {', '.join(map(str, report['ids']))}" if report["ids"] else ""
        say(f"repaired: {report['repair']} ({report['count']:,}){ids}")
    if found:
        print_table(Finding._fields, found)
    else:
        say("healthy: nothing is wrong")
    ctx.exit(FAILED if found else 0)


def examine(app: Durable, connection: Connection, most: Limits) -> Iterator[Finding]:
    """Yield what is wrong. Raises psycopg.Error."""
    yield from _schema(app, connection)
    if not migrations.applied(connection, app.schema) or migrations.pending(connection, app.schema):
        return
    queues = run(connection, app.sql, inspection.queues())
    processes = run(connection, app.sql, inspection.processes())
    yield from _vacuum(app, connection, most)
    yield from _locks(app, connection, most)
    yield from _leases(app, connection)
    yield from _crash_loops(app, connection)
    yield from repairing.findings(repairing.damage(app, connection))
    yield from _waiting(app, connection, queues, most)
    yield from _limits(app, connection)
    yield from _beat(app, connection, processes)
    yield from _partitions(app, connection)
    yield from _server(app, connection)
    yield from surroundings.settings(run(connection, app.sql, looks.settings()), app.conf)


def _schema(app: Durable, connection: Connection) -> Iterator[Finding]:
    try:
        remark = migrations.check(connection, app.schema)
    except SchemaError as error:
        missing = not migrations.applied(connection, app.schema) or migrations.pending(connection, app.schema)
        remedy = "run `durable migrate`" if missing else "deploy code of the schema's version"
        yield Finding(ERROR, "schema", str(error), remedy)
        return
    if remark is not None:
        yield Finding(WARNING, "schema", remark, "deploy code of the schema's version")


def _vacuum(app: Durable, connection: Connection, most: Limits) -> Iterator[Finding]:
    tables = run(connection, app.sql, looks.dead_rows(app.schema))
    dead = sum(table.dead for table in tables)
    held = [holder for holder in run(connection, app.sql, looks.holders()) if _holds(holder, most)]
    for holder in held:
        cause, remedy = _HOLDERS[holder.kind](holder)
        rows = f"; the schema has {dead:,} dead rows" if dead else ""
        xids = f", {holder.xids:,} transactions ago" if holder.xids else ""
        yield Finding(ERROR if dead > most.dead else WARNING, "vacuum held back", f"{cause}{xids}{rows}", remedy)
    for table in tables:
        if table.dead > max(most.dead, table.live) and not held:
            when = "never" if table.vacuumed is None else f"{seconds(table.vacuumed)} ago"
            yield Finding(
                WARNING,
                "dead rows",
                f"table {table.table} has {table.dead:,} dead rows beside {table.live:,}; it was vacuumed {when}",
                f"see that autovacuum runs (autovacuum, autovacuum_max_workers); VACUUM {app.schema}.{table.table}",
            )


def _holds(holder: Holder, most: Limits) -> bool:
    if holder.age is None:
        return (holder.xids or 0) >= most.xids
    return holder.age > most.age


def _session(holder: Holder) -> tuple[str, str]:
    where = f" from {holder.address}" if holder.address else ""
    who = f"application {holder.application!r}, role {holder.user}{where}, {holder.state}"
    return (
        f"session {holder.name} ({who}) has had a transaction open for {seconds(holder.age)}",
        f"end it: SELECT pg_terminate_backend({holder.name}); idle_in_transaction_session_timeout prevents it",
    )


def _standby(holder: Holder) -> tuple[str, str]:
    return (
        f"standby {holder.application!r} (pid {holder.name}, role {holder.user}) sends hot_standby_feedback of a query",
        "end the query on the standby, or switch hot_standby_feedback off there",
    )


def _slot(holder: Holder) -> tuple[str, str]:
    return (
        f"replication slot {holder.name!r} ({holder.state}) keeps rows that its standby may still read",
        f"bring its standby back, or SELECT pg_drop_replication_slot('{holder.name}')",
    )


def _prepared(holder: Holder) -> tuple[str, str]:
    return (
        f"prepared transaction {holder.name!r} of role {holder.user} has waited for {seconds(holder.age)}",
        f"COMMIT PREPARED '{holder.name}' or ROLLBACK PREPARED '{holder.name}'",
    )


_HOLDERS: dict[str, Callable[[Holder], tuple[str, str]]] = {
    "session": _session,
    "standby": _standby,
    "slot": _slot,
    "prepared": _prepared,
}


def _locks(app: Durable, connection: Connection, most: Limits) -> Iterator[Finding]:
    rows: dict[int, list[int]] = {}
    for row in run(connection, app.sql, maintenance.row_holders(None)):
        rows.setdefault(row.pid, []).append(row.id)
    for holder in run(connection, app.sql, looks.lock_holders(app.schema)):
        if holder.age is not None and holder.age < most.lock:
            continue
        ids = rows.get(holder.pid, [])
        which = f"; of instances {', '.join(map(str, ids[:5]))}{' and others' if len(ids) > 5 else ''}" if ids else ""
        since = "for a time that this role may not see" if holder.age is None else f"for {seconds(holder.age)}"
        yield Finding(
            WARNING,
            "locks held",
            f"session {holder.pid} (application {holder.application!r}, role {holder.user}, {holder.state}) has held "
            f"locks {since} in {', '.join(holder.tables)}{which}: outcomes, signals and cancels that need them wait",
            f"commit or end it: SELECT pg_terminate_backend({holder.pid}); keep transactions that use durable short",
        )


def _leases(app: Durable, connection: Connection) -> Iterator[Finding]:
    conf = app.conf
    for row in run(connection, app.sql, looks.stuck(conf.lease_ttl + 2 * conf.reaper_interval + conf.reaper_grace)):
        if row.gone is None:
            who = f"worker {row.worker_id}, which has no lease"
        else:
            who = f"process {row.pid} of {row.name} on {row.host}, gone for {seconds(row.gone)}"
        yield Finding(
            ERROR,
            "stuck lease",
            f"{who}, still holds {counted(row.number, row.example)}",
            "start a beat or a worker with reaper=True: it hands them back",
        )


def _crash_loops(app: Durable, connection: Connection) -> Iterator[Finding]:
    for row in run(connection, app.sql, workers.crash_loops()):
        yield Finding(
            ERROR,
            "crash loop",
            f"queue {row.queue} lost {row.deaths} worker processes within {seconds(workers.CRASH_WINDOW)}; "
            f"the last {row.last}",
            "see the worker's log, and `durable list --status failed` for those that failed with WorkerLost",
        )


def _waiting(app: Durable, connection: Connection, queues: list[QueueState], most: Limits) -> Iterator[Finding]:
    for queue in queues:
        waited = f"{queue.runnable:,} instances wait, the first for {seconds(queue.oldest)}"
        if queue.runnable and queue.paused_at is not None:
            why = f" ({queue.pause_reason})" if queue.pause_reason else ""
            yield Finding(
                WARNING,
                "paused queue",
                f"queue {queue.queue} is paused since {queue.paused_at:%Y-%m-%d %H:%M:%S%z}{why}; {waited}",
                f"durable resume {queue.queue}",
            )
        elif queue.runnable and not queue.workers and (queue.oldest or 0.0) > most.wait:
            yield Finding(
                ERROR,
                "queue without worker",
                f"no worker serves queue {queue.queue}; {waited}",
                f"durable worker -Q {queue.queue}",
            )
    for row in run(connection, app.sql, looks.unknown()):
        yield Finding(
            ERROR,
            "unknown task",
            f"no live worker of queue {row.queue} knows {row.machine!r} version {row.version}; "
            f"{counted(row.number, row.example)} wait for it",
            "deploy a worker with that task and version, or cancel them (durable check names them before a deploy)",
        )


def _limits(app: Durable, connection: Connection) -> Iterator[Finding]:
    for row in run(connection, app.sql, looks.missing_limits()):
        yield Finding(
            ERROR,
            "unknown limit",
            f"rate limit {row.name!r} is not in the database; {counted(row.number, row.example)} wait for it",
            f"declare it in the app and run `durable migrate`, or durable limits set {row.name} RATE",
        )
    there = {(row.kind, row.name) for row in run(connection, app.sql, limits.read())}
    for kind, name in sorted(set(app.limit_rows.configured) - there):
        yield Finding(
            WARNING, "unknown limit", f"the app's {kind} limit {name!r} is not in the database", "run `durable migrate`"
        )


def _beat(app: Durable, connection: Connection, processes: list[WorkerState]) -> Iterator[Finding]:
    if any(process.kind == "beat" and process.alive for process in processes):
        return
    work = run(connection, app.sql, looks.beat_work())
    if not work.schedules and not work.rows:
        return
    waiting = f"{work.schedules} schedules and {'100 or more' if work.rows >= 100 else work.rows} waiting instances"
    if any(process.kind == "worker" and process.alive for process in processes):
        late = f"workers see to them, up to {app.conf.poll_interval:g} s late (schedules {app.conf.beat_grace:g} s)"
        yield Finding(WARNING, "no beat", f"no beat runs for {waiting}; {late}", "start `durable beat`")
    else:
        yield Finding(ERROR, "no beat", f"no beat and no worker runs for {waiting}", "start `durable beat`")


def _partitions(app: Durable, connection: Connection) -> Iterator[Finding]:
    conf = app.conf
    kept = looks.kept_partitions(connection, app.sql, conf.retention, 2 * conf.gc_interval + SLACK)
    if kept:
        yield Finding(
            WARNING,
            "partitions not dropped",
            f"{len(kept)} partitions of the history are past retention ({seconds(conf.retention)}), "
            f"the oldest of {kept[0]}",
            "start a beat or a worker with gc=True; a session that reads the history for long keeps them, too",
        )
    missing = looks.missing_partitions(connection, app.sql)
    if missing:
        yield Finding(
            ERROR,
            "partitions missing",
            f"the history has no partition for {', '.join(map(str, missing))} (UTC)",
            "run `durable migrate`, or start a beat",
        )


def _server(app: Durable, connection: Connection) -> Iterator[Finding]:
    sessions = run(connection, app.sql, looks.sessions())
    used, room = sum(row.number for row in sessions), sessions[0].room
    if used >= CROWDED * room:
        shares = Counter({row.application: row.number for row in sessions}).most_common(3)
        yield Finding(
            ERROR if used >= FULL * room else WARNING,
            "connections",
            f"{used} of {room} connections are in use, most by {', '.join(f'{name} ({n})' for name, n in shares)}",
            "raise max_connections, run fewer worker processes, or put a pooler in front (docs/operations.md)",
        )
    full = run(connection, app.sql, looks.notification_queue())
    if full > NOTIFICATIONS:
        yield Finding(
            ERROR,
            "notifications",
            f"the server's notification queue is {full:.0%} full: a session that listens has a transaction open",
            "end that session (see pg_stat_activity); when the queue is full, commits that notify fail",
        )
