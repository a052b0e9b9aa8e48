"""Stamps: a task that says when it starts never waits for who reads it."""

from __future__ import annotations

import queue
import time

import pytest

from benchmarks import stamps


def test_a_sender_never_waits_for_the_stamps_to_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "_sender", None)
    with stamps.stamps() as place:
        for name, value in place.environment.items():
            monkeypatch.setenv(name, value)
        for _ in range(100):  # the kernel keeps ten
            stamps.stamp(time.monotonic_ns() - 2_000_000)
        assert all(2.0 <= wait < 1000.0 for wait in place.take(100))
        with pytest.raises(queue.Empty):
            place.take(1, seconds=0.0)
        assert stamps._sender is not None
        stamps._sender.close()
