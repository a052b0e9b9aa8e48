"""Killing the worker process that runs a claim which is to be terminated: that very claim, and no other.

Which claim a process runs is in its seat, and changes at any moment; so the process is frozen first. Frozen, its main
thread can neither leave the step nor enter another: what the seat says then is so until it is let go or killed. The
kill is no more than that: the supervisor finds a dead child, the agent hands its rows back, and the row that was to be
terminated ends `cancelled` there.

A row that is buffered and not yet entered is nobody's seat: it is found as soon as it is entered.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from durable.runtime.link import Link
from durable.runtime.places import Place
from durable.runtime.shared import Bell, Entered, Seat, SharedSeats
from durable.storage import workers

log = logging.getLogger(__name__)

FREEZE_PATIENCE = 0.5
"""Seconds to wait until a process has stopped. One in an uninterruptible call may not in time: it is let go, and met
again at the next look."""

HUNG = 5.0
"""Seconds beyond a time limit in which a process of many slots gives the step up, if it moves."""


def terminate(seats: SharedSeats, bells: Sequence[Bell], link: Link) -> None:
    """Kill the children of this command whose claim is to be terminated. Asks nothing while none runs a step.

    A child of many slots, by its bell, is asked to give that step up, since its other steps are not to be killed.

    Raises psycopg.Error, link.Stopped.
    """
    running = {Entered(*step[:2]): index for index in range(seats.count) for step in seats.seat(index).running(0.0)}
    if not running:
        return
    for claim in link.run(workers.terminations([(entered.id, entered.token) for entered in running])):
        index = running[Entered(*claim)]
        seat = seats.seat(index)
        if seat.roster is not None:
            if seat.roster.ask(*claim):
                bells[index].ring()
            continue
        pid = seat.pid
        if kill_running(seat, Entered(*claim), os.getppid()):
            log.warning("worker process %d is killed: its instance is terminated", pid, extra={"instance": claim[0]})


def kill_hung(place: Place, seat: Seat, now: float) -> None:
    """Kill a process of many slots that has not given up a step long after its `time_limit`: it does not move."""
    assert seat.roster is not None, "it has many slots"
    overdue = [step for step in seat.roster.steps() if step.limit_at and now > step.limit_at + HUNG]
    if not overdue or not place.pid:
        return
    place.overdue = [(step.id, step.token) for step in overdue]
    ran = overdue[0].limit_at - overdue[0].at
    place.reason = f": it did not move, and its step ran longer than its time_limit of {ran:g} s"
    log.warning("worker process %d is killed%s", place.pid, place.reason, extra={"instance": overdue[0].id})
    os.kill(place.pid, signal.SIGKILL)


def kill_running(seat: Seat, claim: Entered, parent: int, limit_at: float | None = None) -> bool:
    """Kill the process in a seat if it runs that claim, and return whether it did; else it goes on.

    parent    whose child it must be: a pid that was given to another process meanwhile is left alone
    limit_at  and that very step of it, as its limit in the seat tells: an inline chain has one claim for all its steps
    """
    pid = seat.pid
    if not pid or seat.entered != claim:
        return False
    try:
        with _signals_to(pid) as send:
            # A child's seat is emptied before another is forked, so one that is a child and in its seat is the one.
            if _parent_of(pid) != parent or seat.pid != pid:
                return False
            send(signal.SIGSTOP)
            killed = False
            try:
                killed = _comes_to_rest(pid) and seat.pid == pid and seat.entered == claim
                killed = killed and limit_at in (None, seat.limit_at)
            finally:
                send(signal.SIGKILL if killed else signal.SIGCONT)
            return killed
    except ProcessLookupError:
        return False  # it ended by itself


@contextmanager
def _signals_to(pid: int) -> Iterator[Callable[[int], None]]:
    """Give what sends signals to a process, and where the kernel can tell, to no later one of the same pid."""
    handle = None
    if sys.platform == "linux":
        try:
            handle = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):  # an old kernel, or a container that forbids it
                raise
    try:
        yield partial(os.kill, pid) if handle is None else partial(signal.pidfd_send_signal, handle)
    finally:
        if handle is not None:
            os.close(handle)


def _comes_to_rest(pid: int) -> bool:
    """Wait until every thread has stopped; False when that takes too long."""
    if sys.platform != "linux":
        time.sleep(0.05)
        return True
    until = time.monotonic() + FREEZE_PATIENCE
    while not all(state in "tTXZ" for state in _states(pid)):
        if time.monotonic() > until:
            return False
        time.sleep(0.0005)
    return True


def _states(pid: int) -> list[str]:
    """The states of a process's threads; none when it is gone."""
    states = []
    with suppress(FileNotFoundError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread may end while we look
                states.append(_stat(thread)[0])
    return states


def _parent_of(pid: int) -> int:
    """Raises ProcessLookupError."""
    if sys.platform != "linux":
        return os.getppid()
    try:
        return int(_stat(Path(f"/proc/{pid}"))[1])
    except FileNotFoundError as error:
        raise ProcessLookupError from error


def _stat(entry: Path) -> list[str]:
    """State, parent and so on of a process or thread."""
    # Whoever names a process may name it in bytes that are no text: the kernel cuts names at fifteen of them.
    return (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
