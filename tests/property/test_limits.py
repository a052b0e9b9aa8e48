"""Slots and tokens are granted as plain arithmetic says, whatever the clock and the limits do meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.fix_rows import Rows
from tests.property.buckets import Buckets
from tests.property.conftest import TIMEOUT
from tests.property.gates import Gates

pytestmark = pytest.mark.timeout(TIMEOUT)


def run(machine: type[RuleBasedStateMachine], rows: Rows, profile: settings) -> None:
    run_state_machine_as_test(type(machine.__name__, (machine,), {"rows": rows}), settings=profile)


def test_a_bucket_grants_what_the_formula_says_whatever_the_clock_does(rows: Rows, profile: settings) -> None:
    run(Buckets, rows, profile)


def test_a_gate_admits_what_counting_says_while_its_limit_changes(rows: Rows, profile: settings) -> None:
    run(Gates, rows, profile)
