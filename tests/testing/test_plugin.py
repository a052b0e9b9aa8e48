"""The pytest plugin, in pytest runs of its own."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "durable_cli.pytest_plugin"
APP = """
    import os
    from durable import Durable
    app = Durable("shop", dsn=os.environ["SHOP_DSN"])

    @app.task(name="note")
    def note(n): return n
"""
TESTS = """
    import os
    import pytest
    from durable.testing import assert_done, crash_every_commit, drain, transaction
    from shop import app, note

    def test_it_is_the_app_elsewhere(durable_app):
        assert durable_app is app
        assert app.schema.startswith("durable_test_")
        result = note.delay(3)
        assert drain(app) == {"steps": 1, "done": 1}
        assert assert_done(app, result, 3) == result.get(timeout=5)

    @pytest.mark.parametrize("n", range(4))
    def test_it_is_empty_each_time(durable_app, n):
        assert drain(durable_app) == {"steps": 0}
        assert note.delay(n).id == 1

    def test_the_other_tools_work_on_it(durable_app):
        with transaction(durable_app):
            note.delay(1)
        assert crash_every_commit(durable_app, lambda app: note.delay(1)).runs == 10

    def test_without_it_the_app_is_where_it_was():
        assert app.schema == "durable"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(textwrap.dedent(APP))
    (tmp_path / "test_shop.py").write_text(textwrap.dedent(TESTS))
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\ndurable_app = shop:app\n")
    return tmp_path


def run_pytest(folder: Path, database: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DURABLE_"))},
        "SHOP_DSN": database,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def schemas(database: str) -> list[str]:
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'durable%'").fetchall()
    return [name for (name,) in rows]


@pytest.mark.parametrize("arguments", [(), ("-p", "xdist", "-n", "2")], ids=["alone", "xdist"])
def test_the_fixture_is_the_app_on_a_clean_schema_of_each_process(
    folder: Path, database: str, arguments: tuple[str, ...]
) -> None:
    ran = run_pytest(folder, database, *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "7 passed" in ran.stdout
    assert schemas(database) == [], "its schemas are dropped, the app's own was never made"


def test_the_option_goes_before_the_ini_file_and_a_wrong_app_is_told(folder: Path, database: str) -> None:
    ran = run_pytest(folder, database, "--durable-app", "shop:nothing", "-k", "elsewhere")
    assert ran.returncode != 0
    assert "has no 'nothing'" in ran.stdout
    (folder / "pytest.ini").write_text("[pytest]\n")
    ran = run_pytest(folder, database, "-k", "elsewhere")
    assert "which app?" in ran.stdout
    assert "--durable-app" in ran.stdout
    ran = run_pytest(folder, database, "-k", "elsewhere", "--durable-app=shop")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_loading_the_plugin_imports_nothing_of_ours() -> None:
    code = f"import sys, {PLUGIN}; print([name for name in ('durable', 'psycopg', 'click') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_pytest_finds_it_by_its_entry_point() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["pytest11"].split() == ["durable", "=", PLUGIN]
