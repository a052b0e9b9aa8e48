"""What floor and durable are compared on: the same rows before, the same rows after; and the check of what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from benchmarks import enqueue, floor
from benchmarks.database import Database, wait_for_count
from benchmarks.workers import worker

CLOCKS = {"id", "eligible_at", "created_at", "finished_at", "worker_id"}


def rows(place: Database, table: str) -> list[dict[str, Any]]:
    """Every row, without what differs from row to row."""
    with psycopg.connect(place.dsn, row_factory=psycopg.rows.dict_row) as connection:
        found = connection.execute(f"SELECT * FROM {place.schema}.{table}").fetchall()
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in found]


@pytest.mark.parametrize(
    ("bare", "ours"),
    [(enqueue.insert, enqueue.delay), (enqueue.copy, enqueue.insert_many), (enqueue.copy, enqueue.batch)],
    ids=["insert and delay", "copy and insert_many", "copy and batch"],
)
def test_the_floor_enqueues_the_rows_that_we_enqueue(
    place: Database, bare: Callable[[Database, int], None], ours: Callable[[Database, int], None]
) -> None:
    bare(place, 3)
    theirs = rows(place, "instances")
    place.empty()
    ours(place, 3)
    assert rows(place, "instances") == theirs
    assert len(theirs) == 3


def test_the_floor_leaves_the_rows_that_a_worker_leaves(place: Database) -> None:
    place.fill(5)
    waiting = rows(place, "instances")
    floor.drain(place.dsn, place.schema, 1000)
    theirs = rows(place, "history")
    assert rows(place, "instances") == []
    place.fill(5)
    assert rows(place, "instances") == waiting
    with worker(place, 1):
        wait_for_count(place, 5, seconds=30)
    assert rows(place, "history") == theirs
    place.check(5)


def test_the_floors_steps_are_five_outcomes(place: Database) -> None:
    place.fill(3, "plain_chain", "a")
    floor.drain(place.dsn, place.schema, 1000, 5)
    place.check(3, 5, machine="plain_chain")


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE {schema}.history SET result = convert_to('1', 'UTF8')",
        "UPDATE {schema}.history SET version = 2",
        "UPDATE {schema}.history SET status = 'failed'",
        "DELETE FROM {schema}.history WHERE id = (SELECT min(id) FROM {schema}.history)",
        "UPDATE {schema}.history SET machine = 'other'",
    ],
    ids=["another result", "run twice", "failed", "lost", "another task"],
)
def test_a_run_that_did_not_end_as_promised_gives_no_figure(place: Database, spoil: str) -> None:
    place.fill(3)
    floor.drain(place.dsn, place.schema, 1000)
    place.check(3)
    place.value(spoil)
    with pytest.raises(RuntimeError, match="were to end as promised"):
        place.check(3)


def test_rows_that_are_missing_give_no_rate(place: Database) -> None:
    place.fill(3)
    floor.drain(place.dsn, place.schema, 1000)
    assert place.rate(3) > 0
    with pytest.raises(RuntimeError, match="expected 4 finished rows"):
        place.rate(4)
