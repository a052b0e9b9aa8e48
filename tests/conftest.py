"""Fixtures come from fix_*.py, by subject."""

from __future__ import annotations

from tests.fix_app import app, durable_worker, tasks_module  # noqa: F401
from tests.fix_db import connection, database, schema, server_dsn  # noqa: F401
from tests.fix_pgbouncer import pgbouncer  # noqa: F401
from tests.fix_proxy import counting_proxy  # noqa: F401
from tests.fix_rows import rows  # noqa: F401
