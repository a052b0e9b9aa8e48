"""Which app a command uses, and what it says when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import NO_SERVER, Ran

APP = "from durable import Durable\n{} = Durable('shop', dsn={!r}, schema={!r})\n"


def sql(ran: Ran) -> str:
    """The schema that a `migrate --sql` is for."""
    assert ran.code == 0, ran.err
    return ran.out.split('CREATE SCHEMA "')[1].split('"')[0]


@pytest.fixture
def write(here: Path) -> Callable[..., None]:
    def write(name: str, *apps: tuple[str, str], text: str = "") -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(APP.format(variable, NO_SERVER, schema) for variable, schema in apps) + text)

    return write


def test_the_app_option_goes_before_and_after_the_command(
    durable: Callable[..., Ran], write: Callable[..., None]
) -> None:
    write("mine.py", ("app", "one"))
    assert sql(durable("-A", "mine:app", "migrate", "--sql")) == "one"
    assert sql(durable("migrate", "--sql", "-A", "mine:app")) == "one"
    assert sql(durable("migrate", "--app", "mine", "--sql")) == "one"


def test_without_an_option_the_variable_counts_then_tasks_py_then_app_py(
    durable: Callable[..., Ran], write: Callable[..., None], here: Path
) -> None:
    write("app.py", ("app", "from_app"))
    assert sql(durable("migrate", "--sql")) == "from_app"
    write("tasks.py", ("app", "from_tasks"))
    assert sql(durable("migrate", "--sql")) == "from_tasks"
    write("shop/jobs.py", ("app", "from_variable"))
    assert sql(durable("migrate", "--sql", DURABLE_APP="shop.jobs:app")) == "from_variable"
    assert sql(durable("migrate", "--sql", "-A", "app", DURABLE_APP="shop.jobs:app")) == "from_app"
    assert sql(durable("migrate", "--sql", "--schema", "given", "--dsn", NO_SERVER, DURABLE_APP="x:y")) == "given"


def test_a_tasks_py_that_only_uses_the_app_gives_way_to_app_py(
    durable: Callable[..., Ran], write: Callable[..., None]
) -> None:
    write("app.py", ("app", "from_app"))
    write("tasks.py", text="number = 1\n")
    assert sql(durable("migrate", "--sql")) == "from_app"


def test_a_module_alone_means_its_app_or_its_only_one(durable: Callable[..., Ran], write: Callable[..., None]) -> None:
    write("named.py", ("app", "is_app"), ("other", "is_other"))
    write("lone.py", ("queueing", "is_lone"), text="also = queueing\n")
    assert sql(durable("migrate", "--sql", "-A", "named")) == "is_app"
    assert sql(durable("migrate", "--sql", "-A", "lone")) == "is_lone"
    assert sql(durable("migrate", "--sql", "-A", "named:other")) == "is_other"


def test_a_dsn_in_the_environment_is_enough_for_commands_that_need_no_tasks(
    durable: Callable[..., Ran], here: Path
) -> None:
    assert sql(durable("migrate", "--sql", DURABLE_DSN=NO_SERVER)) == "durable"
    assert durable("call", "x", DURABLE_DSN=NO_SERVER).code == 3


WRONG = [
    ("nosuch", "no module named 'nosuch'"),
    ("shop.nosuch", "no module named 'shop.nosuch'"),
    ("two", "several apps; name one: two:a, two:b"),
    ("two:c", "has no 'c'; its apps: two:a, two:b"),
    ("two:number", "is a int, not a Durable app"),
    ("plain", "has no Durable app"),
    ("raises", "ZeroDivisionError: division by zero (", "raises.py, line 2)"),
    ("exits", "SystemExit: 3"),
    ("misses", "No module named 'nosuchlib'", "misses.py, line 1"),
    ("redis", "must start with postgresql://, got redis://", "redis.py, line 2"),
    ("raises.py", "is a file; give its module: raises"),
    ("./raises.py", "did you mean raises?"),
    (":app", "must be module:app"),
    ("a:b:c", "must be module:app"),
    ("", "must be module:app"),
]


@pytest.mark.parametrize(("path", "said"), [(path, said) for path, *said in WRONG], ids=[path for path, *_ in WRONG])
@pytest.mark.parametrize("command", ["worker", "beat", "list"])
def test_a_wrong_app_ends_with_3_and_one_line(
    durable: Callable[..., Ran], write: Callable[..., None], command: str, path: str, said: list[str]
) -> None:
    write("two.py", ("a", "a"), ("b", "b"), text="number = 1\n")
    write("plain.py")
    write("shop/__init__.py")
    write("raises.py", text="number = 1\nnumber / 0\n")
    write("exits.py", text="import sys; sys.exit(3)\n")
    write("misses.py", text="import nosuchlib\n")
    write("redis.py", text="from durable import Durable\napp = Durable('x', dsn='redis://:sesame@host')\n")
    ran = durable(command, "-A", path)
    assert ran.code == 3
    for part in said:
        assert part in ran.error
    assert "sesame" not in ran.err


def test_no_app_at_all_says_what_to_give(durable: Callable[..., Ran], here: Path) -> None:
    ran = durable("worker")
    assert ran.code == 3
    assert "which app? Give -A module:app or set DURABLE_APP" in ran.error


def test_debug_adds_the_traceback_before_and_after_the_command(
    durable: Callable[..., Ran], write: Callable[..., None]
) -> None:
    write("raises.py", text="number = 1\nnumber / 0\n")
    for arguments in (("--debug", "list", "-A", "raises"), ("list", "--debug", "-A", "raises")):
        ran = durable(*arguments)
        assert ran.code == 3
        assert ran.err.startswith("Error: ")
        assert "Traceback (most recent call last)" in ran.err
        assert "number / 0" in ran.err


DSNS = [
    "redis://somebody:sesame@host/0",
    "mysql://somebody:sesame@host/shop",
    "postgresql+psycopg://somebody:sesame@host/shop",
    "postgresql://somebody:sesame%zz@host/shop",
    "postgresql://somebody:x@sesame@host/shop",
    "postgresql://somebody:x/sesame@host/shop",
    "postgresql://somebody:sesame/x@host/shop",
    "postgresql://somebody:se:sesame@127.0.0.1:1/shop",
    "postgresql://somebody:sesame@127.0.0.1:1/shop",
    "postgresql://somebody:sesame@[::1]:1/shop",
    "postgresql://somebody@127.0.0.1:1/shop?password=sesame",
    "host=127.0.0.1 port=1 password=sesame",
    "host=127.0.0.1 port=1 password='x://sesame'",
    "host=127.0.0.1 port=1 password=sesame nonsense",
    "service=nosuch password=sesame",
    "",
]


@pytest.mark.parametrize("dsn", DSNS)
@pytest.mark.parametrize("way", ["option", "environment", "app"])
def test_no_password_is_printed_whatever_is_wrong_with_the_dsn(
    durable: Callable[..., Ran], here: Path, dsn: str, way: str
) -> None:
    if way == "option":
        ran = durable("--debug", "list", "--dsn", dsn)
    elif way == "environment":
        ran = durable("--debug", "list", DURABLE_DSN=dsn)
    else:
        (here / "tasks.py").write_text(f"import os\nfrom durable import Durable\napp = Durable('x', dsn={dsn!r})\n")
        ran = durable("call", "x.y") if dsn == "" else durable("list")
    assert ran.code == 3
    assert ran.err.startswith("Error: ")
    assert "sesame" not in ran.out + ran.err
