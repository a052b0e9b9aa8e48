"""Which process of a queue claims again and again, and when it stops."""

from __future__ import annotations

import math

import pytest

from durable.runtime import lookout
from durable.runtime.lookout import LONGEST_PAUSE, ROUNDING, SHORTEST_PAUSE, Colleague, Lookout
from durable.runtime.shared import BUSY, IDLE, LOOK, Bell, SharedSeats


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Process:
    """A worker process of the queue, as its lookout sees it."""

    def __init__(self, seats: SharedSeats, index: int, clock: Clock) -> None:
        self.pid = 1000 + index
        self.seat, self.bell = seats.seat(index), Bell()
        self.seat.pid, self.seat.state = self.pid, IDLE
        self._seats, self._clock = seats, clock

    def lookout(self, *colleagues: Process, monkeypatch: pytest.MonkeyPatch) -> Lookout:
        monkeypatch.setattr(lookout.os, "getpid", lambda: self.pid)
        others = [Colleague(other.seat, other.bell) for other in colleagues]
        return Lookout(self._seats.traffic(0), others, self._clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def processes(clock: Clock) -> tuple[Process, Process]:
    seats = SharedSeats(2)
    return Process(seats, 0, clock), Process(seats, 1, clock)


@pytest.fixture
def pair(processes: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch) -> tuple[Lookout, Lookout]:
    first, second = processes
    return first.lookout(second, monkeypatch=monkeypatch), second.lookout(first, monkeypatch=monkeypatch)


def arrive(one: Lookout, clock: Clock, gap: float, rows: int = 50) -> None:
    """Have a process find a row every `gap` seconds, unannounced."""
    for _ in range(rows):
        clock.now += gap
        one.found(1)


def test_nobody_looks_before_a_row_was_found(pair: tuple[Lookout, Lookout], clock: Clock) -> None:
    pair[0].watch(clock())
    assert pair[0].at == math.inf
    assert not pair[0].expects_rows()


@pytest.mark.parametrize(
    ("gap", "pause"), [(0.0005, SHORTEST_PAUSE), (0.002, 0.0015), (0.004, 0.003), (0.02, LONGEST_PAUSE)]
)
def test_pauses_follow_the_gap(pair: tuple[Lookout, Lookout], clock: Clock, gap: float, pause: float) -> None:
    arrive(pair[0], clock, gap)
    assert pair[0].pause == pytest.approx(pause, rel=0.02)
    pair[0].watch(clock())
    assert pair[0].at == pytest.approx(clock() + pause - ROUNDING, abs=1e-4)


def test_rows_found_together_count_each(pair: tuple[Lookout, Lookout], clock: Clock) -> None:
    for _ in range(50):
        clock.now += 0.008
        pair[0].found(4)
    assert pair[0].pause == pytest.approx(0.0015, rel=0.02)


def test_lookout_sleeps_when_rows_stop(pair: tuple[Lookout, Lookout], clock: Clock) -> None:
    arrive(pair[0], clock, 0.004)
    pair[0].watch(clock())
    assert pair[0].at < math.inf
    clock.now += 4 * 0.004 + lookout.PATIENCE + 0.001
    pair[0].watch(clock())
    assert pair[0].at == math.inf


def test_only_one_process_looks(pair: tuple[Lookout, Lookout], clock: Clock) -> None:
    first, second = pair
    arrive(first, clock, 0.002)
    first.watch(clock())
    second.watch(clock())
    assert (first.is_covered(), second.is_covered()) == (False, True)
    assert first.at < math.inf == second.at


def test_absent_lookout_is_replaced(pair: tuple[Lookout, Lookout], clock: Clock) -> None:
    first, second = pair
    arrive(first, clock, 0.002)
    first.watch(clock())
    clock.now += first.pause + lookout.ABSENT_AFTER + 0.001
    second.watch(clock())
    assert second.at < math.inf
    assert first.is_covered()


def test_handing_over_wakes_a_sleeping_colleague(
    pair: tuple[Lookout, Lookout], processes: tuple[Process, Process], clock: Clock
) -> None:
    (first, second), (_, other) = pair, processes
    arrive(first, clock, 0.002)
    first.watch(clock())
    assert first.hand_over()
    assert first.at == math.inf
    assert other.bell.silence()
    assert other.seat.take_hints() == LOOK
    second.take_over()
    assert second.at == pytest.approx(clock() + second.pause - ROUNDING)
    assert first.is_covered()


@pytest.mark.parametrize("hindrance", ["busy", "paused", "leaves", "gone"])
def test_a_colleague_that_cannot_claim_is_not_asked(
    pair: tuple[Lookout, Lookout], processes: tuple[Process, Process], clock: Clock, hindrance: str
) -> None:
    seat = processes[1].seat
    if hindrance == "busy":
        seat.state = BUSY
    elif hindrance == "paused":
        seat.paused = True
    elif hindrance == "leaves":
        seat.leaves = True
    else:
        seat.pid = 0
    arrive(pair[0], clock, 0.002)
    pair[0].watch(clock())
    assert not pair[0].hand_over()
    assert pair[0].at < math.inf, "it stays the lookout"
    assert not processes[1].bell.silence()


def test_a_look_is_due_once(pair: tuple[Lookout, Lookout], clock: Clock) -> None:
    arrive(pair[0], clock, 0.002)
    pair[0].watch(clock())
    assert not pair[0].is_due()
    clock.now = pair[0].at
    assert pair[0].is_due()
    assert not pair[0].is_due()
