"""The shape of the code: imports go down, the wheel holds what the code reads at run time."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("durable", "durable_cli")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_imports_keep_to_the_contracts() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed (extra `lint`); tox -e lint runs it")
    ran = subprocess.run(
        [str(program), "--config", "setup.cfg", "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 broken" in ran.stdout


def test_nothing_of_ours_is_imported_inside_a_function() -> None:
    """Such imports hide cycles from every tool, this one's neighbour above included."""
    found = []
    for path in SOURCES:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    found += [f"{path.name}:{node.lineno}" for name in names if name.split(".")[0] in PACKAGES]
    assert found == []


def test_every_module_and_public_class_says_what_it_is_for() -> None:
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree) and path.name not in ("__init__.py", "_version.py", "__main__.py"):
            silent.append(path.name)
        silent += [
            f"{path.name}:{node.name}"
            for node in tree.body
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
        ]
    assert silent == []


def tracked() -> list[str]:
    """Files of the packages, as git knows them or would if they were added."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_setup_cfg_names_every_package_and_every_file_that_is_no_module() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = set(config["options"]["packages"].split())
    data = {
        package: re.split(r"[\s,]+", patterns.strip()) for package, patterns in config["options.package_data"].items()
    }
    missing = []
    for name in map(Path, tracked()):
        package = ".".join(name.parent.parts)
        shipped = name.suffix == ".py" or any(name.match(pattern) for pattern in data.get(package, ()))
        if package not in packages or not shipped:
            missing.append(name.as_posix())
    assert missing == []
    assert all((ROOT / package.replace(".", "/")).is_dir() for package in packages)
    assert {"py.typed", *(path.name for path in (ROOT / "durable/sql").glob("*.sql"))} <= {
        Path(name).name for name in tracked()
    }


def test_a_wheel_holds_every_module_statement_and_marker(tmp_path: Path) -> None:
    """Built from a copy, without network, where there is a setuptools that can."""
    setuptools = pytest.importorskip("setuptools", reason="this environment can't build")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77")
    files = tracked()
    for name in [*files, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    with zipfile.ZipFile(tmp_path / "dist" / built.stdout.split()[-1]) as wheel:
        inside = set(wheel.namelist())
        entry_points = next(wheel.read(name).decode() for name in inside if name.endswith("entry_points.txt"))
    assert set(files) - inside == set()
    assert "durable = durable_cli.main:main" in entry_points
