"""`durable call`, `signal`, `result`, `show`, `list`, `purge`, `cancel`: one instance or many."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from durable import AsyncResult, Durable
from durable.errors import CorruptRowError, NotFoundError, ResultTimeout, TaskFailed
from durable.instance import STATUSES, TERMINAL, StoredSignal
from durable.storage import inspection, instances, signals
from durable.storage.inspection import Detail, Listed
from durable.storage.session import Connection, run, run_repeatedly
from durable_cli.exits import FAILED, USAGE, CommandError
from durable_cli.output import (
    error_line,
    note,
    print_json,
    print_json_array,
    print_pairs,
    print_table,
    readable,
    say,
    seconds,
)
from durable_cli.session import Session, app_options, ask, connected, database_options
from durable_cli.values import (
    DEDUP_KEY,
    INSTANCE,
    JSON,
    JSON_ARRAY,
    JSON_OBJECT,
    KEY,
    MOMENT,
    QUEUE,
    SECONDS,
    SECONDS_OR_MOMENT,
    SIGNAL,
    TARGET,
)

PAGE = 1000
"""Instances of one statement of a listing."""
FOREVER = "for ever"


@click.command()
@click.argument("name")
@click.option("--args", "arguments", type=JSON_ARRAY, default="[]", help="Positional arguments, a JSON array.")
@click.option("--kwargs", type=JSON_OBJECT, default="{}", help="Keyword arguments, a JSON object.")
@click.option("--countdown", type=SECONDS, metavar="SECONDS", help="Start no sooner than in so many seconds.")
@click.option("--eta", type=MOMENT, metavar="TIME", help="Start no sooner than at this time, with its time zone.")
@click.option("--queue", type=QUEUE, help="Instead of the task's queue.")
@click.option("--priority", type=click.IntRange(-32768, 32767), metavar="N", help="Lower runs earlier.")
@click.option("--expires", type=SECONDS_OR_MOMENT, metavar="SECONDS|TIME", help="Do not start it any more after this.")
@click.option("--key", type=KEY, help="Correlation key: at most one live instance has it.")
@click.option("--concurrency-key", metavar="KEY", help="At most one of it executes, or as many as its gate lets.")
@click.option("--rate-limit", metavar="NAME[:PARTITION]", help="The limit that it draws tokens from.")
@click.option("--weight", type=int, metavar="N", help="How many tokens; else 1.")
@click.option(
    "--wait", is_flag=False, flag_value=FOREVER, metavar="[SECONDS]",
    help="Wait for the result (so long) and print it instead of the id.",
)  # fmt: skip
@app_options
@click.pass_context
def call(
    ctx: click.Context,
    name: str,
    arguments: list[Any],
    kwargs: dict[str, Any],
    countdown: float | None,
    eta: datetime | None,
    queue: str | None,
    priority: int | None,
    expires: float | datetime | None,
    key: str | None,
    concurrency_key: str | None,
    rate_limit: str | None,
    weight: int | None,
    wait: str | None,
) -> None:
    """Enqueue a run of the task NAME and print its id."""
    session: Session = ctx.obj
    timeout = None if wait in (None, FOREVER) else SECONDS.convert(wait, None, ctx)
    app = session.app()
    task = app.find_task(name)
    options: dict[str, Any] = {
        "schedule_in": countdown,
        "schedule_at": eta,
        "queue": queue,
        "priority": priority,
        "expires": expires,
        "correlation_key": key,
        "concurrency_key": concurrency_key,
        "rate_limit": rate_limit,
        "weight": weight,
    }
    try:
        task.new(arguments, kwargs, **options)
    except TypeError as error:
        raise CommandError(str(error), USAGE) from error
    with connected(app) as connection:
        result = app.insert(task, args=arguments, kwargs=kwargs, connection=connection, **options)
    if wait is not None:
        if not session.as_json:
            note(f"instance {result.id}")
        ctx.exit(_print_outcome(session, app, result, timeout))
    if session.as_json:
        print_json({"id": result.id, "task": task.name, "queue": queue or task.queue})
    else:
        say(str(result.id))


@click.command()
@click.argument("receiver", metavar="ID|KEY")
@click.argument("name", type=SIGNAL)
@click.option("--payload", type=JSON, default="null", help="What it carries, as JSON.")
@click.option("--dedup-key", type=DEDUP_KEY, metavar="KEY", help="Delivers it once, however often it is sent.")
@click.option("--key", "by_key", is_flag=True, help="It is a correlation key, even if it looks like an id.")
@database_options
@click.pass_context
def signal(ctx: click.Context, receiver: str, name: str, payload: Any, dedup_key: str | None, by_key: bool) -> None:
    """Put the message NAME into the inbox of a live instance, by id or correlation key."""
    session: Session = ctx.obj
    wanted = (KEY if by_key else TARGET).convert(receiver, None, ctx)
    app = session.database()
    with connected(app) as connection:
        new = app.signal(wanted, name, payload, dedup_key=dedup_key, connection=connection)
    if session.as_json:
        print_json({"target": wanted, "name": name, "delivered": new, "duplicate": not new})
    else:
        say(f"{wanted}: " + ("delivered" if new else f"nothing done: {dedup_key!r} was delivered before"))


@click.command()
@click.argument("instance", metavar="ID", type=INSTANCE)
@click.option("--timeout", type=SECONDS, metavar="SECONDS", help="Wait so long at most; else for ever.")
@click.option("--no-wait", is_flag=True, help="Do not wait; exit 1 if it is not finished.")
@database_options
@click.pass_context
def result(ctx: click.Context, instance: int, timeout: float | None, no_wait: bool) -> None:
    """Wait for an instance and print its result; a failure's traceback goes to stderr, with exit code 1."""
    session: Session = ctx.obj
    app = session.database()
    found = ask(app, instances.snapshot(instance))
    if found is None:
        raise NotFoundError(f"there is no instance {instance}")
    if found.status not in TERMINAL:
        if no_wait:
            timeout = 0.0
        elif sys.stderr is not None and sys.stderr.isatty():
            note(f"instance {instance} is {found.status}; waiting")
    if timeout == 0.0 and found.status not in TERMINAL:
        if session.as_json:
            print_json({"id": instance, "status": found.status, "result": None, "error": None})
        raise ResultTimeout(f"instance {instance} is not finished: {found.status}")
    ctx.exit(_print_outcome(session, app, app.result(instance), timeout))


