"""Workers that move only when told."""

from __future__ import annotations

from tests.machines.driver import driver, drivers, view  # noqa: F401
