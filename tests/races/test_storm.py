"""Everybody at once on the same rows: no deadlock, nothing lost, nothing twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from durable.storage import claims, instances, maintenance, workers
from durable.storage.claims import Commit
from tests.fix_rows import Rows, Session, done

COUNT = 300
TURNS = 60


def test_all_duties_at_once_neither_deadlock_nor_lose_a_row(rows: Rows) -> None:
    ids = rows.insert(COUNT)
    finished: list[int] = []

    def owner(session: Session, chance: random.Random) -> None:
        worker = session.run(workers.register(workers.Identity("worker", "o", "h", "b", 1, 1, "s", "default"), 600))
        for _ in range(TURNS):
            batch = session.claim(worker, 12) + session.run(claims.claim_suspect(worker, "default", []))
            chance.shuffle(batch)
            session.release(worker, *batch[:3])
            commits = [done(row) for row in batch[3:8]]
            commits += [Commit(row, "runnable", attempt=row.attempt + 1, delay=0.0) for row in batch[8:10]]
            commits += [Commit(row, "scheduled", attempt=row.attempt + 1, delay=0.0001) for row in batch[10:]]
            ended = {commit.claimed.id for commit in commits if commit.status == "done"}
            finished.extend(session.flush(worker, *commits) & ended)

    def reaper(session: Session, chance: random.Random) -> None:
        for _ in range(TURNS):
            for row in session.fetch("SELECT id FROM {schema}.workers WHERE dead_at IS NULL"):
                session.atomically(workers.reclaim(row["id"], [], 1000, "storm"))

    def agent(session: Session, chance: random.Random) -> None:
        for _ in range(TURNS):
            found = [row["id"] for row in session.fetch("SELECT id FROM {schema}.workers")]
            chance.shuffle(found)
            session.run(workers.heartbeat(found, 600))

    def canceller(session: Session, chance: random.Random) -> None:
        for instance in chance.sample(ids, 30):
            session.atomically(instances.cancel(instance, "storm"))

    def beat(session: Session, chance: random.Random) -> None:
        for _ in range(TURNS):
            session.run(maintenance.promote(chance.choice([1, 5, 50])))

    duties: list[Callable[[Session, random.Random], None]] = [owner, owner, reaper, reaper, agent, canceller, beat]
    going: list[Future[Any]] = [
        rows.background(partial(duty, rows.other(), random.Random(n))) for n, duty in enumerate(duties)
    ]
    for future in going:
        future.result(60)

    assert len(finished) == len(set(finished)), "no outcome is committed twice"
    live = {row["id"]: row["status"] for row in rows.fetch("SELECT id, status FROM {schema}.instances")}
    past = {row["id"]: row["status"] for row in rows.fetch("SELECT id, status FROM {schema}.history")}
    assert sorted([*live, *past]) == ids, "every row is in exactly one place"
    # One that finished may have been a cancelled one: its owner was told that it committed, and it did, as cancelled.
    assert {instance for instance, status in past.items() if status == "done"} <= set(finished)
    assert set(finished) <= set(past)
    assert set(past.values()) <= {"done", "cancelled"}