def _print_outcome(session: Session, app: Durable, result: AsyncResult[Any], timeout: float | None) -> int:
    """Wait, print how it ended, and return the exit code."""
    try:
        value = result.get(timeout=timeout)
        failure = None
    except TaskFailed as error:
        value, failure = result.result, error
    finally:
        app.close()
    if session.as_json:
        print_json({"id": result.id, "status": result.status, "result": value, "error": _failure(failure)})
    elif failure is None:
        say(readable(value))
    if failure is None:
        return 0
    note(f"Error: {failure}")
    if failure.traceback_text and not session.as_json:
        note(failure.traceback_text.rstrip("\n"))
    return FAILED


def _failure(error: TaskFailed | None) -> dict[str, str] | None:
    if error is None:
        return None
    return {"type": error.error_type, "message": error.message, "traceback": error.traceback_text}


@click.command()
@click.argument("instance", metavar="ID", type=INSTANCE)
@database_options
@click.pass_obj
def show(session: Session, instance: int) -> None:
    """Show everything about an instance, its arguments and result included."""
    app = session.database()
    with connected(app) as connection:
        detail = run(connection, app.sql, inspection.show(instance))
        if detail is None:
            raise NotFoundError(f"there is no instance {instance}")
        document = _document(app, detail)
        document["children"] = run(connection, app.sql, inspection.children_by_status(instance))
        inbox = run(connection, app.sql, signals.inbox([instance])).get(instance, [])
    seen = document.pop("signals_seen")
    unread = [] if seen is None else [entry for entry in inbox if entry.id > seen]
    inbox = [entry for entry in inbox if entry not in unread]
    document["inbox"] = [_signal(app, entry) for entry in inbox]
    document["unread"] = [_signal(app, entry) for entry in unread]
    if session.as_json:
        print_json(document)
        return
    error = document.pop("error")
    document["awaits"] = ", ".join(document["awaits"] or ()) or None
    document["children"] = _counted(document["children"])
    document["inbox"] = _counted(Counter(entry.name for entry in inbox))
    document["unread"] = _counted(Counter(entry.name for entry in unread))
    lines = {
        name.replace("_", " "): readable(value) if name in ("args", "kwargs", "state", "result") else value
        for name, value in document.items()
        if value is not None and not (name in ("args", "kwargs") and not value)
    }
    if error is not None:
        lines["error"] = error_line(error, 1000)
    print_pairs(lines.items())
    if error and error.get("traceback"):
        say()
        say(str(error["traceback"]).rstrip("\n"))


def _document(app: Durable, detail: Detail) -> dict[str, Any]:
    """The instance by names, its payloads decoded where this app accepts their type."""
    document: dict[str, Any] = detail._asdict()
    document["waits_for"] = inspection.waits_for(document.pop("lane"), document.pop("limit_missing"))
    if detail.rate_limit is None:
        document["weight"] = None
    document["task"] = document.pop("machine")
    document["task_version"] = document.pop("machine_version")
    document["attempts"] = document.pop("version")
    state = _decoded(app, document.pop("state_type"), document.pop("state"), "arguments")
    result = _decoded(app, document.pop("result_type"), document.pop("result"), "result")
    if isinstance(state, Mapping) and state.keys() <= {"args", "kwargs"}:
        payloads = {"args": state.get("args", []), "kwargs": state.get("kwargs", {})}
    else:
        payloads = {"state": state}
    error = document.pop("error")
    first = {name: document.pop(name) for name in ("id", "task", "task_version", "status", "attempts", "queue")}
    return {**first, **payloads, "result": result, "error": error, **document}


