"""These tests share one schema per process, emptied after each."""

from __future__ import annotations

from tests.fix_rows import schema, shared_schema  # noqa: F401
from tests.machines.driver import driver, drivers, view  # noqa: F401
