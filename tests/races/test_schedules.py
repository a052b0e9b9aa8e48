"""Every occurrence once, whoever else fires, and whoever dies on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from durable import Durable, every
from durable.runtime import periodic
from durable.runtime.link import Link
from durable.runtime.periodic import Firing, StandIn
from durable.schedules import Periodic
from durable.storage import instances, maintenance, schedules
from durable.storage.schedules import AT_ONCE
from tests.fix_db import wait_until
from tests.fix_rows import Rows, new
from tests.interleaving import Held

NIGHT = timedelta(hours=8)


def entry(name: str = "nightly", **values: Any) -> Periodic:
    schedule = values.pop("schedule", every(3600))
    return Periodic(name, schedule, **{"misfire": "once", "overlap": "allow", "new": new(), **values})


class Clock:
    """Schedules whose time comes when a test says so."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return [tuple(row.values()) for row in self.rows.fetch(query, parameters)]

    def declare(self, *entries: Periodic, app: str = "test") -> list[str]:
        return self.rows.atomically(schedules.declare(app, entries))  # type: ignore[no-any-return]

    def due(self, name: str = "nightly", ago: float = 1.0) -> None:
        self.sql(
            "UPDATE {schema}.schedules SET next_at = clock_timestamp() - make_interval(secs => %s) WHERE name = %s",
            ago,
            name,
        )

    def fire(self) -> int:
        return len(self.rows.atomically(schedules.fire(())).inserted)

    def of(self, *columns: str) -> Any:
        return self.sql(f"SELECT {', '.join(columns)} FROM {{schema}}.schedules ORDER BY name")

    @property
    def inserted(self) -> int:
        return int(self.sql("SELECT count(*) FROM {schema}.instances")[0][0])


@pytest.fixture
def clock(rows: Rows) -> Clock:
    return Clock(rows)


def test_two_beats_at_the_same_moment_fire_once(rows: Rows, clock: Clock) -> None:
    clock.declare(entry())
    clock.due()
    first = Held(rows.other(), schedules.fire(())).until("move_schedule")
    assert clock.fire() == 0  # passes by the locked row, waits for nobody
    assert len(first.commit().inserted) == 1
    assert clock.fire() == 0
    assert clock.inserted == 1


def test_a_beat_that_dies_between_insert_and_commit_leaves_the_occurrence_to_others(rows: Rows, clock: Clock) -> None:
    clock.declare(entry())
    clock.due()
    first = Held(rows.other(), schedules.fire(())).until("move_schedule")
    rows.lose(first.session)
    assert clock.fire() == 1
    assert clock.inserted == 1
    ((fired, late),) = clock.of("fired", "next_at > clock_timestamp()")
    assert (fired, late) == (1, True)


def test_a_second_beat_that_saw_it_due_before_the_first_committed_fires_nothing(rows: Rows, clock: Clock) -> None:
    """Its snapshot is older than the first one's commit: the lock shows it the row as it is now."""
    clock.declare(entry())
    clock.due()
    second = rows.other()
    second.connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
    second.connection.execute(f"SELECT next_at FROM {rows.schema}.schedules")
    assert clock.fire() == 1
    second.connection.execute("ROLLBACK")
    assert clock.fire() == 0
    assert clock.inserted == 1


def test_disabling_waits_for_a_firing_and_enabling_begins_with_what_comes_next(rows: Rows, clock: Clock) -> None:
    clock.declare(entry())
    clock.due()
    first = Held(rows.other(), schedules.fire(())).until("move_schedule")
    going = rows.background(lambda: rows.other().atomically(schedules.switch("nightly", False)))
    first.commit()
    assert going.result(20) is True
    clock.due(ago=NIGHT.total_seconds())
    assert clock.fire() == 0
    assert rows.atomically(schedules.switch("nightly", True)) is True
    assert clock.fire() == 0, "what it missed while it was off is not made up for"
    assert rows.atomically(schedules.switch("nightly", True)) is False
    assert rows.atomically(schedules.switch("unknown", True)) is None


