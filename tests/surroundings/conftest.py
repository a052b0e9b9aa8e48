"""Servers that are a test's own, and a load on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from durable import Durable
from tests.surroundings.load import SCHEMA, Load
from tests.surroundings.server import OwnServer


@pytest.fixture
def own_server() -> Iterator[Callable[..., OwnServer]]:
    """Start one with such settings, an ordinary role and the schema on it."""
    started: list[OwnServer] = []

    def start(**settings: Any) -> OwnServer:
        server = OwnServer(**settings)
        started.append(server)
        server.prepare()
        app = Durable("around", dsn=server.dsn, schema=SCHEMA)
        app.migrate()
        app.close()
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Load]]:
    """Make a load for a DSN; it ends with the test, whatever became of that."""
    made: list[Load] = []

    def make(dsn: str, admin: str, **options: Any) -> Load:
        made.append(Load(dsn, admin, tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.abandon()
