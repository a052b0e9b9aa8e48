"""A cascading cancel of a tree that grows meanwhile: each order of its mark, its walk and an outcome with children."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from durable import Context, Done, Durable, Machine, ScheduleChildren, step
from durable.instance import Claimed
from durable.storage import instances
from tests.fix_db import wait_until
from tests.fix_rows import Rows
from tests.interleaving import Held, family, flush, flushing, going_on, spawning, wait_blocked
from tests.machines.driver import Driver, drivers

__all__ = ["drivers"]


def tree(rows: Rows, worker: int) -> tuple[int, Claimed]:
    """A root that waits for two children; one of them is claimed and about to have children, the other has ended."""
    root, (tip, other) = family(rows, worker)
    flush(rows, worker, going_on(other))
    return root, tip


def statuses(rows: Rows) -> Counter[str]:
    return Counter(
        row["status"]
        for table in ("instances", "history")
        for row in rows.fetch(f"SELECT status FROM {{schema}}.{table}")
    )


def marked(rows: Rows, target: int) -> int:
    return rows.run(instances.mark_cascade(target, "enough", False))


@pytest.mark.parametrize("target", ["the root", "the parent itself"])
def test_cascade_finds_children_of_open_outcome(rows: Rows, target: str) -> None:
    worker, other, third = rows.worker(), rows.other(), rows.other()
    root, tip = tree(rows, worker)
    chosen = root if target == "the root" else tip.id
    outcome = Held(other, flushing(worker, spawning(tip))).until(None)  # it has looked for marks, and found none
    mark = marked(rows, chosen)
    cancel = rows.background(lambda: third.atomically(instances.cancel(chosen, "enough", True, mark=mark)))
    wait_blocked(rows, third, cancel)
    outcome.commit()
    assert cancel.result(10).found
    if target == "the root":
        assert statuses(rows) == {"cancelled": 5}, "the root, both its children, and the two that came meanwhile"
    else:
        assert statuses(rows) == {"cancelled": 3, "runnable": 1, "awaiting_children": 1}
    assert rows.fetch("SELECT FROM {schema}.cascades") == []


def test_outcome_after_the_mark_cancels_itself(rows: Rows) -> None:
    worker = rows.worker()
    root, tip = tree(rows, worker)
    mark = marked(rows, root)
    flushed = flush(rows, worker, spawning(tip))
    assert (flushed.committed, flushed.ended) == ({tip.id}, {tip.id})
    assert statuses(rows) == {"awaiting_children": 1, "cancelled": 3, "runnable": 1}, "it and its two children"
    (row,) = rows.fetch("SELECT children_pending FROM {schema}.instances WHERE id = %s", [root])
    assert row["children_pending"] == 1
    history = rows.history(tip.id)
    assert history is not None
    assert history["error"] == {"type": "Cancelled", "message": "enough"}
    rows.atomically(instances.cancel(root, "enough", True, mark=mark))
    assert statuses(rows) == {"cancelled": 5}


def test_mark_of_another_tree_changes_nothing(rows: Rows) -> None:
    worker = rows.worker()
    _, tip = tree(rows, worker)
    (stranger,) = rows.insert()
    marked(rows, stranger)
    assert flush(rows, worker, spawning(tip)).ended == set()
    assert statuses(rows) == {"awaiting_children": 2, "runnable": 4}


def test_outcome_that_waits_for_the_walk_has_no_children(rows: Rows) -> None:
    worker, other, third = rows.worker(), rows.other(), rows.other()
    root, tip = tree(rows, worker)
    mark = marked(rows, root)
    cancel = Held(other, instances.cancel(root, "enough", True, mark=mark)).until("end_cascade")
    outcome = rows.background(lambda: flush(third, worker, spawning(tip)))
    wait_blocked(rows, third, outcome)
    cancel.commit()
    assert outcome.result(10).ended == {tip.id}
    assert statuses(rows) == {"cancelled": 3}


def test_cascade_walks_a_tree_at_most_three_times(rows: Rows) -> None:
    worker = rows.worker()
    root, _ = tree(rows, worker)
    operation = instances.cancel(root, "enough", True, mark=marked(rows, root))
    held = Held(rows.other(), operation)
    names = []
    while (name := held.step()) is not None:
        names.append(name)
    held.commit()
    assert names.count("cancel") == 2, "the second finds nothing new"


def test_left_cascade_is_finished_by_gc(rows: Rows) -> None:
    worker = rows.worker()
    root, tip = tree(rows, worker)
    marked(rows, root)
    assert rows.atomically(instances.finish_cascade(60.0)) is None, "its process may be at it"
    rows.fetch("UPDATE {schema}.cascades SET asked_at = asked_at - interval '2 minutes'")
    done = rows.atomically(instances.finish_cascade(60.0))
    assert done is not None
    assert done.running
    flush(rows, worker, spawning(tip))
    assert statuses(rows) == {"cancelled": 3}
    assert rows.atomically(instances.finish_cascade(0.0)) is None


def test_two_cascades_of_one_tree_end(rows: Rows) -> None:
    worker, other = rows.worker(), rows.other()
    root, tip = tree(rows, worker)
    one, two = marked(rows, root), marked(rows, tip.id)
    held = Held(other, instances.cancel(root, "all", True, mark=one)).until("end_cascade")
    cancel = rows.background(lambda: rows.atomically(instances.cancel(tip.id, "part", True, mark=two)))
    wait_blocked(other, rows, cancel)
    held.commit()
    cancel.result(10)
    flush(rows, worker, spawning(tip))
    assert statuses(rows) == {"cancelled": 3}


@pytest.mark.parametrize("fan", [1, 3])
def test_cascade_ends_an_endless_tree(app: Durable, drivers: Any, fan: int) -> None:
    @app.machine(name="pages")
    class Pages(Machine):
        @step(initial=True)
        def page(self, ctx: Context) -> Any:
            return ScheduleChildren([Pages] * fan, then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done()

    def work(driver: Driver) -> None:
        while not stop:
            driver.flush(*map(driver.execute, driver.claims(2)))

    stop: list[bool] = []
    result = Pages.delay()
    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(work, drivers()) for _ in range(2)]
        try:
            wait_until(lambda: len(app.result(result.id).children) > 0 and deep(app) > 30, 30, "a tree that grows")
            assert threads.submit(result.cancel, "stop", cascade=True).result(30) is True
            assert result.status == "cancelled"
            wait_until(lambda: not live(app), 20, "the end of everything")
        finally:
            stop.append(True)
        for future in busy:
            future.result(30)


def deep(app: Durable) -> int:
    with app._pool.connection() as connection:
        row = connection.execute(f"SELECT count(*) FROM {app.schema}.instances".encode()).fetchone()
    assert row is not None
    return int(row[0])


def live(app: Durable) -> int:
    with app._pool.connection() as connection:
        query = f"SELECT count(*) FROM {app.schema}.instances WHERE finished_at IS NULL"
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])
