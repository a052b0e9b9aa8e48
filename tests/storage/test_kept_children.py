"""Retention never takes a finished child from a parent that lives: neither from the history nor from the live table."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest

from durable import Durable
from durable.instance import LIVE
from durable.storage import instances, maintenance, partitions
from durable.storage.session import Operation, connect, run
from tests import fix_db
from tests.fix_rows import Rows, Session, done
from tests.storage.test_plans import plan, reads, statement

schema = fix_db.schema  # one of its own for each test, since these change it

DAY = 86400.0


@pytest.fixture
def old(rows: Rows) -> date:
    """A day long past, with a partition."""
    day = rows.run(maintenance.now()).astimezone(UTC).date() - timedelta(days=9)
    with rows.connection.transaction():
        partitions._create(rows.connection, rows.sql, day)
    return day


def parent(rows: Rows, pending: int = 1) -> int:
    """A parent that waits for its children."""
    (instance,) = rows.insert(queue="parents")
    rows.fetch(
        "UPDATE {schema}.instances SET status = 'awaiting_children', children_round = 1, children_pending = %s"
        " WHERE id = %s",
        [pending, instance],
    )
    return instance


def finish(rows: Rows, instance: int) -> None:
    """Let a parent end."""
    rows.fetch("UPDATE {schema}.instances SET status = 'runnable' WHERE id = %s", [instance])
    worker = rows.worker()
    (claimed,) = rows.claim(worker, queue="parents")
    assert rows.flush(worker, done(claimed)) == {instance}


def ended(rows: Rows, day: date, count: int = 1, of: int | None = None) -> list[int]:
    """Instances in the history that ended at noon of a day, children of `of`, no longer counted by its barrier."""
    rows.insert(count, parent_id=of)
    worker = rows.worker()
    claimed = rows.claim(worker, count)
    ids = [row.id for row in claimed]
    rows.flush(worker, *map(done, claimed))
    rows.fetch(
        "UPDATE {schema}.history SET finished_at = %s, parent_round = CASE WHEN parent_id IS NULL THEN NULL ELSE 1 END"
        " WHERE id = ANY (%s)",
        [datetime(day.year, day.month, day.day, 12, tzinfo=UTC), ids],
    )
    return ids


def collect(session: Session) -> list[str]:
    return partitions.drop_before(session.connection, session.sql, DAY)


def there(rows: Rows) -> list[int]:
    """Everything in the history, in order."""
    return [row["id"] for row in rows.fetch("SELECT id FROM {schema}.history ORDER BY id")]


def file_of(rows: Rows, day: date) -> int:
    """Which file a partition is in: another one after it was rewritten."""
    (row,) = rows.fetch("SELECT pg_relation_filenode(%s) AS n", [f"{rows.schema}.{partitions._table(day)}"])
    return int(row["n"])


def test_children_of_a_live_parent_outlive_their_partition_and_nothing_else_does(
    app: Durable, rows: Rows, old: date
) -> None:
    waiting, over = parent(rows, pending=1), parent(rows)
    (last,) = rows.insert(queue="last", parent_id=waiting, parent_round=1)
    ended(rows, old, 5)
    kept = ended(rows, old, 3, of=waiting)
    ended(rows, old, 4, of=over)
    ended(rows, old, 4)
    finish(rows, over)
    before = rows.history(kept[0])

    assert collect(rows) == []
    assert there(rows) == [over, *kept]
    assert rows.history(kept[0]) == before, "with every column, the moment of its end too"
    children = app.children_of(waiting)
    assert [(child.id, child.status) for child in children] == [(last, "runnable"), *((id_, "done") for id_ in kept)]
    assert app.result(kept[2]).get(timeout=5) == "ok"

    worker = rows.worker()
    (claimed,) = rows.claim(worker, queue="last")
    rows.flush(worker, done(claimed))
    row = rows.live(waiting)
    assert row is not None
    assert (row["status"], row["children_pending"]) == ("runnable", 0), "the join counts each once"


def test_the_partition_goes_when_the_parent_has_ended(rows: Rows, old: date) -> None:
    waiting = parent(rows)
    ended(rows, old, 3, of=waiting)
    ended(rows, old, 30)
    assert collect(rows) == []
    finish(rows, waiting)
    assert collect(rows) == [partitions._table(old)]
    assert there(rows) == [waiting]


def test_a_partition_of_nothing_but_wanted_rows_is_not_rewritten_again_and_again(rows: Rows, old: date) -> None:
    waiting, other = parent(rows), parent(rows)
    wanted = ended(rows, old, 6, of=waiting)
    leaving = ended(rows, old, 2, of=other)
    ended(rows, old, 20)
    collect(rows)
    file = file_of(rows, old)
    assert collect(rows) == []
    assert file_of(rows, old) == file
    finish(rows, other)
    collect(rows)
    assert set(leaving) <= set(there(rows)), "not worth it for a few"
    assert file_of(rows, old) == file
    more = ended(rows, old, 8)
    collect(rows)
    assert set(there(rows)) == {other, *wanted}, "but when half of it is unwanted"
    assert more


def test_more_wanted_rows_than_one_run_may_copy_leave_the_partition_whole(
    rows: Rows, old: date, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "COPY_MOST", 4)
    waiting, other = parent(rows), parent(rows)
    wanted, leaving = ended(rows, old, 3, of=waiting), ended(rows, old, 2, of=other)
    others = ended(rows, old, 20)
    assert collect(rows) == []
    assert there(rows) == [*wanted, *leaving, *others]
    finish(rows, other)
    assert collect(rows) == []
    assert there(rows) == [other, *wanted]


def test_no_row_is_lost_when_the_process_dies_in_the_middle(rows: Rows, old: date) -> None:
    kept = ended(rows, old, 3, of=parent(rows))
    others = ended(rows, old, 20)
    rows.fetch(
        "CREATE FUNCTION {schema}.die() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(10); RETURN NEW; END'"
    )
    rows.fetch(
        f"CREATE TRIGGER die BEFORE INSERT ON {{schema}}.{partitions._table(old)}"
        " FOR EACH ROW EXECUTE FUNCTION {schema}.die()"
    )
    dying = rows.other()
    with pytest.raises(psycopg.OperationalError):
        collect(dying)
    assert there(rows) == [*kept, *others]
    rows.fetch(f"DROP TRIGGER die ON {{schema}}.{partitions._table(old)}")
    assert collect(rows) == []
    assert there(rows) == kept


def test_thinning_a_partition_never_waits_for_a_reader(rows: Rows, old: date) -> None:
    kept = ended(rows, old, 2, of=parent(rows))
    others = ended(rows, old, 20)
    reader = rows.other()
    with reader.connection.transaction():
        reader.fetch("SELECT count(*) FROM {schema}.history")
        assert collect(rows) == []  # one that waits, waits for this very block
        assert there(rows) == [*kept, *others]
    collect(rows)
    assert there(rows) == kept


def test_a_row_that_is_retried_meanwhile_is_not_in_two_places(rows: Rows, old: date) -> None:
    kept = ended(rows, old, 2, of=parent(rows))
    ended(rows, old, 20)
    rows.fetch("UPDATE {schema}.history SET status = 'failed' WHERE id = %s", [kept[0]])
    other = rows.other()
    with other.connection.transaction():
        assert other.run(instances.retry_failed(kept[0])) == {"default": 1}
        assert collect(rows) == [], "it looks, and goes: nobody waits"
    collect(rows)
    assert there(rows) == kept[1:]
    assert rows.status(kept[0]) == "runnable"


def test_a_reserved_key_of_a_finished_child_stays_with_a_live_parent(rows: Rows) -> None:
    waiting = parent(rows)
    ids = []
    for key, of in (("child", waiting), ("orphan", None)):
        worker = rows.worker()
        rows.insert(correlation_key=key, correlation_scope=(*sorted(LIVE), "done"), parent_id=of)
        (claimed,) = rows.claim(worker)
        rows.flush(worker, done(claimed))
        ids.append(claimed.id)
    rows.fetch(
        "UPDATE {schema}.instances SET finished_at = clock_timestamp() - interval '1 day' WHERE id = ANY (%s)", [ids]
    )

    assert rows.run(maintenance.sweep_kept(3600)) == 1
    assert [rows.status(instance) for instance in ids] == ["done", None]
    finish(rows, waiting)
    assert rows.run(maintenance.sweep_kept(3600)) == 1
    assert rows.status(ids[0]) is None


@pytest.mark.parametrize("pinned", [True, False], ids=["a worker's session", "any session"])
def test_wanted_children_are_found_parent_by_parent_through_indexes(rows: Rows, old: date, pinned: bool) -> None:
    """Among 20,000 rows of 200 families and as many without a parent, no more is read than a step each and the few."""
    noon = datetime(old.year, old.month, old.day, 12, tzinfo=UTC)
    rows.fetch(
        "INSERT INTO {schema}.history (id, eligible_at, created_at, finished_at, token, version, attempt, priority,"
        " crashes, cancel_requested, machine_version, status, queue, machine, step, state_type, state, parent_id)"
        " SELECT n, t, t, t, 1, 1, 0, 0, 0, false, 1, 'done', 'q', 'm', 's', 'json', '{}',"
        " CASE WHEN n %% 2 = 0 THEN 1000000 + n / 200 END"
        " FROM generate_series(1, 40000) AS n, (SELECT %s::timestamptz AS t) AS t",
        [noon],
    )
    rows.fetch(
        "INSERT INTO {schema}.instances (id, status, eligible_at, queue, machine, step, state_type, state)"
        " SELECT CASE WHEN n > 3 THEN n ELSE 1000006 + n END, 'runnable', clock_timestamp(), 'q', 'm', 's', 'json', ''"
        " FROM generate_series(1, 5000) AS n"
    )
    rows.fetch("VACUUM ANALYZE {schema}.history, {schema}.instances")
    since = noon - timedelta(hours=12)

    def operation() -> Operation[list[int]]:
        return maintenance.wanted_children(since, since + timedelta(days=1), 1000)

    connection = connect(rows.dsn, "plans", pinned=pinned)
    try:
        nodes = plan(rows, connection, *statement(operation()))
        with connection.transaction():
            ids = run(connection, rows.sql, operation())
            read = connection.execute(
                "SELECT sum(pg_stat_get_xact_tuples_returned(oid) + pg_stat_get_xact_tuples_fetched(oid))::int"
                " FROM pg_class WHERE relnamespace = %s::regnamespace",
                [rows.schema],
            ).fetchone()
    finally:
        connection.close()
    assert sorted(ids) == [n for n in range(2, 40001, 2) if 7 <= n // 200 <= 9]
    if pinned:  # any other plans for the values it gets, which here are none
        assert reads(nodes, "instances") == {"instances_pkey"}
    assert "Seq Scan" not in {node["Node Type"] for node in nodes}
    assert 0 < read[0] < 3000
