"""Two sessions at once, each interleaving held open by hand: what may meet, meets, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Await, Context, Done, Durable, Machine, Next, ScheduleChildren, step
from durable.instance import NewSignal
from durable.storage import claims, instances, maintenance, signals, workers
from durable.storage.instances import Cancelled
from durable.storage.session import Operation
from tests.fix_rows import Rows, done
from tests.interleaving import (
    GO,
    OUTCOMES,
    Held,
    awaiting,
    bury,
    delivering,
    family,
    flush,
    flushing,
    going_on,
    handed,
    inbox,
    noted,
    parked,
    reclaiming,
    spawning,
    wait_blocked,
    wait_until_blocked,
)
from tests.machines.driver import Driver, View

# Parks and deliveries: a wakeup is never lost


def test_a_park_that_commits_while_a_delivery_waits_for_it_is_woken_by_the_delivery(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    park = Held(rows, flushing(worker, awaiting(claimed))).until(None)
    delivery = rows.background(lambda: other.atomically(delivering(claimed.id)))
    watcher = rows.other()
    wait_blocked(watcher, other, delivery)
    assert park.commit().ready == {}, "the park saw no signal"
    told = delivery.result(10)
    assert (told.stored, told.ready) == ([True], {"default": 1})
    row = rows.live(claimed.id)
    assert row is not None
    assert (row["status"], row["step"], inbox(rows, claimed.id)) == ("runnable", "woken", 1)


def test_a_delivery_that_commits_while_a_park_waits_for_it_is_found_by_the_park(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    delivery = Held(other, delivering(claimed.id)).until(None)
    park = rows.background(lambda: flush(rows, worker, awaiting(claimed)))
    watcher = rows.other()
    wait_blocked(watcher, rows, park)
    assert delivery.commit().ready == {}, "an executing row is not woken"
    flushed = park.result(10)
    assert (flushed.committed, flushed.ready) == ({claimed.id}, {"default": 1})
    row = rows.live(claimed.id)
    assert row is not None
    assert (row["status"], row["step"], inbox(rows, claimed.id)) == ("runnable", "woken", 1)


def test_a_delivery_between_the_two_statements_of_a_park_waits_and_wakes(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    park = Held(rows, flushing(worker, awaiting(claimed))).until("wake_parked")
    delivery = rows.background(lambda: other.atomically(delivering(claimed.id)))
    wait_blocked(rows.other(), other, delivery)
    park.commit()
    assert delivery.result(10).ready == {"default": 1}
    assert rows.status(claimed.id) == "runnable"


@pytest.mark.parametrize("undone", ["park", "delivery"])
def test_what_is_rolled_back_wakes_nobody(rows: Rows, undone: str) -> None:
    worker, other, watcher = rows.worker(), rows.other(), rows.other()
    (claimed,) = rows.claimed(worker)
    if undone == "park":
        held = Held(rows, flushing(worker, awaiting(claimed))).until(None)
        second = rows.background(lambda: other.atomically(delivering(claimed.id)))
        wait_blocked(watcher, other, second)
    else:
        held = Held(other, delivering(claimed.id)).until(None)
        parking = rows.background(lambda: flush(rows, worker, awaiting(claimed)))
        wait_blocked(watcher, rows, parking)
    held.rollback()
    if undone == "park":
        second.result(10)
        assert (rows.status(claimed.id), inbox(rows, claimed.id)) == ("executing", 1)
        flush(rows, worker, awaiting(claimed))
        assert rows.status(claimed.id) == "runnable", "parked again, it finds the signal"
    else:
        parking.result(10)
        assert (rows.status(claimed.id), inbox(rows, claimed.id)) == ("awaiting_signal", 0)


def test_a_renewed_park_sleeps_on_what_it_was_shown_and_wakes_for_one_with_a_lower_id(rows: Rows) -> None:
    """Ids commit out of order: the mark of what was shown is a set."""
    worker, other = rows.worker(), rows.other()
    instance = parked(rows, worker)
    other.connection.execute("BEGIN")
    # The lower id is drawn first and commits last; the row lock of a delivery would forbid it, an old session may not.
    other.fetch("INSERT INTO {schema}.signals (target_id, name) VALUES (%s, 'go')", [instance])
    rows.atomically(delivering(instance))
    (claimed,) = rows.claim(worker)
    shown = rows.run(signals.inbox([instance]))[instance]
    assert len(shown) == 1
    other.connection.execute("COMMIT")
    flush(rows, worker, awaiting(claimed, shown=[signal.id for signal in shown]))
    assert rows.status(instance) == "runnable"
    (claimed,) = rows.claim(worker)
    both = [signal.id for signal in rows.run(signals.inbox([instance]))[instance]]
    assert both == sorted(both)
    assert len(both) == 2
    flush(rows, worker, awaiting(claimed, shown=both))
    assert rows.status(instance) == "awaiting_signal"


def test_two_deliveries_to_one_sleeper_wake_it_once(rows: Rows) -> None:
    worker, one, two = rows.worker(), rows.other(), rows.other()
    instance = parked(rows, worker)
    first = Held(one, delivering(instance)).until(None)
    second = rows.background(lambda: two.atomically(delivering(instance)))
    wait_blocked(rows, two, second)
    first.commit()
    second.result(10)
    assert (rows.status(instance), inbox(rows, instance)) == ("runnable", 2)
    assert [row.id for row in rows.claim(worker)] == [instance]


def test_two_deliveries_of_one_dedup_key_store_one(rows: Rows) -> None:
    worker, one, two = rows.worker(), rows.other(), rows.other()
    instance = parked(rows, worker)
    signal = NewSignal(instance, "go", GO, "key")
    first = Held(one, signals.deliver([signal])).until(None)
    second = rows.background(lambda: two.atomically(signals.deliver([signal])))
    wait_blocked(rows, two, second)
    assert first.commit().stored == [True]
    assert second.result(10).stored == [False]
    assert inbox(rows, instance) == 1


def test_two_batches_of_deliveries_in_opposite_order_do_not_deadlock(rows: Rows) -> None:
    worker, one, two = rows.worker(), rows.other(), rows.other()
    a, b = parked(rows, worker), parked(rows, worker)
    first = Held(one, delivering(a, b)).until(None)
    second = rows.background(lambda: two.atomically(delivering(b, a)))
    wait_blocked(rows, two, second)
    first.commit()
    assert second.result(10).stored == [True, True]


# Deliveries and claims, ends, timeouts, cancels


def test_a_row_that_a_delivery_holds_is_not_waited_for_and_is_claimed_afterwards(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (instance,) = rows.insert()
    held = Held(other, delivering(instance)).until(None)
    assert rows.claim(worker) == [], "skipped, not waited for"
    held.commit()
    (claimed,) = rows.claim(worker)
    assert (claimed.id, claimed.inbox) == (instance, True)


def test_a_delivery_to_a_row_being_claimed_waits_and_is_seen_later(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (instance,) = rows.insert()
    rows.connection.execute("BEGIN")
    (claimed,) = rows.claim(worker)
    delivery = rows.background(lambda: other.atomically(delivering(instance)))
    wait_blocked(rows.other(), other, delivery)
    rows.connection.execute("COMMIT")
    assert delivery.result(10).stored == [True]
    assert not claimed.inbox
    flush(rows, worker, awaiting(claimed))
    assert rows.status(instance) == "runnable"


@pytest.mark.parametrize("kept", [False, True])
def test_a_delivery_that_waits_for_an_end_finds_no_target(rows: Rows, kept: bool) -> None:
    worker, other = rows.worker(), rows.other()
    options = {"correlation_key": "k", "correlation_scope": ("executing", "done")} if kept else {}
    (claimed,) = rows.claimed(worker, **options)
    end = Held(rows, flushing(worker, done(claimed))).until(None)
    delivery = rows.background(lambda: other.atomically(delivering(claimed.id)))
    wait_blocked(rows.other(), other, delivery)
    end.commit()
    assert delivery.result(10).stored == [None]
    assert inbox(rows, claimed.id) == 0


@pytest.mark.parametrize("kept", [False, True])
def test_end_that_waits_for_a_delivery_is_unread(rows: Rows, kept: bool) -> None:
    worker, other = rows.worker(), rows.other()
    options = {"correlation_key": "k", "correlation_scope": ("executing", "done")} if kept else {}
    (claimed,) = rows.claimed(worker, **options)
    delivery = Held(other, delivering(claimed.id)).until(None)
    ending = rows.background(lambda: flush(rows, worker, done(claimed)))
    wait_blocked(rows.other(), rows, ending)
    assert delivery.commit().stored == [True]
    assert ending.result(10).committed == {claimed.id}
    assert rows.status(claimed.id) == "done"
    assert rows.run(maintenance.sweep_signals()) == 0
    assert inbox(rows, claimed.id) == 1, "it was accepted, and is unread"


def test_a_timeout_passes_by_what_a_delivery_holds_and_the_signal_wins(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    instance = parked(rows, worker, timeout=0.0)
    delivery = Held(other, delivering(instance)).until(None)
    assert rows.run(maintenance.time_out()) == {}
    delivery.commit()
    assert rows.run(maintenance.time_out()) == {}
    (claimed,) = rows.claim(worker)
    assert (claimed.inbox, claimed.token) == (True, 2)


def test_a_delivery_that_waits_for_a_timeout_is_stored_and_wakes_nobody_twice(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    instance = parked(rows, worker, timeout=0.0)
    timeout = Held(rows, maintenance.time_out()).until(None)
    delivery = rows.background(lambda: other.atomically(delivering(instance)))
    wait_blocked(rows.other(), other, delivery)
    assert timeout.commit() == {"default": 1}
    assert delivery.result(10).stored == [True]
    (claimed,) = rows.claim(worker)
    assert claimed.inbox
    assert len(rows.run(signals.inbox([instance]))[instance]) == 1


def test_cancel_that_waits_for_a_delivery_keeps_it(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    instance = parked(rows, worker)
    delivery = Held(other, delivering(instance)).until(None)
    cancel = rows.background(lambda: rows.atomically(instances.cancel(instance, "enough")))
    wait_blocked(rows.other(), rows, cancel)
    assert delivery.commit().ready == {"default": 1}
    assert cancel.result(10).found is True
    assert (rows.status(instance), inbox(rows, instance)) == ("cancelled", 1)


def test_a_delivery_that_waits_for_a_cancel_finds_no_target(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    instance = parked(rows, worker)
    cancel = Held(rows, instances.cancel(instance, "enough")).until(None)
    delivery = rows.background(lambda: other.atomically(delivering(instance)))
    wait_blocked(rows.other(), other, delivery)
    cancel.commit()
    assert delivery.result(10).stored == [None]
    assert inbox(rows, instance) == 0


def test_a_batch_of_signals_and_a_flush_of_ends_and_transitions_do_not_deadlock(rows: Rows) -> None:
    """The flush must lock in id order although ends and transitions are two statements."""
    worker, other = rows.worker(), rows.other()
    staying, ending = rows.claimed(worker, 2)
    assert staying.id < ending.id
    held = Held(rows, flushing(worker, going_on(staying), done(ending)))
    held.until("advance")
    delivery = rows.background(lambda: other.atomically(delivering(staying.id, ending.id)))
    wait_blocked(rows.other(), other, delivery)
    held.commit()
    assert delivery.result(10).stored == [True, None]


# Children


def test_two_flushes_with_siblings_at_once_count_exactly_and_wake_once(rows: Rows) -> None:
    one, two, other = rows.worker(), rows.worker(), rows.other()
    parent, children = family(rows, one, 3)
    rows.fetch("UPDATE {schema}.instances SET worker_id = %s WHERE id = %s", [two, children[2].id])
    first = Held(rows, flushing(one, done(children[0]), done(children[1]))).until(None)
    second = rows.background(lambda: flush(other, two, done(children[2])))
    wait_blocked(rows.other(), other, second)
    assert first.commit().ready == {}
    assert second.result(10).ready == {"default": 1}
    row = rows.live(parent)
    assert row is not None
    assert (row["status"], row["children_pending"], row["step"]) == ("runnable", 0, "join")
    assert [claimed.id for claimed in rows.claim(one)] == [parent]


@pytest.mark.parametrize("point", ["insert_many", "raise_barrier"])
def test_a_reaper_passes_by_a_parent_that_spawns_at_this_moment(rows: Rows, point: str) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    spawn = Held(rows, flushing(worker, spawning(claimed))).until(point)
    other.run(bury(worker))
    assert other.atomically(reclaiming(worker)).ids == [], "its outcome is committing"
    spawn.commit()
    assert other.atomically(reclaiming(worker)).ids == []
    row = rows.live(claimed.id)
    assert row is not None
    assert (row["status"], row["children_pending"]) == ("awaiting_children", 2)
    assert len(rows.fetch("SELECT id FROM {schema}.instances WHERE parent_id = %s", [claimed.id])) == 2


def test_a_spawn_that_comes_after_the_reaper_inserts_no_child(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    other.run(bury(worker))
    reclaim = Held(other, reclaiming(worker)).until(None)
    spawn = rows.background(lambda: flush(rows, worker, spawning(claimed)))
    wait_blocked(rows.other(), rows, spawn)
    assert reclaim.commit().ids == [claimed.id]
    assert spawn.result(10).committed == set()
    assert rows.fetch("SELECT id FROM {schema}.instances") == [{"id": claimed.id}]


def test_no_child_is_seen_before_its_parents_barrier(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    spawn = Held(rows, flushing(worker, spawning(claimed))).until("raise_barrier")
    assert other.claim(worker, queue="kids") == []
    spawn.commit()
    assert len(other.claim(worker, queue="kids")) == 2


def test_a_cascade_that_waits_for_a_childs_end_does_not_deadlock(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    parent, children = family(rows, worker)
    end = Held(rows, flushing(worker, done(children[0]))).until(None)
    cancel = rows.background(lambda: other.atomically(instances.cancel(parent, "enough", True)))
    wait_blocked(rows.other(), other, cancel)
    end.commit()
    assert cancel.result(10).found is True
    assert [rows.status(row.id) for row in children] == ["done", "executing"]
    assert rows.status(parent) == "cancelled"
    flush(rows, worker, done(children[1]))
    assert rows.status(children[1].id) == "cancelled"


def test_a_childs_end_that_waits_for_a_cascade_does_not_deadlock(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    parent, children = family(rows, worker)
    cancel = Held(other, instances.cancel(parent, "enough", True)).until(None)
    end = rows.background(lambda: flush(rows, worker, *map(done, children)))
    wait_blocked(rows.other(), rows, end)
    cancel.commit()
    assert end.result(10).committed == {row.id for row in children}
    assert [rows.status(row) for row in (parent, *(child.id for child in children))] == ["cancelled"] * 3


def test_a_cascade_that_meets_a_spawn_reaches_the_new_children(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    spawn = Held(rows, flushing(worker, spawning(claimed))).until(None)
    cancel = rows.background(lambda: other.atomically(instances.cancel(claimed.id, "enough", True)))
    wait_blocked(rows.other(), other, cancel)
    spawn.commit()
    assert cancel.result(10).found is True
    assert rows.fetch("SELECT status::text, count(*) AS n FROM {schema}.history GROUP BY 1") == [
        {"status": "cancelled", "n": 3}
    ]


def test_a_spawn_that_waits_for_a_cascade_inserts_no_child(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    (claimed,) = rows.claimed(worker)
    cancel = Held(other, instances.cancel(claimed.id, "enough", True)).until(None)
    spawn = rows.background(lambda: flush(rows, worker, spawning(claimed)))
    wait_blocked(rows.other(), rows, spawn)
    cancel.commit()
    assert spawn.result(10).committed == {claimed.id}
    assert rows.status(claimed.id) == "cancelled"
    assert rows.fetch("SELECT id FROM {schema}.instances") == []


def test_a_cancel_of_a_child_and_a_cascade_from_its_parent_do_not_deadlock(rows: Rows) -> None:
    worker, other, third = rows.worker(), rows.other(), rows.other()
    parent, children = family(rows, worker)
    rows.release(worker, *children)
    one = Held(other, instances.cancel(children[1].id, "this one")).until("ended_families")
    all_ = rows.background(lambda: third.atomically(instances.cancel(parent, "all", True)))
    wait_blocked(rows, third, all_)
    assert one.commit().found is True
    assert all_.result(10).found is True
    assert rows.fetch("SELECT count(*) AS n FROM {schema}.history WHERE status = 'cancelled'") == [{"n": 3}]


@pytest.mark.parametrize("how", ["reclaim", "expire", "release"])
@pytest.mark.parametrize("against", ["a cascade", "signals to both"])
def test_an_end_outside_of_a_flush_does_not_deadlock_with_what_locks_parent_and_child(
    rows: Rows, how: str, against: str
) -> None:
    """Children and parents are locked in one order by everybody."""
    worker, other = rows.worker(), rows.other()
    parent, children = family(rows, worker)
    pairs = [(row.id, row.token) for row in children]
    if how == "release":
        for row in children:
            rows.cancel(row.id)
    end: Operation[Any] = {
        "reclaim": lambda: workers.reclaim(worker, pairs, 1, "it died"),
        "expire": lambda: claims.expire(worker, pairs),
        "release": lambda: claims.release(worker, pairs),
    }[how]()
    held = Held(rows, end).until("ended_families")
    second: Operation[Any] = (
        instances.cancel(parent, "enough", True) if against == "a cascade" else delivering(parent, children[0].id)
    )
    waiting = rows.background(lambda: other.atomically(second))
    wait_blocked(rows.other(), other, waiting)
    held.commit()
    waiting.result(10)
    row = rows.live(parent) or rows.history(parent)
    assert row is not None
    assert row["status"] == ("cancelled" if against == "a cascade" else "runnable")


def test_two_children_cancelled_at_once_wake_their_parent_once(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    parent, children = family(rows, worker)
    rows.release(worker, *children)
    one = Held(other, instances.cancel(children[0].id, "one")).until(None)
    two = rows.background(lambda: rows.atomically(instances.cancel(children[1].id, "two")))
    wait_blocked(rows.other(), rows, two)
    assert one.commit() == Cancelled(True, {})
    assert two.result(10) == Cancelled(True, {"default": 1})
    assert rows.status(parent) == "runnable"


# Batches


def test_riders_are_made_only_for_what_committed(rows: Rows) -> None:
    worker = rows.worker()
    consuming, spawning_, ending, parking = rows.claimed(worker, 4)
    stale = rows.claimed(worker, 4)
    parent, children = family(rows, worker, 2)
    everyone = [*(row.id for row in (consuming, *stale[:2])), parking.id, stale[3].id]
    rows.atomically(delivering(*everyone))
    found = rows.run(signals.inbox(everyone))
    ids = {target: [signal.id for signal in box] for target, box in found.items()}
    rows.release(worker, *stale, children[1])
    flushed = flush(
        rows,
        worker,
        going_on(consuming, consumed=ids[consuming.id]),
        going_on(stale[0], consumed=ids[stale[0].id]),
        spawning(spawning_),
        spawning(stale[1], 5),
        done(ending),
        done(stale[2]),
        awaiting(parking),
        awaiting(stale[3]),
        done(children[0]),
        done(children[1]),
    )
    assert flushed.committed == {consuming.id, spawning_.id, ending.id, parking.id, children[0].id}
    assert flushed.ready == {"default": 2, "kids": 2}
    assert [inbox(rows, row.id) for row in (consuming, *stale)] == [0, 1, 1, 0, 1]
    assert len(rows.fetch("SELECT id FROM {schema}.instances WHERE parent_id = %s", [spawning_.id])) == 2
    assert rows.fetch("SELECT id FROM {schema}.instances WHERE parent_id = %s", [stale[1].id]) == []
    row = rows.live(parent)
    assert row is not None
    assert (row["status"], row["children_pending"]) == ("awaiting_children", 1)
    assert {rows.status(row.id) for row in (*stale, children[1])} == {"runnable"}


MIXED = [
    "lock_family",  # parents and rows, in one order
    "finish",  # plain ends, with their inboxes
    "join_children",  # the parents of those
    "advance",  # everything that keeps its row
    "consume",  # signals of steps that went on
    "insert_many",  # children
    "raise_barrier",  # their parents
    "wake_parked",  # parks that find a signal
    "ended_families",  # ends that kept their row: whom they report to
    "join_children",
    "settle_inboxes",
    "archive",
]


@pytest.mark.parametrize("size", [1, 20])
def test_the_number_of_statements_of_a_mixed_flush_does_not_depend_on_its_size(rows: Rows, size: int) -> None:
    """Every kind of outcome, with every kind of rider; 16 outcomes, or 20 times as many."""
    worker = rows.worker()
    kinds = list(OUTCOMES)
    claimed = rows.claimed(worker, len(kinds) * size)
    children = [child for _ in range(size) for child in family(rows, worker, 2)[1]]
    rows.fetch("UPDATE {schema}.instances SET cancel_requested = true WHERE id = %s", [children[0].id])
    rows.atomically(delivering(*(row.id for row in claimed)))
    commits = [
        OUTCOMES[kinds[n % len(kinds)]](row, [signal.id for signal in row.signals])
        for n, row in enumerate(handed(rows, *claimed))
    ]
    ends = [done(child._replace(keeps_key=n % 2 == 0)) for n, child in enumerate(children)]
    names: list[str] = []
    flushed = rows.atomically(noted(flushing(worker, *commits, *ends), names))
    assert flushed.committed == {commit.claimed.id for commit in (*commits, *ends)}
    assert names == MIXED


def test_a_flush_of_plain_ends_is_one_statement(rows: Rows) -> None:
    worker = rows.worker()
    names: list[str] = []
    rows.run(noted(flushing(worker, *map(done, rows.claimed(worker, 10))), names))
    assert names == ["finish"]


def test_the_driver_and_two_sessions_agree_on_a_whole_machine(
    app: Durable, driver: Driver, view: View, rows: Rows
) -> None:
    """The lost wakeup once more, through the production engine: the delivery is open while the machine parks."""

    @app.machine(name="whole")
    class Whole(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("go", then=self.spawn)

        @step
        def spawn(self, ctx: Context) -> Any:
            return ScheduleChildren([(Whole, {"step": "leaf"})] * 2, then=self.end)

        @step
        def leaf(self, ctx: Context) -> Any:
            return Next(self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done(len(ctx.children))

    result = Whole.delay()
    commit = driver.execute(driver.claim())
    delivery = Held(rows, delivering(result.id)).until(None)
    driver.engine._link.connection.execute("SET lock_timeout = 0")  # else the outcome is put aside
    engine_pid = driver.engine._link.connection.info.backend_pid
    parking = rows.background(lambda: driver.flush(commit))
    watcher = rows.other()
    wait_until_blocked(watcher, engine_pid, parking)
    delivery.commit()
    assert parking.result(10) == {result.id}
    driver.drain()
    assert result.get(timeout=5) == 2
