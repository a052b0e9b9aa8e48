"""The history's partitions: one table per UTC day, made ahead, dropped when retention has passed.

There is no default partition: a row for a day without one is refused (23514), and whoever meets that makes the
partition and repeats. A partition is made as a stand-alone table and attached, since `CREATE ... PARTITION OF` takes
ACCESS EXCLUSIVE on the parent. A partition past retention is dropped, unless a live parent may still ask for children
in it: then it is thinned out to those, where they are, so that every look at the history finds them as before. All of
it runs with a short lock_timeout: a waiting DDL statement would block every flush behind it. The DDL itself is in
functions of migration 10, which run as the schema's owner: a worker's role may do no more than call them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial

import psycopg
from psycopg import errors as pg_errors
from psycopg import sql

from durable.sql import Statements
from durable.storage import maintenance
from durable.storage.arrays import Int8Array
from durable.storage.session import Connection, execute, run

log = logging.getLogger(__name__)

AHEAD_DAYS = 14
LOCK_TIMEOUT = "100ms"
COPY_MOST = 10_000
"""Rows that one run copies out of a partition to thin it out; one with more that are wanted stays whole."""
_NAME = re.compile(r"history_(\d{8})")


def days(connection: Connection, statements: Statements) -> set[date]:
    """Return the days (UTC) that have a partition."""
    parent = sql.Identifier(statements.schema, "history").as_string(connection)
    names = [row[0] for row in execute(connection, statements, "partitions", {"parent": parent})]
    return {datetime.strptime(match[1], "%Y%m%d").date() for name in names if (match := _NAME.fullmatch(name))}


def ensure(connection: Connection, statements: Statements, ahead_days: int = AHEAD_DAYS) -> int:
    """Make the partitions from yesterday to `ahead_days` from now that are missing; return how many were made.

    Raises psycopg.Error; a lock that isn't free within 100 ms leaves the rest for the next call.
    """
    today = run(connection, statements, maintenance.now()).astimezone(UTC).date()
    wanted = {today + timedelta(days=offset) for offset in range(-1, ahead_days + 1)}
    missing = sorted(wanted - days(connection, statements))
    made = 0
    for day in missing:
        made += _locked(connection, statements, lambda day=day: _create(connection, statements, day))  # type: ignore[misc]
    return made


def drop_before(connection: Connection, statements: Statements, retention: float) -> list[str]:
    """Drop partitions whose every row is older than `retention` seconds; return their names.

    Children of live parents are not dropped: their partitions are thinned out, at most COPY_MOST rows each.
    Raises psycopg.Error; a lock that isn't free within 100 ms leaves that partition for the next call.
    """
    now = run(connection, statements, maintenance.now()).astimezone(UTC)
    dropped: list[str] = []
    for day in sorted(days(connection, statements)):
        begins = datetime(day.year, day.month, day.day, tzinfo=UTC)
        ends = begins + timedelta(days=1)
        if ends + timedelta(seconds=retention) > now:
            break
        wanted = run(connection, statements, maintenance.wanted_children(begins, ends, COPY_MOST + 1))
        if wanted:
            # Half of it must go to make a copy worth while: else the same rows would be copied at every turn.
            most = 2 * len(wanted) - 1
            if len(wanted) <= COPY_MOST and run(connection, statements, maintenance.more_than(begins, ends, most)):
                _locked(connection, statements, partial(_thin, connection, statements, day, wanted))
        elif _locked(connection, statements, lambda day=day: _drop(connection, statements, day)):  # type: ignore[misc]
            dropped.append(_table(day))
    return dropped


def _locked(connection: Connection, statements: Statements, action: Callable[[], None]) -> bool:
    """Run DDL in its own transaction, one process at a time; False when a lock was not free in time."""
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
            connection.execute(
                "SELECT pg_advisory_xact_lock(hashtext(%s), 20)", (f"durable.{statements.schema}",), prepare=False
            )
            action()
    except pg_errors.LockNotAvailable:
        log.info("a partition's lock was busy; it is tried again at the next turn")
        return False
    except (pg_errors.DuplicateTable, pg_errors.UndefinedTable):
        return False  # another process did the same a moment before
    except psycopg.errors.InvalidTableDefinition:
        return False  # likewise: already attached
    return True


def _table(day: date) -> str:
    return f"history_{day:%Y%m%d}"


def _create(connection: Connection, statements: Statements, day: date) -> None:
    execute(connection, statements, "make_partition", {"day": day})


def _drop(connection: Connection, statements: Statements, day: date) -> None:
    execute(connection, statements, "drop_partition", {"day": day})


def _thin(connection: Connection, statements: Statements, day: date, wanted: Sequence[int]) -> None:
    execute(connection, statements, "thin_partition", {"day": day, "wanted": Int8Array(wanted)})
    log.info("%s keeps %d children of live parents", _table(day), len(wanted))
