"""What happens on a clock: promotion, probing, duties, the history's partitions, sweeping."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from durable.config import Config
from durable.instance import LIVE
from durable.runtime.gc import collect
from durable.runtime.link import Link
from durable.storage import maintenance, partitions
from tests import fix_db
from tests.fix_rows import Rows, Session, done

schema = fix_db.schema  # one of its own for each test, since these change it

# Promotion


def make_due(rows: Rows, *ids: int, seconds: float = 1.0) -> None:
    """Each a second longer due than the next."""
    for n, instance in enumerate(ids):
        rows.fetch(
            "UPDATE {schema}.instances SET eligible_at = clock_timestamp() - make_interval(secs => %s) WHERE id = %s",
            [seconds * (len(ids) - n), instance],
        )


def test_a_row_is_promoted_when_due_and_never_before(rows: Rows) -> None:
    (soon,) = rows.insert(delay=60.0)
    (due,) = rows.insert(delay=60.0, queue="b")
    make_due(rows, due)
    before = rows.live(due)
    assert rows.run(maintenance.promote()) == {"b": 1}
    row = rows.live(due)
    assert before is not None
    assert row is not None
    assert row["status"] == "runnable"
    assert row["eligible_at"] > before["eligible_at"], "its place in the order begins now"
    assert rows.status(soon) == "scheduled"
    assert rows.run(maintenance.promote()) == {}
    assert rows.claim(rows.worker(), queue="b")[0].id == due


def test_the_longest_due_are_promoted_first_in_batches(rows: Rows) -> None:
    ids = rows.insert(10, delay=60.0)
    order = [ids[n] for n in (3, 1, 4, 0, 9, 2, 6, 5, 8, 7)]
    make_due(rows, *order)
    worker = rows.worker()
    assert rows.run(maintenance.promote(4)) == {"default": 4}
    assert [row.id for row in rows.claim(worker)] == order[:4]
    assert rows.run(maintenance.promote(100)) == {"default": 6}
    assert [row.id for row in rows.claim(worker)] == order[4:]


def test_promotion_skips_what_another_session_holds(rows: Rows) -> None:
    one, two = rows.insert(2, delay=60.0)
    make_due(rows, one, two)
    other = rows.other()
    with other.connection.transaction():
        assert other.run(maintenance.promote(1)) == {"default": 1}
        assert rows.run(maintenance.promote()) == {"default": 1}
        assert rows.status(two) == "runnable"
    assert rows.run(maintenance.promote()) == {}
    assert rows.status(one) == "runnable"


def test_keys_with_any_scope_never_stop_a_promotion(rows: Rows, app: Any) -> None:
    """A scope that leaves a live status out would let two rows meet in it; the second could never be promoted."""
    task = app.task(name="task")(lambda: None)
    task.apply_async(correlation_key="k", correlation_scope=["runnable"])
    with pytest.raises(Exception, match="occupied"):
        task.apply_async(correlation_key="k", correlation_scope=["runnable"], countdown=60)
    (other,) = rows.insert(delay=60.0)
    make_due(rows, *[row["id"] for row in rows.fetch("SELECT id FROM {schema}.instances WHERE status = 'scheduled'")])
    rows.run(maintenance.promote())
    assert rows.status(other) == "runnable"


def test_the_next_due_moment_is_told_in_seconds(rows: Rows) -> None:
    assert rows.run(maintenance.next_due()) is None
    rows.insert(delay=100.0)
    (late,) = rows.insert(delay=50.0)
    wait = rows.run(maintenance.next_due())
    assert wait is not None
    assert 45 < wait <= 50
    make_due(rows, late, seconds=10)
    wait = rows.run(maintenance.next_due())
    assert wait is not None
    assert -15 < wait <= -10


# Probing


def test_a_probe_counts_what_waits_and_no_more_than_asked(rows: Rows) -> None:
    rows.insert(5, queue="a")
    rows.insert(2, queue="b")
    rows.insert(1, queue="c")
    rows.insert(3, queue="a", machine="strange")
    probe = rows.run(maintenance.probe({"a": 3, "b": 9, "empty": 5}, ["task:1"]))
    assert probe.waiting == {"a": 3, "b": 2, "empty": 0}
    assert (probe.suspects, probe.due, probe.expired) == ([], False, False)
    assert rows.run(maintenance.probe({"a": 99}, ["task:1", "strange:1"])).waiting == {"a": 8}
    assert rows.run(maintenance.probe({"a": 99}, [])).waiting == {"a": 0}


def test_a_probe_sees_suspects_due_rows_and_leases_that_ran_out(rows: Rows) -> None:
    (suspect,) = rows.insert(queue="a")
    (due,) = rows.insert(delay=60.0, queue="elsewhere")
    probe = rows.run(maintenance.probe({"a": 0, "b": 0}, ["task:1"]))
    assert (probe.suspects, probe.due, probe.expired) == ([], False, False)
    rows.fetch("UPDATE {schema}.instances SET crashes = 1 WHERE id = %s", [suspect])
    make_due(rows, due)
    rows.worker(-1.0)
    probe = rows.run(maintenance.probe({"a": 0, "b": 0}, ["task:1"]))
    assert (probe.waiting, probe.suspects, probe.due, probe.expired) == ({"a": 0, "b": 0}, ["a"], True, True)


# Duties


def test_a_duty_is_taken_by_one_and_not_again_within_its_interval(rows: Rows) -> None:
    other = rows.other()
    with other.connection.transaction():
        assert other.run(maintenance.take_duty("gc", 60))
        assert not rows.run(maintenance.take_duty("gc", 60)), "another has it right now"
    assert not rows.run(maintenance.take_duty("gc", 60))
    assert rows.run(maintenance.take_duty("gc", 0))
    assert not rows.run(maintenance.take_duty("no such duty", 0))


def test_a_duty_whose_holder_rolled_back_is_free_again(rows: Rows) -> None:
    other = rows.other()
    with other.connection.transaction(force_rollback=True):
        assert other.run(maintenance.take_duty("gc", 60))
    assert rows.run(maintenance.take_duty("gc", 60))


# Partitions


def today(rows: Rows) -> date:
    return rows.run(maintenance.now()).astimezone(UTC).date()


def names(rows: Rows) -> list[str]:
    return [
        row["name"]
        for row in rows.fetch(
            "SELECT c.relname AS name FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid"
            " WHERE inhparent = %s::regclass ORDER BY 1",
            [f"{rows.schema}.history"],
        )
    ]


def table(day: date) -> str:
    return f"history_{day:%Y%m%d}"


def make(rows: Rows, day: date) -> None:
    with rows.connection.transaction():
        partitions._create(rows.connection, rows.sql, day)


def finished_on(rows: Rows, day: date) -> int:
    """An instance in the history that ended at noon of a day."""
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.flush(worker, done(claimed))
    rows.fetch(
        "UPDATE {schema}.history SET finished_at = %s WHERE id = %s",
        [datetime(day.year, day.month, day.day, 12, tzinfo=UTC), claimed.id],
    )
    return claimed.id


def test_partitions_reach_from_yesterday_to_fourteen_days_ahead(rows: Rows) -> None:
    day = today(rows)
    assert names(rows) == [table(day + timedelta(days=n)) for n in range(-1, 15)]
    assert partitions.ensure(rows.connection, rows.sql) == 0


def test_a_missing_partition_is_made_and_holds_exactly_its_utc_day(rows: Rows) -> None:
    day = today(rows) + timedelta(days=3)
    rows.fetch(f"DROP TABLE {{schema}}.{table(day)}")
    rows.fetch("SET timezone = 'Pacific/Kiritimati'")
    assert partitions.ensure(rows.connection, rows.sql) == 1
    assert table(day) in names(rows)
    rows.fetch("SET timezone = 'UTC'")
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    (row,) = rows.fetch(
        "SELECT pg_get_expr(relpartbound, oid) AS bound FROM pg_class WHERE oid = %s::regclass",
        [f"{rows.schema}.{table(day)}"],
    )
    assert (
        row["bound"] == f"FOR VALUES FROM ('{start:%F} 00:00:00+00') TO ('{start + timedelta(days=1):%F} 00:00:00+00')"
    )


def test_several_that_make_partitions_at_once_make_each_once(rows: Rows) -> None:
    for name in names(rows):
        rows.fetch(f"DROP TABLE {{schema}}.{name}")
    sessions = [rows.other() for _ in range(4)]
    start = threading.Barrier(4)

    def ensure(session: Session) -> int:
        start.wait()
        return partitions.ensure(session.connection, session.sql)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(ensure, sessions))
    assert sum(made) + partitions.ensure(rows.connection, rows.sql) == 16
    assert len(names(rows)) == 16


def test_old_partitions_are_dropped_whole_and_no_younger_one(rows: Rows) -> None:
    day = today(rows)
    for age in (5, 4, 3, 2):
        make(rows, day - timedelta(days=age))
    old, young = finished_on(rows, day - timedelta(days=4)), finished_on(rows, day - timedelta(days=1))
    assert partitions.drop_before(rows.connection, rows.sql, 3 * 86400.0) == [
        table(day - timedelta(days=age)) for age in (5, 4)
    ]
    assert rows.status(old) is None
    assert rows.status(young) == "done"
    assert partitions.drop_before(rows.connection, rows.sql, 3 * 86400.0) == []
    assert len(names(rows)) == 18


def test_partition_ddl_never_waits_for_an_open_reader(rows: Rows) -> None:
    """It would make every flush queue up behind it."""
    day = today(rows) - timedelta(days=9)
    make(rows, day)
    missing = today(rows) + timedelta(days=14)
    rows.fetch(f"DROP TABLE {{schema}}.{table(missing)}")
    reader = rows.other()
    with reader.connection.transaction():
        reader.fetch("SELECT count(*) FROM {schema}.history")
        # Whoever waits here, waits for this very block.
        assert partitions.drop_before(rows.connection, rows.sql, 86400.0) == []
        assert partitions.ensure(rows.connection, rows.sql) == 1, "attaching takes no lock that a reader holds"
    assert partitions.drop_before(rows.connection, rows.sql, 86400.0) == [table(day)]


def test_a_commit_in_progress_is_not_disturbed_by_new_partitions(rows: Rows) -> None:
    missing = today(rows) + timedelta(days=14)
    rows.fetch(f"DROP TABLE {{schema}}.{table(missing)}")
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    other = rows.other()
    with other.connection.transaction():
        assert other.flush(worker, done(claimed)) == {claimed.id}
        assert partitions.ensure(rows.connection, rows.sql) == 1
    assert rows.status(claimed.id) == "done"


# Sweeping


def kept(rows: Rows, key: str, age: timedelta) -> int:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker, correlation_key=key, correlation_scope=(*sorted(LIVE), "done"))
    rows.flush(worker, done(claimed))
    rows.fetch("UPDATE {schema}.instances SET finished_at = clock_timestamp() - %s WHERE id = %s", [age, claimed.id])
    return claimed.id


def test_kept_rows_go_once_retention_has_passed_in_bounded_batches(rows: Rows) -> None:
    old = [kept(rows, f"old{n}", timedelta(hours=2)) for n in range(3)]
    young = kept(rows, "young", timedelta(minutes=30))
    (live,) = rows.insert()
    assert rows.run(maintenance.sweep_kept(3600, 2)) == 2
    assert rows.run(maintenance.sweep_kept(3600, 2)) == 1
    assert rows.run(maintenance.sweep_kept(3600, 2)) == 0
    assert [rows.status(instance) for instance in (*old, young, live)] == [None] * 3 + ["done", "runnable"]


def test_sweeping_skips_rows_that_another_session_holds(rows: Rows) -> None:
    held, free = kept(rows, "a", timedelta(hours=2)), kept(rows, "b", timedelta(hours=2))
    other = rows.other()
    with other.connection.transaction():
        other.fetch("SELECT FROM {schema}.instances WHERE id = %s FOR UPDATE", [held])
        assert rows.run(maintenance.sweep_kept(3600)) == 1
    assert rows.status(held) == "done"
    assert rows.status(free) is None


def test_collecting_does_all_of_it(rows: Rows) -> None:
    day = today(rows)
    make(rows, day - timedelta(days=9))
    rows.fetch(f"DROP TABLE {{schema}}.{table(day + timedelta(days=2))}")
    kept(rows, "a", timedelta(days=2))
    link = Link(lambda: rows.dsn, rows.sql, "test", pooler=False, most_wait=1.0, pause=lambda seconds: True)
    assert collect(link, Config()) == 2
    assert collect(link, Config()) == 0
    link.drop()
    assert names(rows) == [table(day + timedelta(days=n)) for n in range(-1, 15)]
