"""Memory and pipes that a supervisor shares with its children."""

from __future__ import annotations

import os
import select

from durable.runtime.shared import BUSY, IDLE, RESCAN, SUSPECT, Bell, Entered, SharedSeats


def test_seats_do_not_touch_each_other() -> None:
    seats = SharedSeats(3)
    for index in range(3):
        seat = seats.seat(index)
        seat.worker_id, seat.deadline, seat.state, seat.lost = index + 1, index + 0.5, BUSY, index
        seat.enter(2**62 + index, 7, 123.25)
    for index in range(3):
        seat = seats.seat(index)
        assert (seat.worker_id, seat.deadline, seat.state, seat.lost) == (index + 1, index + 0.5, BUSY, index)
        assert seat.entered == Entered(2**62 + index, 7)
        assert seat.entered_at == 123.25
    seats.seat(1).clear()
    assert (seats.seat(1).worker_id, seats.seat(1).deadline, seats.seat(1).entered) == (0, 0.0, None)
    assert seats.seat(0).worker_id == 1
    assert seats.seat(2).worker_id == 3


def test_leaving_empties_what_was_entered() -> None:
    seat = SharedSeats(1).seat(0)
    assert seat.entered is None
    seat.enter(5, 1, 0.0)
    seat.leave()
    assert seat.entered is None


def test_hints_add_up_and_are_taken_once() -> None:
    seat = SharedSeats(1).seat(0)
    seat.hint(RESCAN)
    seat.hint(SUSPECT)
    assert seat.take_hints() == RESCAN | SUSPECT
    assert seat.take_hints() == 0


def test_whether_the_database_is_up_belongs_to_no_seat() -> None:
    for count in (1, 511, 512, 1000):
        seats = SharedSeats(count)
        assert not seats.database_up
        seats.database_up = True
        assert seats.database_up
        assert seats.seat(count - 1).take_hints() == 0


def test_what_a_child_wrote_outlives_it() -> None:
    seats, bell = SharedSeats(2), Bell()
    pid = os.fork()
    if pid == 0:
        seats.seat(1).worker_id = 42
        seats.seat(1).state = IDLE
        seats.seat(1).enter(9, 2, 1.5)
        bell.ring()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (seats.seat(1).worker_id, seats.seat(1).entered) == (42, Entered(9, 2))
    assert seats.seat(0).worker_id == 0
    assert bell.silence()


def test_many_rings_are_one_and_never_block() -> None:
    bell = Bell()
    assert not bell.silence()
    for _ in range(200_000):
        bell.ring()
    poll = select.poll()
    poll.register(bell.reader, select.POLLIN)
    assert poll.poll(0)
    while bell.silence():
        pass
    assert not poll.poll(0)
