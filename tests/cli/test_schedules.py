"""`durable schedules`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import Durable, crontab, every
from durable.storage import schedules
from tests.cli.conftest import Ran


@pytest.fixture
def declared(app: Durable, tasks_module: Callable[[str], Path]) -> None:
    """Two schedules of the app in this folder."""
    tasks_module("@app.task(name='report')\ndef report(): ...\n")
    report = app.task(name="report")(lambda: None)
    app.periodic(crontab("0 3 * * *", tz="Europe/Berlin"), name="nightly")(report)
    app.periodic(every(90), name="often", correlation_key="one")(report)
    app.run(schedules.declare(app.name, app.schedules()))


@pytest.mark.usefixtures("declared")
def test_the_list_shows_when_everything_runs_next_in_its_own_zone(durable: Callable[..., Ran]) -> None:
    table = durable("schedules", "list").out
    assert "0 3 * * *" in table
    assert "03:00:00" in table
    assert "every 90 s" in table
    (nightly, often) = durable("schedules", "list", "--json").json
    assert (nightly["name"], nightly["tz"], nightly["enabled"], nightly["machine"]) == (
        "nightly",
        "Europe/Berlin",
        True,
        "report",
    )
    assert often["schedule"] == "every 90000000 us"


@pytest.mark.usefixtures("declared")
def test_a_schedule_is_switched_off_and_on(durable: Callable[..., Ran]) -> None:
    assert durable("schedules", "disable", "nightly").out == "nightly: disabled\n"
    assert durable("schedules", "disable", "nightly").out == "nightly: disabled already\n"
    assert durable("schedules", "list", "--json").json[0]["enabled"] is False
    assert "disabled" in durable("schedules", "list").out
    assert durable("schedules", "enable", "nightly", "--json").json == {
        "schedule": "nightly",
        "enabled": True,
        "changed": True,
    }


@pytest.mark.usefixtures("declared")
def test_a_schedule_is_run_by_hand(durable: Callable[..., Ran], app: Durable, connection: Any) -> None:
    ran = durable("schedules", "run", "often", "--json").json
    assert ran["schedule"] == "often"
    assert app.result(ran["id"]).status == "runnable"
    again = durable("schedules", "run", "often")
    assert (again.code, again.error) == (1, "Error: correlation key 'one' is occupied; nothing was inserted")


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("what", ["enable", "disable", "run"])
def test_an_unknown_schedule_is_one_clear_line(durable: Callable[..., Ran], what: str) -> None:
    ran = durable("schedules", what, "often ")
    assert (ran.code, ran.error) == (1, "Error: no schedule 'often '; `durable schedules list` shows those there are")


def test_without_any_the_list_says_where_they_come_from(
    durable: Callable[..., Ran], app: Durable, tasks_module: Callable[[str], Path]
) -> None:
    tasks_module("")
    assert "no schedule is declared" in durable("schedules", "list").out
    assert durable("schedules", "list", "--json").json == []


def test_a_zone_that_this_machine_does_not_know_does_not_end_the_list(
    durable: Callable[..., Ran], declared: None, app: Durable, connection: Any
) -> None:
    connection.execute(f"UPDATE {app.schema}.schedules SET tz = 'Mars/Olympus' WHERE name = 'nightly'")
    ran = durable("schedules", "list")
    assert ran.code == 0, ran.err
    assert "Mars/Olympus" in ran.out
