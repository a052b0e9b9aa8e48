"""Canvases are driven by hand, as machines are."""

from __future__ import annotations

from tests.machines.driver import driver, drivers, view  # noqa: F401
