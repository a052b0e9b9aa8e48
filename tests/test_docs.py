"""Every example in README and docs is executed: Python blocks as one tasks.py, sessions against a running worker."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from durable.config import Config
from tests.fix_app import Command

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
AUTO = ("prefetch", "min_demand", "step_connections")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in _BLOCK.findall(page.read_text()) if found == language]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tasks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tasks"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "pycon")], ids=lambda page: page.name)
def test_the_examples_of_a_page_do_what_they_show(
    page: Path,
    tmp_path: Path,
    database: str,
    schema: str,
    durable_worker: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "\n\n".join(blocks(page, "python"))
    # The only change: a schema of our own, in the test's database.
    changed = re.sub(r'Durable\((\s*)"(\w+)"', rf'Durable(\1"\2", schema="{schema}"', source)
    assert changed != source
    (tmp_path / "tasks.py").write_text(changed)
    monkeypatch.setenv("DURABLE_DSN", database)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    module = load(tmp_path / "tasks.py")
    module.app.migrate()
    durable_worker("worker", "-Q", "default,emails", "-c", "2")
    session = "\n".join(blocks(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(session, dict(vars(module)), page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    printed: list[str] = []
    runner.run(test, out=printed.append)
    module.app.close()
    del sys.modules["tasks"]

    assert test.examples
    assert not runner.failures, "".join(printed)


def commands() -> list[str]:
    text = "\n".join(block for page in PAGES for block in blocks(page, "console"))
    return sorted({line[2:] for line in text.splitlines() if line.startswith("$ durable ")})


@pytest.mark.parametrize("command", commands())
def test_the_commands_that_the_pages_show_exist_with_those_options(command: str, tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "durable_cli", *shlex.split(command)[1:], "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "Usage" in shown.stdout


def settings_table() -> str:
    """What docs/settings.md must hold below its head."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    defaults = Config()
    for name in Config.names():
        value = getattr(defaults, name)
        shown = "auto" if value is None and name in AUTO else "" if value is None else value
        text = ", ".join(shown) if isinstance(shown, tuple) else f"{shown:g}" if isinstance(shown, float) else shown
        lines.append(f"| `{name}` | {text} | {Config.doc(name)} |")
    return "\n".join(lines) + "\n"


def test_the_settings_page_shows_every_setting_as_it_is() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page.endswith(settings_table())


def test_the_readme_opens_with_the_two_commands() -> None:
    opening = blocks(ROOT / "README.md", "bash")
    assert len(opening) == 2
    assert opening[0].rstrip().endswith("durable demo")
    assert opening[1].rstrip().endswith("tox")


_NAMED_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("name", ["behaviours.md", "reliability.md"])
def test_every_test_that_a_page_names_exists(name: str) -> None:
    named = _NAMED_TEST.findall((ROOT / "docs" / name).read_text())
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (file := ROOT / "tests" / path).is_file() or f"\ndef {name}(" not in file.read_text()
    ]
    assert len(named) > 40
    assert missing == []


def test_every_promise_of_the_behaviours_page_names_a_test() -> None:
    page = (ROOT / "docs" / "behaviours.md").read_text()
    promises = [line for line in page.splitlines() if re.match(r"\| \d+ ", line)]
    assert [int(re.findall(r"\d+", line)[0]) for line in promises] == [*range(1, 41)]
    assert all(_NAMED_TEST.search(line) for line in promises), "a promise without a test"
