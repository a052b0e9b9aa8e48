"""What is heard on the channel that agents listen on, and what others see of the rows."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg import sql

from durable import Durable, Task
from durable.wakeups import queue_channel
from tests.fix_rows import Rows, schema, shared_schema  # noqa: F401
from tests.machines.driver import driver, drivers  # noqa: F401


class Ear:
    """Listens as an agent does."""

    def __init__(self, dsn: str, schema: str) -> None:  # noqa: F811
        self._channel = queue_channel(schema)
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))

    def heard(self) -> list[str]:
        """Return the payloads sent since the last call: all of those that had been committed by now."""
        last = uuid.uuid4().hex
        self.connection.execute("SELECT pg_notify(%s, %s)", [self._channel, last])
        payloads = []
        for notification in self.connection.notifies(timeout=20):
            if notification.payload == last:
                return payloads
            payloads.append(notification.payload)
        pytest.fail("our own notification did not arrive")


def count(rows: Rows) -> int:
    """How many live instances others see."""
    return int(rows.fetch("SELECT count(*) AS n FROM {schema}.instances")[0]["n"])


@pytest.fixture
def ear(database: str, schema: str) -> Iterator[Ear]:  # noqa: F811
    ear = Ear(database, schema)
    yield ear
    ear.connection.close()


@pytest.fixture
def task(app: Durable) -> Task[..., Any]:
    return app.task(name="task")(lambda: None)


@pytest.fixture
def away(schema: str) -> Iterator[Durable]:  # noqa: F811
    """An app whose own connections are refused: it writes on those of callers, but its notifications fail."""
    app = Durable("away", dsn="postgresql://127.0.0.1:1/none", schema=schema, connect_timeout=0.5)
    yield app
    app.close()


@pytest.fixture
def engine(database: str) -> Iterator[sqlalchemy.Engine]:
    """One with a JSON format of its own, which must not become ours."""
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(database),
        json_serializer=lambda value: json.dumps(["theirs", value]),
        json_deserializer=lambda text: ["theirs", text],
    )
    yield engine
    engine.dispose()
