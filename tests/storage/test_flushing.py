"""The flusher on real tables: what it does when a flush meets something wrong with a row or with the history."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from durable.runtime import flusher as flusher_module
from durable.runtime.flusher import Flusher
from durable.runtime.link import Link
from durable.storage import partitions
from tests import fix_db
from tests.fix_rows import Rows, done

schema = fix_db.schema  # one of its own for each test, since these change it


@pytest.fixture
def link(rows: Rows) -> Iterator[Link]:
    link = Link(lambda: rows.dsn, rows.sql, "test", pooler=False, most_wait=0.1, pause=lambda seconds: False)
    yield link
    link.drop()


def drop_partitions(rows: Rows) -> None:
    for row in rows.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = %s::regclass",
        [f"{rows.schema}.history"],
    ):
        rows.fetch(f"DROP TABLE {row['name']}")


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_row_that_cannot_even_fail_leaves_its_neighbours_alone(rows: Rows, link: Link, place: int) -> None:
    """Edited by hand: its version can't be counted on, so neither its result nor a failure can be stored."""
    worker = rows.worker()
    claimed = rows.claimed(worker, 8)
    rows.fetch("UPDATE {schema}.instances SET version = 2147483647 WHERE id = %s", [claimed[place].id])
    claimed[place] = claimed[place]._replace(version=2147483647)
    with pytest.raises(psycopg.DataError):
        Flusher(link, lambda seconds: False).flush(worker, [done(row) for row in claimed])
    assert [rows.status(row.id) for row in claimed] == [
        "executing" if n == place else "done" for n in range(len(claimed))
    ]


def test_a_missing_partition_is_made_in_the_middle_of_a_flush(rows: Rows, link: Link) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 3)
    drop_partitions(rows)
    assert Flusher(link, lambda seconds: False).flush(worker, [done(row) for row in claimed]).committed == {
        row.id for row in claimed
    }


def test_a_partition_that_somebody_else_holds_up_is_waited_for(rows: Rows, link: Link) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    drop_partitions(rows)
    other = rows.other()
    other.connection.execute("BEGIN")
    other.fetch("LOCK TABLE {schema}.history IN SHARE UPDATE EXCLUSIVE MODE")
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        if len(pauses) == 2:
            other.connection.execute("COMMIT")
        return False

    assert Flusher(link, pause).flush(worker, [done(claimed)]).committed == {claimed.id}
    assert len(pauses) >= 2


def test_a_connection_lost_while_a_partition_is_made_loses_no_outcome(
    rows: Rows, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = rows.worker()
    claimed = rows.claimed(worker, 3)
    drop_partitions(rows)
    lost: list[Any] = []

    def ensure(connection: Any, statements: Any) -> int:
        if not lost:
            lost.append(connection)
            connection.close()
            raise psycopg.OperationalError("the server closed the connection unexpectedly")
        return partitions.ensure(connection, statements)

    monkeypatch.setattr(flusher_module, "partitions", type("Faulty", (), {"ensure": staticmethod(ensure)}))
    assert Flusher(link, lambda seconds: False).flush(worker, [done(row) for row in claimed]).committed == {
        row.id for row in claimed
    }
    assert len(lost) == 1
