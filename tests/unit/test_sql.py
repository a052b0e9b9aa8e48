"""The statements' files: every statement once, whole, explained, and used by exactly one place."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

import durable
from durable.sql import Statements, quote_identifier

ROOT = Path(durable.__file__).parent
FILES = sorted(ROOT.glob("sql/*.sql"))
NAME = re.compile(r"^-- name: (\S+)$", re.MULTILINE)


def texts() -> dict[str, str]:
    statements = Statements("some_schema")
    return {name: statements[name] for name in Statements.names()}


def test_names_are_unique_and_none_is_missed_by_the_loader() -> None:
    written = [name for file in FILES for name in NAME.findall(file.read_text())]
    assert sorted(written) == sorted(set(written)) == sorted(Statements.names())
    assert len(written) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_comments_hold_no_percent_sign_and_statements_no_semicolon_inside(file: Path) -> None:
    for line in file.read_text().splitlines():
        comment = line.partition("--")[2]
        assert "%" not in comment, f"psycopg would take it for a parameter: {line}"
    for part in NAME.split(file.read_text())[2::2]:
        code = "\n".join(line.partition("--")[0] for line in part.splitlines())
        assert code.count(";") == 1, part[:80]
        assert code.rstrip().endswith(";")


def test_every_statement_is_explained_above_its_text() -> None:
    for name, text in texts().items():
        assert text.startswith("--"), name


def test_every_statement_is_used_by_exactly_one_place() -> None:
    def users(package: str) -> dict[str, list[str]]:
        source = {path.name: path.read_text() for path in (ROOT.parent / package).rglob("*.py")}
        use = r"""(yield\s*\(?\s*|single\(|statements,\s*)["']{}["']"""
        return {
            name: [file for file, text in source.items() if re.search(use.format(name), text)]
            for name in Statements.names()
        }

    ours, commands = users("durable"), users("durable_cli")
    assert [name for name in ours if not ours[name] and not commands[name]] == [], "unused"
    # These two are shared on purpose: every notification, and every move of what some statement finished.
    several = {name: found for name, found in ours.items() if len(found) > 1 and name not in {"notify", "archive"}}
    assert several == {}, "a statement belongs to one module"


def test_no_other_place_in_the_package_holds_sql_that_reads_or_writes_our_tables() -> None:
    table = re.compile(r"\b(FROM|INTO|UPDATE|JOIN)\s+\{?\w*\}?\.?(instances|history|workers|duties)\b")
    found = [path.name for path in ROOT.rglob("*.py") if table.search(path.read_text())]
    assert found == []


def test_the_schema_is_quoted_wherever_it_stands() -> None:
    for name, text in texts().items():
        assert "{" not in text, name
    assert quote_identifier('a"b') == '"a""b"'
    assert Statements('we"ird').render("{schema}.t") == '"we""ird".t'


def test_an_unknown_statement_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Statements("s")["nothing"]


def test_the_files_are_found_as_package_resources() -> None:
    assert {file.name for file in FILES} == {f.name for f in files("durable.sql").iterdir() if f.name.endswith(".sql")}