def _signal(app: Durable, entry: StoredSignal) -> dict[str, Any]:
    payload = _decoded(app, entry.payload_type, entry.payload, "payload")
    return {"id": entry.id, "name": entry.name, "payload": payload, "created_at": entry.created_at}


def _counted(counts: Mapping[str, int]) -> str | None:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or None


def _decoded(app: Durable, type_name: str | None, body: bytes | None, what: str) -> Any:
    if type_name is None:
        return None
    try:
        return app.codec.decode(type_name, body or b"", what)
    except CorruptRowError as error:
        return f"<{error}>"


@click.command("list")
@click.option("--limit", type=click.IntRange(0), default=100, show_default=True, metavar="N", help="0 for all.")
@click.option("-Q", "--queue", type=QUEUE, help="Only of this queue.")
@click.option("--status", type=click.Choice(STATUSES), metavar="STATUS", help="Only in this status.")
@click.option("--task", metavar="NAME", help="Only of this task.")
@database_options
@click.pass_obj
def list_(session: Session, limit: int, queue: str | None, status: str | None, task: str | None) -> None:
    """List instances, live and finished, newest first."""
    app = session.database()
    with connected(app) as connection:
        listed = _pages(app, connection, limit, queue, status, task)
        if session.as_json:
            print_json_array(_line(entry) for entry in listed)
            return
        now = datetime.now(UTC)
        rows = [
            (
                entry.id,
                entry.machine,
                entry.queue,
                entry.status,
                entry.version,
                seconds(max(0.0, (now - entry.created_at).total_seconds())),
                None if entry.finished_at is None else seconds((entry.finished_at - entry.created_at).total_seconds()),
                entry.correlation_key,
                _remark(entry),
            )
            for entry in listed
        ]
    columns = ("id", "task", "queue", "status", "attempts", "age", "took", "key", "remark")
    if rows:
        print_table(columns, rows, ("id", "attempts", "age", "took"))
    else:
        say("no instances")


def _pages(
    app: Durable, connection: Connection, limit: int, queue: str | None, status: str | None, task: str | None
) -> Iterator[Listed]:
    """Instances newest first, read a page at a time: each once, however many there are."""
    before: int | None = None
    left = limit or None
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        page = run(connection, app.sql, inspection.listing(queue, status, task, size, before))
        yield from page
        if len(page) < size:
            return
        before = page[-1].id
        left = None if left is None else left - size


def _remark(entry: Listed) -> str | None:
    waits = f"waits for {entry.waits_for}" if entry.waits_for else None
    parts = ["unread signals" if entry.unread else None, entry.reason or waits or error_line(entry.error)]
    return "; ".join(part for part in parts if part) or None


def _line(entry: Listed) -> dict[str, Any]:
    document = entry._asdict()
    del document["lane"], document["limit_missing"]
    document["waits_for"] = entry.waits_for
    document["task"] = document.pop("machine")
    document["task_version"] = document.pop("machine_version")
    document["attempts"] = document.pop("version")
    return document


@click.command()
@click.option("-Q", "--queue", type=QUEUE, help="Only of this queue; else of all.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@database_options
@click.pass_obj
def purge(session: Session, queue: str | None, yes: bool) -> None:
    """Delete waiting instances that never started."""
    app = session.database()
    with connected(app) as connection:
        database = connection.info.dbname
        count = run(connection, app.sql, inspection.purgeable(queue))
        what = f"{count:,} waiting instance{'' if count == 1 else 's'} of " + (
            f"queue {queue!r}" if queue else "all queues"
        )
        where = f"schema {app.schema!r}, database {database!r}"
        if not yes:
            if sys.stdin is None or not sys.stdin.isatty():
                raise CommandError(f"this would delete {what} ({where}); say --yes to do it", USAGE)
            click.confirm(f"Delete {what} ({where})?", abort=True, err=True)
        purged = run_repeatedly(connection, app.sql, lambda: inspection.purge(queue))
        left = run(connection, app.sql, inspection.purgeable(queue))
    if left:
        note(f"Note: {left:,} waiting instances came meanwhile, or are held by other sessions; purge again")
    if session.as_json:
        print_json({"purged": purged, "queue": queue, "schema": app.schema, "database": database})
    else:
        say(f"deleted {purged:,} waiting instance{'' if purged == 1 else 's'} ({where})")
