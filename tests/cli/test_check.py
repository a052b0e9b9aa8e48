"""`durable check`: what the code about to be deployed could not go on with."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from durable import Durable
from durable.instance import Payload
from durable_cli import checking
from tests.cli.conftest import NO_SERVER, Ran
from tests.fix_rows import Rows

CODE = """
    from dataclasses import dataclass
    from durable import Done, Machine, step

    @app.task
    def add(a, b=1):
        return a + b

    @app.machine(name="order", version=2)
    class Order(Machine):
        @dataclass
        class State:
            total: int

        @step(initial=True)
        def begin(self, ctx):
            return Done()
"""


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    rows = Rows(database, schema)
    yield rows
    rows.close()


@pytest.fixture
def code(here: Path, tasks_module: Callable[[str], Path], rows: Rows) -> Path:
    """A folder with a tasks.py, on a migrated schema."""
    return tasks_module(CODE)


def json(text: str) -> Payload:
    return Payload("json", text.encode())


def test_what_this_code_can_go_on_with_is_no_problem(code: Path, rows: Rows, durable: Callable[..., Ran]) -> None:
    rows.insert(2, machine="tasks.add", state=json('{"args": [1, 2]}'))
    rows.insert(1, machine="order", machine_version=2, step="begin", state=json('{"total": 3}'))
    ran = durable("check")
    assert (ran.code, ran.out) == (0, "3 live instances and 0 signals checked: all can go on\n")
    assert durable("check", "--json").json == {"instances": 3, "signals": 0, "problems": []}


@pytest.mark.parametrize(
    ("row", "problem", "detail"),
    [
        ({"machine": "tasks.ad"}, "unknown task", "did you mean 'tasks.add'?"),
        ({"machine": "tasks.add", "machine_version": 2}, "unknown version", "the code has 1"),
        ({"machine": "order", "machine_version": 1, "step": "begin"}, "unknown version", "the code has 2"),
        ({"machine": "order", "machine_version": 2, "step": "begn"}, "unknown step", "'begn'; did you mean 'begin'?"),
        ({"machine": "tasks.add", "step": "go"}, "unknown step", "'go'"),
        (
            {"machine": "order", "machine_version": 2, "step": "begin", "state": json('{"total": "three"}')},
            "state does not load",
            "state of order: Expected `int`, got `str`",
        ),
        ({"machine": "tasks.add", "state": json('{"args": []}')}, "state does not load", "missing a required"),
        ({"machine": "tasks.add", "state": json('{"args": [1')}, "state does not load", "not valid json"),
        ({"machine": "tasks.add", "state": json("[1]")}, "state does not load", "state is list, not a mapping"),
        (
            {"machine": "tasks.add", "state": Payload("pickle", pickle.dumps({}))},
            "state does not load",
            "it was not loaded",
        ),
    ],
    ids=lambda value: value.replace(" ", "-")[:24] if isinstance(value, str) else "",
)
def test_what_it_can_not_is_named_with_its_number_and_an_example(
    code: Path, rows: Rows, durable: Callable[..., Ran], row: dict[str, object], problem: str, detail: str
) -> None:
    rows.insert(1, machine="tasks.add", state=json('{"args": [1]}'))
    (first, _, _) = rows.insert(3, **row)
    ran = durable("check", "--json")
    assert ran.code == 1
    (found,) = ran.json["problems"]
    assert (found["problem"], found["count"], found["example"]) == (problem, 3, first)
    assert (found["task"], found["version"]) == (row["machine"], row.get("machine_version", 1))
    assert detail in found["detail"]
    ran = durable("check")
    assert ran.code == 1
    assert "4 live instances and 0 signals checked: 3 can't go on with this code\n" in ran.out


def test_a_signal_that_waits_and_would_not_load_is_named_by_its_target(
    code: Path, rows: Rows, durable: Callable[..., Ran]
) -> None:
    (target,) = rows.insert(1, machine="order", machine_version=2, step="begin", state=json('{"total": 3}'))
    rows.fetch(
        "INSERT INTO {schema}.signals (target_id, name, payload_type, payload) VALUES (%s, 'paid', 'pickle', '')",
        [target],
    )
    (found,) = durable("check", "--json").json["problems"]
    assert (found["problem"], found["task"], found["example"]) == ("signal does not load", "paid", target)
    assert durable("check", "--queue", "default").code == 0


def test_pages_limits_and_queues_bound_what_is_looked_at(
    code: Path, rows: Rows, durable: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "PAGE", 2)
    rows.insert(5, machine="gone")
    rows.insert(1, machine="gone", queue="other")
    told = durable("check", "--json").json
    assert (told["instances"], told["problems"][0]["count"]) == (6, 6)
    assert durable("check", "--json", "--limit", "3").json["instances"] == 3
    assert durable("check", "--json", "--queue", "other").json["instances"] == 1


def test_it_waits_for_no_lock_and_holds_none(code: Path, rows: Rows, durable: Callable[..., Ran]) -> None:
    rows.insert(1, machine="gone")
    with rows.connection.transaction():
        rows.fetch("SELECT FROM {schema}.instances FOR UPDATE")
        rows.fetch("LOCK TABLE {schema}.signals IN EXCLUSIVE MODE")
        assert durable("check").code == 1


def test_without_a_database_it_is_an_error_and_no_verdict(
    here: Path, durable: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "tasks.py").write_text(f"from durable import Durable\napp = Durable('x', dsn={NO_SERVER!r})\n")
    ran = durable("check")
    assert ran.code == 3
    assert "sesame" not in ran.err
