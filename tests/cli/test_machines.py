"""`signal`, and what `show` tells of a machine: what it awaits, its deadline, its family, its inbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from durable import Durable
from durable_cli.loading import load
from tests.cli.conftest import Ran
from tests.machines.driver import Driver


@pytest.fixture
def checkout(tasks_module: Callable[[str], Path], here: Path, durable: Callable[..., Ran]) -> Path:
    """A folder with a tasks.py of two machines, on a migrated schema of its own."""
    return tasks_module("""
        from durable import Await, Done, Machine, ScheduleChildren, step
        app.migrate()
        app.close()

        @app.machine(name="checkout")
        class Checkout(Machine):
            @step(initial=True)
            def start(self, ctx):
                return Await(["paid", "aborted"], then=self.ship, timeout=3600)

            @step
            def ship(self, ctx):
                return Done([signal.payload for signal in ctx.awaited])

        @app.machine(name="fleet")
        class Fleet(Machine):
            @step(initial=True)
            def start(self, ctx):
                return ScheduleChildren([Checkout, Checkout, ("checkout", {"queue": "slow"})], then=self.join)

            @step
            def join(self, ctx):
                return Done()
    """)


@pytest.fixture
def loaded(checkout: Path, durable: Callable[..., Ran]) -> Iterator[Durable]:
    """The app of that tasks.py."""
    durable("list")
    app = load("tasks", "-A")
    yield app
    app.close()


@pytest.fixture
def driver(loaded: Durable) -> Iterator[Driver]:
    """A worker of it, turned by hand."""
    driver = Driver(loaded)
    yield driver
    driver.close()


def test_a_signal_reaches_an_instance_by_id_and_by_key(
    durable: Callable[..., Ran], loaded: Durable, driver: Driver
) -> None:
    one = loaded.insert("checkout", correlation_key="order:1")
    driver.drain()
    ran = durable("signal", str(one.id), "noted")
    assert (ran.code, ran.out, ran.err) == (0, f"{one.id}: delivered\n", "")
    ran = durable("signal", "order:1", "paid", "--payload", '{"amount": 100}', "--dedup-key", "evt-7", "--json")
    assert ran.code == 0
    assert ran.json == {"target": "order:1", "name": "paid", "delivered": True, "duplicate": False}
    driver.drain()
    assert one.get(timeout=5) == [{"amount": 100}]


def test_a_redelivery_is_no_failure_and_says_so(durable: Callable[..., Ran], loaded: Durable) -> None:
    one = loaded.insert("checkout")
    for said in ("delivered", "nothing done: 'e' was delivered before"):
        ran = durable("signal", str(one.id), "paid", "--dedup-key", "e")
        assert (ran.code, ran.out) == (0, f"{one.id}: {said}\n")
    assert durable("signal", str(one.id), "paid", "--dedup-key", "e", "--json").json["duplicate"] is True


def test_a_key_that_looks_like_an_id_is_taken_for_a_key_when_told(
    durable: Callable[..., Ran], loaded: Durable, driver: Driver
) -> None:
    one = loaded.insert("checkout", correlation_key="4711")
    driver.drain()
    assert durable("signal", "4711", "paid").code == 1
    assert durable("signal", "4711", "paid", "--key").code == 0
    assert one.status == "runnable"


@pytest.mark.parametrize("target", ["424242", "nobody"])
def test_nothing_live_is_one_line_and_exit_code_1(durable: Callable[..., Ran], checkout: Path, target: str) -> None:
    ran = durable("signal", target, "paid")
    assert ran.code == 1
    assert "nothing live is at" in ran.error
    assert target in ran.error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1", ""], "a signal's name must be 1 to 255 bytes"),
        (["", "paid"], "a correlation key must be 1 to 255 bytes"),
        (["0", "paid"], "no instance id"),
        (["1,2", "paid"], "no instance id"),
        (["1", "paid", "--payload", "{"], "not valid JSON"),
        (["1", "paid", "--payload", "NaN"], "NaN is not JSON"),
        (["1", "paid", "--payload", '"\\u0000"'], "NUL"),
        (["1", "paid", "--dedup-key", ""], "a dedup key must be 1 to 255 bytes"),
        (["1"], "Missing argument 'NAME'"),
    ],
)
def test_a_wrong_signal_is_wrong_usage(
    durable: Callable[..., Ran], checkout: Path, arguments: list[str], said: str
) -> None:
    ran = durable("signal", *arguments)
    assert ran.code == 2
    assert said in ran.error


def test_show_tells_what_a_machine_awaits_until_when_and_its_inbox(
    durable: Callable[..., Ran], loaded: Durable, driver: Driver
) -> None:
    one = loaded.insert("checkout")
    driver.drain()
    for n in range(2):
        one.signal("noted", {"n": n})
    one.signal("other")
    shown = durable("show", str(one.id), "--json").json
    assert (shown["status"], shown["step"], shown["awaits"]) == ("awaiting_signal", "ship", ["paid", "aborted"])
    assert shown["deadline"].endswith("Z")
    assert shown["deadline"] > shown["created_at"]
    assert [(entry["name"], entry["payload"]) for entry in shown["inbox"]] == [
        ("noted", {"n": 0}),
        ("noted", {"n": 1}),
        ("other", None),
    ]
    assert (shown["parent_id"], shown["children"]) == (None, {})
    lines = {line.split("  ")[0].strip(): line for line in durable("show", str(one.id)).out.splitlines()}
    assert "paid, aborted" in lines["awaits"]
    assert "2 noted, 1 other" in lines["inbox"]
    assert "deadline" in lines
    assert "children" not in lines


def test_show_tells_of_parents_and_children(durable: Callable[..., Ran], loaded: Durable, driver: Driver) -> None:
    fleet = loaded.insert("fleet")
    driver.drain()
    first, second, _ = fleet.children
    loaded.cancel(first.id)
    shown = durable("show", str(fleet.id), "--json").json
    assert (shown["status"], shown["parent_id"]) == ("awaiting_children", None)
    assert shown["children"] == {"runnable": 1, "awaiting_signal": 1, "cancelled": 1}
    assert "1 runnable, 1 awaiting_signal, 1 cancelled" in durable("show", str(fleet.id)).out
    for child in (first.id, second.id):
        assert durable("show", str(child), "--json").json["parent_id"] == fleet.id
    assert durable("cancel", str(fleet.id), "--cascade").code == 0
    assert durable("show", str(fleet.id), "--json").json["children"] == {"cancelled": 3}


def test_cancel_with_cascade_reaches_what_outlived_a_parent(
    durable: Callable[..., Ran], loaded: Durable, driver: Driver
) -> None:
    fleet = loaded.insert("fleet")
    driver.drain()
    assert durable("cancel", str(fleet.id)).code == 0
    ran = durable("cancel", str(fleet.id), "--cascade")
    assert (ran.code, ran.out) == (
        0,
        f"{fleet.id}: finished already: cancelled; what lived of its children is cancelled\n",
    )
    ran = durable("cancel", str(fleet.id), "--cascade")
    assert (ran.code, ran.out) == (1, f"{fleet.id}: finished already: cancelled\n")


def test_show_of_a_task_has_none_of_it(durable: Callable[..., Ran], shop: Path) -> None:
    instance = durable("call", "tasks.add", "--args", "[1]").out.strip()
    shown = durable("show", instance, "--json").json
    assert [shown[name] for name in ("awaits", "deadline", "parent_id", "children", "inbox")] == [
        None,
        None,
        None,
        {},
        [],
    ]
    text: Any = durable("show", instance).out
    for name in ("awaits", "deadline", "parent", "children", "inbox"):
        assert name not in text


def test_list_finds_machines_by_status_and_name(durable: Callable[..., Ran], loaded: Durable, driver: Driver) -> None:
    fleet = loaded.insert("fleet")
    driver.drain()
    assert [entry["id"] for entry in durable("list", "--json", "--status", "awaiting_children").json] == [fleet.id]
    assert len(durable("list", "--json", "--status", "awaiting_signal", "--task", "checkout").json) == 2
