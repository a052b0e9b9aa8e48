"""Another session holds a slot's counter or a parked row: outcomes commit all the same, the repair does the rest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from durable import ConcurrencyLimit
from durable.runtime.flusher import Flusher
from durable.runtime.link import Link
from durable.storage import claims, lanes, limits
from tests.fix_rows import Rows, done

KEY = "gate:k"


@pytest.fixture
def link(rows: Rows) -> Iterator[Link]:
    """A process's connection."""
    link = Link(lambda: rows.dsn, rows.sql, "test", pooler=False, most_wait=1.0, pause=lambda seconds: True)
    yield link
    link.drop()


@pytest.mark.parametrize("how", ["flush", "release"])
def test_held_counter_holds_up_no_outcome(rows: Rows, link: Link, how: str) -> None:
    rows.atomically(limits.put({("concurrency", "gate"): ConcurrencyLimit(1)}))
    worker = rows.worker()
    ids = rows.insert(2, concurrency_key=KEY)
    (claimed,) = rows.claim_limited(worker).rows
    other = rows.other()
    with other.connection.transaction(force_rollback=True):
        other.fetch("SELECT FROM {schema}.gates FOR UPDATE")
        if how == "flush":
            flushed = Flusher(link, lambda seconds: True).flush(worker, [done(claimed)])
            assert flushed.committed == {claimed.id}
        else:
            pairs = [(claimed.id, claimed.token)]
            _, whole = link.run_around_locks(lambda wait: claims.release(worker, pairs, wait=wait))
            assert not whole
    assert rows.fetch("SELECT used FROM {schema}.gates") == [{"used": 1}]
    rows.atomically(lanes.repair())
    assert rows.fetch("SELECT used FROM {schema}.gates") == [{"used": 0}]
    expected = ids[1] if how == "flush" else ids[0]
    assert [row.id for row in rows.claim_limited(worker).rows] == [expected]


def test_held_parked_row_holds_up_no_outcome(rows: Rows, link: Link) -> None:
    worker = rows.worker()
    ids = rows.insert(2, concurrency_key="solo")
    (claimed,) = rows.claim_limited(worker).rows
    other = rows.other()
    with other.connection.transaction(force_rollback=True):
        other.fetch("SELECT FROM {schema}.instances WHERE id = %s FOR UPDATE", [ids[1]])
        flushed = Flusher(link, lambda seconds: True).flush(worker, [done(claimed)])
        assert flushed.committed == {claimed.id}
    rows.atomically(lanes.repair())
    assert [row.id for row in rows.claim_limited(worker).rows] == [ids[1]]
