"""The example counts of these tests: HYPOTHESIS_PROFILE chooses `ci`, the same in each run, or `nightly`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

_ALWAYS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True)
PROFILES = {
    "ci": settings(_ALWAYS, max_examples=80, stateful_step_count=30, derandomize=True),
    "nightly": settings(_ALWAYS, max_examples=2000, stateful_step_count=60),
}
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
TIMEOUT = 600 if PROFILE == "ci" else 6 * 3600
"""What fails is shrunk for five minutes."""


@pytest.fixture
def profile() -> settings:
    """How long to look."""
    return PROFILES[PROFILE]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of deaths would fill the report of the one sequence that failed."""
    logger = logging.getLogger("durable")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)
