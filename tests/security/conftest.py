"""Real database roles with what `durable migrate --grant` gives them, dropped when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from durable import Durable
from durable.storage import grants
from tests.cli.conftest import durable, here, process  # noqa: F401

Role = Callable[[str], str]


@pytest.fixture
def role(app: Durable, database: str, schema: str) -> Iterator[Role]:
    """Make a role of a kind ("" for none) and return the DSN with which to be it."""
    made: list[str] = []
    with psycopg.connect(database, autocommit=True) as connection:

        def make(kind: str) -> str:
            name = f'{schema} "{kind}"'
            made.append(name)
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
            if kind:
                grants.grant(connection, schema, [(kind, name)])
            return make_conninfo(database, user=name)

        yield make
        app.close()
        for name in made:
            owned = sql.SQL("REASSIGN OWNED BY {} TO CURRENT_USER").format(sql.Identifier(name))
            connection.execute(owned)
            connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
