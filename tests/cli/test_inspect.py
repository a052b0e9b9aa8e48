"""`durable inspect` on what agents have told, without any running: rows as other hosts would write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from durable import Durable
from durable.storage import workers
from durable.storage.workers import Identity
from durable_cli import inspecting
from tests.cli.conftest import NO_SERVER, Ran
from tests.fix_rows import Rows

pytestmark = pytest.mark.usefixtures("shop")


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    rows = Rows(database, schema)
    yield rows
    rows.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "PATIENCE", 0.0)


def there(rows: Rows, name: str, queue: str, *tasks: str) -> int:
    return rows.run(workers.register(Identity("worker", name, "moon", "b", 7, 6, "s", queue, tasks=tasks), 600))


def test_what_runs_and_what_is_only_claimed_are_told_apart_by_what_was_told_last(
    durable: Callable[..., Ran], rows: Rows
) -> None:
    worker = there(rows, "shop@moon", "default")
    first, second, third = rows.claimed(worker, 3)
    told = {worker: [(first.id, first.token, 5.0), (second.id, second.token - 1, 1.0), (99, 1, 1.0)]}
    rows.run(workers.heartbeat([worker], 600, told))
    (active,) = durable("inspect", "active", "--json").json
    assert (active["id"], active["worker"], active["host"], active["pid"]) == (first.id, "shop@moon", "moon", 7)
    assert (active["task"], active["step"], active["queue"]) == ("task", "run", "default")
    (since,) = rows.fetch("SELECT heartbeat_at - interval '5 s' AS at FROM {schema}.workers WHERE id = %s", [worker])
    assert active["since"][:22] == since["at"].isoformat()[:22]
    reserved = durable("inspect", "reserved", "--json").json
    assert [row["id"] for row in reserved] == [second.id, third.id]
    assert {row["since"] for row in reserved} == {None}
    assert "shop@moon" in durable("inspect", "active").out
    assert durable("inspect", "active", "--worker", "other").out == "no worker runs a step\n"
    assert durable("inspect", "reserved", "--worker", "other").out == "no worker has claimed more than it runs\n"


def test_a_heartbeat_without_claims_takes_back_what_was_told(durable: Callable[..., Ran], rows: Rows) -> None:
    worker = there(rows, "w", "default")
    (claimed,) = rows.claimed(worker)
    rows.run(workers.heartbeat([worker], 600, {worker: [(claimed.id, claimed.token, 0.0)]}))
    rows.run(workers.heartbeat([worker], 600))
    assert durable("inspect", "active", "--json").json == []


def test_each_command_is_shown_once_with_its_queues_and_tasks(durable: Callable[..., Ran], rows: Rows) -> None:
    assert durable("inspect", "registered").out == "no worker runs\n"
    there(rows, "a", "default", "add:1", "say:2")
    there(rows, "a", "slow", "add:1")
    there(rows, "b", "slow", "add:1")
    dead = there(rows, "c", "slow", "add:1")
    rows.bury(dead)
    found = durable("inspect", "registered", "--json").json
    assert [(row["worker"], row["pid"], row["queues"], row["tasks"]) for row in found] == [
        ("a", 6, ["default", "slow"], ["add:1", "say:2"]),
        ("b", 6, ["slow"], ["add:1"]),
    ]
    assert [row["worker"] for row in durable("inspect", "registered", "--worker", "b", "--json").json] == ["b"]
    assert "say:2" in durable("inspect", "registered").out


def test_who_does_not_answer_is_said(durable: Callable[..., Ran], rows: Rows) -> None:
    there(rows, "silent", "default")
    ran = durable("inspect", "active")
    assert (ran.code, "not every worker process answered" in ran.err) == (0, True)


def test_wrong_usage_is_refused(durable: Callable[..., Ran]) -> None:
    assert durable("inspect").code == 2
    assert durable("inspect", "everything").code == 2
    assert "sesame" not in durable("inspect", "active", "--dsn", NO_SERVER).error
