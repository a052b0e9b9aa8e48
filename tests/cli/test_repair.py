"""`durable doctor --fix`: what rows that contradict each other are called, and that they are mended when asked for."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from durable import Context, Done, Durable, Machine, ScheduleChildren, step
from durable.storage import doctor as looks
from durable.storage import instances
from tests.cli.conftest import Ran
from tests.fix_rows import Rows, done, new, schema, shared_schema
from tests.machines.driver import Drivers, drivers

__all__ = ["drivers", "schema", "shared_schema"]

SLACK, RETENTION = 180.0, 86400.0
Break = Callable[[Rows], int]


def family(rows: Rows, pending: int, children: int = 2) -> tuple[int, list[int]]:
    """A parent that waits for `pending` children, and as many as there are."""
    (parent,) = rows.insert(1)
    ids = rows.atomically(instances.insert_many([new(parent_id=parent, parent_round=1)] * children))
    rows.fetch(
        "UPDATE {schema}.instances SET status = 'awaiting_children', children_round = 1, children_pending = %s"
        " WHERE id = %s",
        [pending, parent],
    )
    return parent, [instance_id for instance_id in ids if instance_id is not None]


def orphan(rows: Rows) -> int:
    parent, (child,) = family(rows, 1, 1)
    rows.fetch("DELETE FROM {schema}.instances WHERE id = %s", [parent])
    return child


def own_child(rows: Rows) -> int:
    (child,) = rows.insert(1)
    rows.fetch("UPDATE {schema}.instances SET parent_id = id, parent_round = 1 WHERE id = %s", [child])
    return child


def waits_for_too_many(rows: Rows) -> int:
    return family(rows, 5)[0]


def waits_for_too_few(rows: Rows) -> int:
    return family(rows, 1)[0]


def waits_for_nobody(rows: Rows) -> int:
    return family(rows, 2, 0)[0]


def signal(rows: Rows, target: int, age: str = "0 s") -> None:
    rows.fetch(
        "INSERT INTO {schema}.signals (target_id, name, payload_type, payload, created_at)"
        " VALUES (%s, 'paid', 'json', 'null', now() - %s::interval)",
        [target, age],
    )


def unseen(rows: Rows) -> int:
    (instance,) = rows.insert(1)
    signal(rows, instance)
    return instance


def slept_over(rows: Rows) -> int:
    (instance,) = rows.insert(1)
    rows.fetch(
        "UPDATE {schema}.instances SET status = 'awaiting_signal', awaits = '{paid}', inbox = 1 WHERE id = %s",
        [instance],
    )
    signal(rows, instance)
    return instance


def posthumous(rows: Rows) -> int:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.flush(worker, done(claimed))
    rows.bury(worker)
    signal(rows, claimed.id, "1 day")
    return claimed.id


DAMAGE: dict[str, tuple[Break, str, str, dict[str, Any]]] = {
    "a parent that is gone": (orphan, "lost parent", "that is gone", {"parent_id": None, "parent_round": None}),
    "a parent of its own": (own_child, "lost parent", "that is gone", {"parent_id": None, "parent_round": None}),
    "too many": (waits_for_too_many, "wrong barrier", "waits for 5 children, and 2 are left",
                 {"children_pending": 2, "status": "awaiting_children"}),
    "too few": (waits_for_too_few, "wrong barrier", "waits for 1 children, and 2 are left",
                {"children_pending": 2, "status": "awaiting_children"}),
    "nobody": (waits_for_nobody, "wrong barrier", "waits for 2 children, and 0 are left",
               {"children_pending": 0, "status": "runnable"}),
    "a signal unseen": (unseen, "unheard signal", "is not shown 1 of its signals",
                        {"status": "runnable"}),
    "a signal slept over": (slept_over, "unheard signal", "is not shown 1 of its signals",
                            {"status": "runnable", "deadline": None}),
    "a signal for the finished": (posthumous, "dead letters", "1 signals are for instances that are over", {}),
}  # fmt: skip
every_damage = pytest.mark.parametrize("case", DAMAGE)


@pytest.fixture
def doctor(rows: Rows, durable: Callable[..., Ran], database: str, schema: str) -> Callable[..., Ran]:
    return lambda *arguments: durable("doctor", "--dsn", database, "--schema", schema, *arguments)


def picture(rows: Rows) -> list[Any]:
    return [rows.fetch(f"SELECT * FROM {{schema}}.{table} ORDER BY id") for table in ("instances", "signals")]


@every_damage
def test_damage_is_named_left_alone_and_mended_when_asked_for(
    doctor: Callable[..., Ran], rows: Rows, case: str
) -> None:
    make, name, cause, after = DAMAGE[case]
    instance = make(rows)
    before = picture(rows)
    ran = doctor("--json")
    assert ran.code == 1
    (finding,) = ran.json["findings"]
    assert finding["finding"] == name
    assert cause in finding["cause"]
    assert str(instance) in finding["cause"]
    assert "durable doctor --fix" in finding["remedy"]

    refused = doctor("--fix")
    assert refused.code == 2
    assert cause in refused.error
    assert f"(schema {rows.schema!r}, database {rows.connection.info.dbname!r}); say --yes" in refused.error
    assert picture(rows) == before

    mended = doctor("--fix", "--yes", "--json")
    assert (mended.code, mended.json["healthy"]) == (0, True)
    (report,) = mended.json["repaired"]
    assert report["count"] == 1
    if after:
        assert report["ids"] == [instance]
        row = rows.live(instance)
        assert row is not None
        assert {name: row[name] for name in after} == after
    else:
        assert rows.fetch("SELECT FROM {schema}.signals") == []
    assert doctor("--fix", "--yes", "--json").json == {"healthy": True, "findings": [], "repaired": []}


def test_many_of_a_kind_are_one_finding(doctor: Callable[..., Ran], rows: Rows) -> None:
    first, *_ = [waits_for_too_many(rows) for _ in range(3)]
    (finding,) = doctor("--json").json["findings"]
    assert finding["cause"] == f"instance {first} (and 2 more like it) waits for 5 children, and 2 are left"
    assert doctor("--fix", "-y", "--json").json["repaired"][0]["count"] == 3


def test_what_ordinary_life_leaves_is_no_damage(app: Durable, doctor: Callable[..., Ran], rows: Rows) -> None:
    """Children that outlived a parent, retried ones, one that kept its key, a signal for a park that was shown it."""
    worker = rows.worker()
    parent, (first, _, third) = family(rows, 3, 3)
    rows.fetch(
        "UPDATE {schema}.instances SET correlation_key = 'k', correlation_scope = '{done}' WHERE id = %s", [third]
    )
    claims = {claimed.id: claimed for claimed in rows.claim(worker)}
    rows.flush(worker, done(claims[first]), done(claims[third]))
    assert rows.live(third) is not None
    lone, (collected,) = family(rows, 1, 1)
    rows.fetch("UPDATE {schema}.instances SET created_at = now() - interval '2 days' WHERE id = %s", [collected])
    rows.fetch("DELETE FROM {schema}.instances WHERE id = %s", [lone])
    ended, _ = family(rows, 1, 1)
    assert rows.cancel(ended)
    slept_over(rows)
    rows.fetch(
        "UPDATE {schema}.instances SET shown = ARRAY(SELECT id FROM {schema}.signals),"
        " inbox = (SELECT max(id) FROM {schema}.signals) WHERE awaits IS NOT NULL"
    )
    rows.bury(worker)
    rows.reclaim(worker)
    assert rows.live(parent)["children_pending"] == 1  # type: ignore[index]
    assert rows.run(looks.damage(RETENTION, SLACK)) == looks.Damage([], [], [], 0, None)


def test_a_barrier_that_was_lowered_refuses_no_childs_outcome(app: Durable, rows: Rows) -> None:
    worker = rows.worker()
    parent, children = family(rows, 0)
    claimed = rows.claim(worker)
    assert rows.flush(worker, *map(done, claimed)) == set(children)
    assert rows.status(parent) == "runnable"


def test_a_repair_waits_for_an_end_in_progress_and_counts_what_is_left_then(rows: Rows) -> None:
    worker, owner, mender = rows.worker(), rows.other(), rows.other()
    parent, _ = family(rows, 5, 3)
    first, *_ = rows.claim(worker)
    found = rows.run(looks.damage(RETENTION, SLACK))
    assert found.barriers == [(parent, 5, 3)]
    with owner.connection.transaction():
        owner.flush(worker, done(first))
        repair = rows.background(lambda: mender.atomically(looks.repair(found)))
        rows.wait_blocked(mender, repair)
    assert repair.result().recounted == [parent]
    assert rows.live(parent)["children_pending"] == 2  # type: ignore[index]


def test_a_parent_whose_barrier_was_mended_goes_on_to_its_end(
    app: Durable, drivers: Drivers, doctor: Callable[..., Ran], rows: Rows
) -> None:
    @app.task(name="leaf")
    def leaf() -> int:
        return 1

    @app.machine(name="tree")
    class Tree(Machine):
        @step(initial=True)
        def grow(self, ctx: Context) -> Any:
            return ScheduleChildren([leaf] * 3, then=self.count)

        @step
        def count(self, ctx: Context) -> Any:
            return Done(sum(child.result for child in ctx.children))

    tree, driver = app.insert("tree"), drivers()
    driver.step()
    rows.fetch("UPDATE {schema}.instances SET children_pending = 7 WHERE id = %s", [tree.id])
    driver.drain()
    assert tree.status == "awaiting_children"
    assert doctor("--fix", "--yes").code == 0
    driver.drain()
    assert tree.result == 3


@pytest.mark.parametrize(
    ("answer", "code", "said"), [(b"n\n", 1, b"Aborted"), (b"y\n", 0, b"Repair what is wrong: instance ")]
)
def test_a_repair_asks_on_a_terminal(rows: Rows, database: str, answer: bytes, code: int, said: bytes) -> None:
    parent = waits_for_too_many(rows)
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    ran = subprocess.run(
        [sys.executable, "-m", "durable_cli", "doctor", "--fix", "--dsn", database, "--schema", rows.schema],
        stdin=theirs,
        capture_output=True,
        timeout=60,
    )
    os.close(ours)
    os.close(theirs)
    assert ran.returncode == code, ran.stderr
    assert said in ran.stderr
    assert rows.live(parent)["children_pending"] == (2 if code == 0 else 5)  # type: ignore[index]
    assert (f"repaired: children counted again (1): {parent}".encode() in ran.stdout) is (code == 0)


def test_yes_alone_is_wrong_usage_and_a_missing_schema_is_not_repaired(
    doctor: Callable[..., Ran], durable: Callable[..., Ran], database: str
) -> None:
    assert doctor("--yes").code == 2
    ran = durable("doctor", "--fix", "--yes", "--dsn", database, "--schema", "nowhere")
    assert ran.code == 3
    assert "run `durable migrate`" in ran.error
