"""Whatever is done in whatever order, the database is where a model in memory says it should be."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.calling import Calling
from tests.property.conftest import TIMEOUT
from tests.property.world import World

pytestmark = pytest.mark.timeout(TIMEOUT)


def test_any_sequence_of_calls_claims_deaths_and_ticks_leaves_the_database_as_the_model_says(
    database: str, schema: str, profile: settings
) -> None:
    world = World(database, schema)
    try:
        run_state_machine_as_test(type("Machine", (Calling,), {"world": world}), settings=profile)
    finally:
        world.close()
