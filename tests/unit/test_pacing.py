"""When outcomes are committed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from durable.config import Config
from durable.runtime.buffer import Buffer, Outbox
from durable.runtime.pacing import Pacing
from durable.runtime.shared import SharedSeats

HOUR = 3600.0


def pacing(waiting: int, **settings: Any) -> tuple[Pacing, Buffer, Outbox]:
    buffer, outbox = Buffer(lambda: None), Outbox(lambda: None)
    for _ in range(waiting):
        outbox.hand_over(object())  # type: ignore[arg-type]
    slot: Any = SimpleNamespace(mean_step=None, running=True)
    return Pacing(Config(**settings), slot, buffer, outbox, SharedSeats(1).seat(0)), buffer, outbox


@pytest.mark.parametrize(("waiting", "due"), [(0, False), (1, False), (9, False), (10, True), (11, True)])
def test_a_full_batch_goes_at_once_and_fewer_wait(waiting: int, due: bool) -> None:
    assert pacing(waiting, flush_batch=10, flush_delay=HOUR)[0].flush_is_due() is due


def test_fewer_go_when_the_delay_has_passed() -> None:
    policy, _, outbox = pacing(3, flush_batch=10, flush_delay=1.0)
    assert not policy.flush_is_due()
    outbox.oldest_at -= 1.0
    assert policy.flush_is_due()


@pytest.mark.parametrize("waits_for", ["a row", "the commit"])
def test_nothing_is_waited_for_while_the_slot_makes_nothing(waits_for: str) -> None:
    policy, buffer, outbox = pacing(1, flush_batch=10, flush_delay=HOUR)
    if waits_for == "a row":
        buffer.slot_waits = True
    else:
        outbox.slot_waits = True
    assert policy.flush_is_due()


def test_the_last_outcome_goes_before_the_slot_says_that_it_waits() -> None:
    policy, buffer, _ = pacing(1, flush_batch=10, flush_delay=HOUR)
    policy._slot.running = False
    assert policy.flush_is_due()
    buffer.put([object()])  # type: ignore[list-item]
    assert not policy.flush_is_due(), "it makes more"
