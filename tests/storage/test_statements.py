"""Every statement is valid on a migrated schema, and arrays reach Postgres as they were."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer

from durable import DurableError, sql
from durable.sql import Statements, packaged
from durable.storage.arrays import (
    Array,
    ByteaArray,
    Float8Array,
    Int4Array,
    Int8Array,
    TextArray,
    TimestampArray,
)
from tests.fix_rows import Rows


@pytest.mark.parametrize("folder", ["", "migrations"])
def test_an_app_that_was_frozen_without_the_sql_is_told_how(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql, "files", lambda _: tmp_path / "frozen")
    with pytest.raises(DurableError, match=r"it should be in \S+/frozen\S*; .*pyinstaller --collect-all durable"):
        packaged(folder)


def test_every_statement_prepares(rows: Rows) -> None:
    for name in Statements.names():
        text = rows.sql[name]
        if name == "copy_instances":  # COPY has no plan
            continue
        query = PostgresQuery(Transformer(rows.connection))
        query.convert(text, dict.fromkeys(re.findall(r"%\((\w+)\)[sb]", text)))
        rows.connection.execute(b"PREPARE " + name.encode() + b"_ AS " + query.query)


@pytest.mark.parametrize(
    ("kind", "sql_type", "values"),
    [
        (Int8Array, "bigint[]", [1, -(2**63), 2**63 - 1, None, 0]),
        (Int4Array, "int[]", [1, -(2**31), 2**31 - 1, None]),
        (Float8Array, "float8[]", [0.1, -1e300, None, 0.0]),
        (TextArray, "text[]", ["", "a", "é😀", 'q"uo\\te{},', "NULL", None]),
        (ByteaArray, "bytea[]", [b"", b"\0\xff", b"x" * 100_000, None]),
        (
            TimestampArray,
            "timestamptz[]",
            [
                datetime(2026, 1, 1, 12, 30, 15, 123456, tzinfo=UTC),
                datetime(1970, 1, 1, tzinfo=UTC),
                datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=timezone(timedelta(hours=-11, minutes=-30))),
                None,
            ],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_array_arrives_as_it_was(rows: Rows, kind: type[Array], sql_type: str, values: list[Any]) -> None:
    for part in (values, values[:1], [None], [], values * 20):
        (row,) = rows.fetch(f"SELECT %s::{sql_type} AS back", [kind(part)])
        assert row["back"] == part
        (row,) = rows.fetch(f"SELECT pg_typeof(%s)::text AS type", [kind(part)])  # noqa: F541
        assert row["type"] == {"int[]": "integer[]", "float8[]": "double precision[]"}.get(
            sql_type, sql_type.replace("timestamptz", "timestamp with time zone")
        )


def test_one_statement_is_prepared_once_whatever_the_arrays_hold(rows: Rows) -> None:
    rows.insert(3)
    rows.insert(2, correlation_key=None, delay=5.0, max_attempts=3, priority=300)
    rows.insert(1, correlation_key="k")
    (row,) = rows.fetch("SELECT count(*) AS n FROM pg_prepared_statements WHERE statement LIKE '%%nextval%%'")
    assert row["n"] == 1
