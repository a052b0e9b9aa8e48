"""A migrated schema as the benchmarks make it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.database import Database, migrated


@pytest.fixture
def place(database: str, schema: str) -> Iterator[Database]:
    """An empty schema of the benchmarks' tables."""
    with migrated(database, schema) as made:
        yield made