def test_an_occurrence_is_left_out_while_the_last_one_runs_if_that_was_asked_for(rows: Rows, clock: Clock) -> None:
    clock.declare(entry(overlap="skip"), entry("free"))
    for name in ("nightly", "free"):
        clock.due(name)
    assert clock.fire() == 2
    for name in ("nightly", "free"):
        clock.due(name)
    assert clock.fire() == 1
    assert clock.of("name", "fired", "skipped") == [("free", 2, 0), ("nightly", 1, 1)]
    clock.sql("DELETE FROM {schema}.instances")
    clock.due()
    assert clock.fire() == 1


def test_every_missed_occurrence_is_made_up_for_over_several_transactions(
    rows: Rows, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "AT_ONCE", 3)
    clock.declare(entry(misfire="all"))
    clock.sql(
        "UPDATE {schema}.schedules SET next_at = date_trunc('hour', clock_timestamp() AT TIME ZONE 'UTC')"
        " AT TIME ZONE 'UTC' - interval '7 hours'"
    )
    assert [clock.fire() for _ in range(4)] == [3, 3, 2, 0]
    assert clock.of("fired", "next_at - last_at") == [(8, timedelta(hours=1))]


def test_firing_a_long_backlog_lets_its_caller_keep_its_leases(
    app: Durable, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.periodic(every(1), misfire="all")
    @app.task(name="t")
    def work() -> None: ...

    link = Link(app.dsn, app.sql, "test", pooler=False, most_wait=1.0, pause=lambda _: False)
    firing = Firing(app, link)
    firing.declare()
    connection.execute(f"UPDATE {app.schema}.schedules SET next_at = clock_timestamp() - interval '1 hour'")
    monkeypatch.setattr(periodic, "AT_MOST", 0.0)
    fired = f"SELECT fired FROM {app.schema}.schedules"
    assert (firing.fire(), connection.execute(fired).fetchone()[0]) == (1, AT_ONCE)
    assert (firing.fire(), connection.execute(fired).fetchone()[0]) == (1, 2 * AT_ONCE)
    link.drop()


def test_a_schedule_keeps_its_time_unless_its_timing_changed(rows: Rows, clock: Clock) -> None:
    clock.declare(entry(), entry("gone"))
    clock.due(ago=5)
    rows.atomically(schedules.switch("nightly", False))
    before = clock.of("next_at")[1]
    assert clock.declare(entry(misfire="skip", new=new(priority=7))) == []
    assert clock.of("name", "next_at", "enabled", "misfire") == [("nightly", before[0], False, "skip")]
    clock.declare(Periodic("nightly", every(60), "once", "allow", new()))
    ((next_at,),) = clock.of("next_at")
    assert next_at > before[0]


def test_another_apps_schedule_is_left_alone(rows: Rows, clock: Clock) -> None:
    clock.declare(entry())
    assert clock.declare(entry(misfire="all"), entry("mine"), app="other") == ["nightly"]
    assert clock.of("name", "app", "misfire") == [("mine", "other", "once"), ("nightly", "test", "once")]
    clock.declare(app="other")
    assert clock.of("name") == [("nightly",)]


def test_what_newer_code_has_written_is_left_to_it(rows: Rows, clock: Clock) -> None:
    clock.declare(entry("broken"), entry("future"), entry())
    clock.sql("UPDATE {schema}.schedules SET schedule = 'fortnightly' WHERE name = 'broken'")
    clock.sql("""UPDATE {schema}.schedules SET template = template || '{"moon": 1}' WHERE name = 'future'""")
    for name in ("broken", "future", "nightly"):
        clock.due(name)
    fired = rows.atomically(schedules.fire(()))
    assert (len(fired.inserted), sorted(fired.unreadable)) == (1, ["broken", "future"])
    assert rows.atomically(schedules.fire(fired.unreadable)).unreadable == []


def test_an_occupied_key_leaves_the_occurrence_out(rows: Rows, clock: Clock) -> None:
    clock.declare(entry(new=new(correlation_key="one")))
    for _ in range(2):
        clock.due()
        clock.fire()
    assert clock.of("fired", "skipped") == [(1, 1)]
    assert clock.inserted == 1


def test_running_by_hand_moves_nothing_on(rows: Rows, clock: Clock) -> None:
    clock.declare(entry(new=new(priority=3)))
    before = clock.of("next_at")
    ran = rows.atomically(schedules.run_by_hand("nightly"))
    assert ran is not None
    assert ran[1].priority == 3
    assert clock.of("next_at") == before
    assert clock.of("last_id", "fired") == [(ran[0], 1)]
    assert rows.atomically(schedules.run_by_hand("unknown")) is None


def test_an_app_declares_and_fires_its_own(app: Durable, connection: Any) -> None:
    @app.periodic(every(3600), kwargs={"n": 4})
    @app.task(name="t")
    def t(n: int) -> int:
        return n

    (declared,) = app.schedules()
    assert app.run(schedules.declare(app.name, [declared])) == []
    connection.execute(f"UPDATE {app.schema}.schedules SET next_at = clock_timestamp()")
    assert len(app.run(schedules.fire(())).inserted) == 1
    row = connection.execute(f"SELECT machine, state FROM {app.schema}.instance_view").fetchone()
    assert row == ("t", {"kwargs": {"n": 4}})


@pytest.fixture
def link(rows: Rows) -> Iterator[Link]:
    """A process's connection."""
    link = Link(lambda: rows.dsn, rows.sql, "test", pooler=False, most_wait=1.0, pause=lambda seconds: True)
    yield link
    link.drop()


@pytest.mark.parametrize(
    "change",
    ["schedule = 'sometimes'", "tz = 'Mars/Olympus', schedule = '* * * * *'", """template = template || '{"x": 1}'""",
     """template = template || '{"priority": 99999}'"""],
    ids=["schedule", "zone", "newer template", "refused by Postgres"],
)  # fmt: skip
def test_a_row_that_cannot_be_fired_is_told_of_once_and_stops_no_other(
    app: Durable, clock: Clock, link: Link, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock.declare(entry("bad"), entry("good"))
    clock.sql(f"UPDATE {{schema}}.schedules SET {change} WHERE name = 'bad'")
    clock.due("bad", 5)
    clock.due("good")
    firing = Firing(app, link)
    assert firing.fire() == 1
    assert firing.fire() == 0
    assert [record.levelname for record in caplog.records if "'bad'" in record.message] == ["ERROR"]
    assert clock.of("name", "fired") == [("bad", 0), ("good", 1)]
    assert (clock.rows.run(maintenance.next_due()) or 0) < 0
    wait = clock.rows.run(maintenance.next_due(firing.left))
    assert wait is not None
    assert wait > 0, "nor does it keep a beat from sleeping"


def test_a_wrong_entry_stops_no_other_and_nothing_is_forgotten_for_it(
    app: Durable, clock: Clock, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    app.task(name="add")(lambda: None)
    clock.declare(entry("before"))
    app.conf.beat_schedule = {"typo": {"task": "ad", "schedule": 5}, "fine": {"task": "add", "schedule": 5}}
    Firing(app, link).declare()
    assert "entry 'typo': no task 'ad' is registered; did you mean 'add'?" in caplog.text
    assert clock.of("name") == [("before",), ("fine",)]
    del app.conf.beat_schedule["typo"]  # type: ignore[attr-defined]
    Firing(app, link).declare()
    assert clock.of("name") == [("fine",)]


def test_an_agent_that_stands_in_fires_at_every_poll_until_a_beat_lives(app: Durable, clock: Clock, link: Link) -> None:
    """Also what is rarely due: it is not late by another `beat_grace` each time."""
    app.conf.update(beat_grace=0.5, poll_interval=0.01)
    clock.declare(entry())
    stand_in = StandIn(app, link)
    clock.due(ago=0.1)

    def fired(least: int) -> bool:
        stand_in.turn()
        return bool(clock.of("fired")[0][0] >= least)

    wait_until(lambda: fired(1), what="the first, after the grace")
    wait_until(lambda: fired(1) and not clock.rows.run(schedules.overdue(0.0)), 1)
    for count in (2, 3):
        clock.due(ago=0.0)
        wait_until(lambda count=count: fired(count), 0.4, "an occurrence at the next poll")
    clock.rows.worker(kind="beat")
    wait_until(lambda: fired(3) and not stand_in._fires, what="a beat is seen")
    clock.due(ago=5)
    before = clock.rows.run(maintenance.now())
    wait_until(lambda: fired(3) and (clock.rows.run(maintenance.now()) - before).total_seconds() > 1.2)
    assert clock.of("fired") == [(3,)], "overdue or not, it is the beat's"


def test_the_server_ends_the_transaction_of_a_beat_that_freezes(rows: Rows, clock: Clock) -> None:
    clock.declare(entry())
    clock.due()
    beat = rows.other()
    before = beat.fetch("SHOW idle_in_transaction_session_timeout")
    held = Held(beat, schedules.fire(())).until("move_schedule")
    (row,) = beat.fetch("SHOW idle_in_transaction_session_timeout")
    assert row["idle_in_transaction_session_timeout"] == "10s"
    held.commit()
    assert beat.fetch("SHOW idle_in_transaction_session_timeout") == before, "of that transaction only"


def test_every_occurrence_that_is_left_out_is_counted(rows: Rows, clock: Clock) -> None:
    clock.declare(entry(schedule=every(0.25), overlap="skip"))
    clock.due(ago=1.1)
    assert clock.fire() == 1
    ((fired, skipped),) = clock.of("fired", "skipped")
    assert (fired, skipped >= 4) == (1, True)


def hold_key(rows: Rows, key: str) -> Held:
    """Another session's open transaction that has inserted an instance of a key."""
    return Held(rows.other(), instances.insert(new(correlation_key=key))).until(None)


def test_held_key_delays_only_its_schedules(
    app: Durable,
    rows: Rows,
    clock: Clock,
    link: Link,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"n{number}" for number in range(6)]
    keyed = ("n1", "n4")
    clock.declare(*(entry(name, new=new(correlation_key=name if name in keyed else None)) for name in names))
    held = [hold_key(rows, name) for name in keyed]
    for number, name in enumerate(names):
        clock.due(name, 10 - number)
    firing = Firing(app, link)
    began = time.monotonic()
    assert firing.fire() == 4
    assert time.monotonic() - began < 5
    assert dict(clock.of("name", "fired")) == {name: int(name not in keyed) for name in names}
    assert "schedule 'n1' is fired later: another transaction holds its correlation key" in caplog.text
    assert firing.left == list(keyed)
    assert firing.again_at - time.monotonic() <= periodic.LOCKED_FOR
    for other in held:
        other.rollback()
    firing._left.clear()
    assert firing.fire() == 2
    assert "schedule 'n4' is fired again" in caplog.text


def test_held_keys_do_not_stop_the_batch_behind(
    app: Durable, rows: Rows, clock: Clock, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than one turn has time for: the next turn leaves them alone and fires what is behind them."""
    monkeypatch.setattr(periodic, "AT_MOST", 0.0)
    names = [f"n{number}" for number in range(3)]
    clock.declare(*(entry(name, new=new(correlation_key=name)) for name in names), entry("free"))
    for name in names:
        hold_key(rows, name)
        clock.due(name, 10)
    clock.due("free", 5)
    firing = Firing(app, link)
    assert [firing.fire() for _ in range(4)] == [0, 0, 0, 1]


def test_row_that_makes_no_sense_stops_no_other(
    app: Durable, clock: Clock, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    clock.declare(entry("bad"), entry("good"))
    clock.sql("""UPDATE {schema}.schedules SET template = '[1]' WHERE name = 'bad'""")
    clock.due("bad", 5)
    clock.due("good")
    assert Firing(app, link).fire() == 1
    assert "schedule 'bad' can't be read: " in caplog.text


def test_held_schedule_row_delays_only_its_declaration(
    app: Durable,
    rows: Rows,
    clock: Clock,
    link: Link,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a", "b", "c"):
        app.task(name=name)(lambda: None)
        app.periodic(every(5), name=name)(app.find_task(name))
    clock.declare(entry("b"))
    held = Held(rows.other(), schedules.run_by_hand("b")).until(None)
    firing = Firing(app, link)
    firing.declare()
    assert clock.of("name", "schedule") == [
        ("a", "every 5000000 us"),
        ("b", "every 3600000000 us"),
        ("c", "every 5000000 us"),
    ]
    assert "schedule 'b' is stored later: another session holds its row" in caplog.text
    held.rollback()
    monkeypatch.setattr(firing, "_declare_at", 0.0)
    firing.declare_again()
    assert clock.of("name", "schedule")[1] == ("b", "every 5000000 us")
