"""Killing the process that runs a claim, and only while it runs that very claim."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from durable.embedded.processes import is_server
from durable.runtime import termination
from durable.runtime.process import _PR_SET_NAME, name_process
from durable.runtime.shared import Entered, Seat, SharedSeats
from durable.runtime.termination import kill_running
from tests.fix_db import wait_until

ME = os.getpid()
NO_TEXT = ("\N{CYRILLIC SMALL LETTER O}" * 8).encode()
"""The kernel cuts a process's name at fifteen bytes: here within a letter."""


@pytest.fixture
def seat() -> Seat:
    return SharedSeats(1).seat(0)


@pytest.fixture
def child(seat: Seat) -> Iterator[Callable[[Callable[[], object]], int]]:
    """Fork a child that sits in the seat and does something; killed when the test ends."""
    pids: list[int] = []

    def fork(body: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                body()
            finally:
                os._exit(0)
        pids.append(pid)
        seat.pid = pid
        return pid

    yield fork
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def state(pid: int) -> str:
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]


def counts(seat: Seat, pid: int) -> None:
    """Whether the child goes on: it counts in `worker_id`."""
    before = seat.worker_id
    wait_until(lambda: seat.worker_id > before, what="the child to go on")
    assert state(pid) in "RS"


def test_the_process_that_runs_the_claim_is_killed(seat: Seat, child: Callable[..., int]) -> None:
    def run() -> None:
        seat.enter(5, 2, 0.0)
        time.sleep(600)

    pid = child(run)
    wait_until(lambda: seat.entered is not None)
    assert kill_running(seat, Entered(5, 2), ME)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_one_that_runs_another_claim_goes_on(seat: Seat, child: Callable[..., int]) -> None:
    def run() -> None:
        seat.enter(5, 2, 0.0)
        while True:
            seat.worker_id += 1

    pid = child(run)
    wait_until(lambda: seat.worker_id)
    for claim in (Entered(5, 1), Entered(6, 2)):
        assert not kill_running(seat, claim, ME)
        counts(seat, pid)
    seat.enter(5, 3, 0.0)
    assert not kill_running(seat, Entered(5, 2), ME)
    counts(seat, pid)
    seat.leave()
    assert not kill_running(seat, Entered(5, 3), ME)
    counts(seat, pid)


def test_one_that_goes_on_to_another_claim_until_it_is_frozen_is_let_go(
    seat: Seat, child: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hold point is between the first look and the freeze, where a real child moves on by itself."""

    def run() -> None:
        seat.enter(5, 2, 0.0)
        while True:
            seat.worker_id += 1

    pid = child(run)
    wait_until(lambda: seat.worker_id)
    frozen: list[str] = []
    rest = termination._comes_to_rest

    def moving_on(pid: int) -> bool:
        at_rest = rest(pid)
        frozen.append(state(pid))
        seat.enter(6, 1, 0.0)
        return at_rest

    monkeypatch.setattr(termination, "_comes_to_rest", moving_on)
    assert not kill_running(seat, Entered(5, 2), ME)
    assert frozen == ["T"]
    counts(seat, pid)


def test_the_next_step_of_an_inline_chain_is_not_killed_for_the_one_before(
    seat: Seat, child: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        seat.enter(5, 2, 0.0, 10.0)
        while True:
            seat.worker_id += 1

    pid = child(run)
    wait_until(lambda: seat.worker_id)
    rest = termination._comes_to_rest

    def moving_on(pid: int) -> bool:
        at_rest = rest(pid)
        seat.leave()
        seat.enter(5, 2, 10.1, 20.1)
        return at_rest

    monkeypatch.setattr(termination, "_comes_to_rest", moving_on)
    assert not kill_running(seat, Entered(5, 2), ME, 10.0)
    counts(seat, pid)
    assert kill_running(seat, Entered(5, 2), ME, 20.1)


def test_a_child_that_changes_claims_all_the_time_is_only_ever_killed_in_the_right_one(
    seat: Seat, child: Callable[..., int]
) -> None:
    """What the seat says once its child is dead is what it ran."""

    def run() -> None:
        n = 0
        while True:
            n += 1
            seat.leave()
            seat.enter(5, n % 7 + 1, 0.0)

    killed = 0
    for token in range(1, 8):
        pid = child(run)
        until = time.monotonic() + 10
        while not kill_running(seat, Entered(5, token), ME):
            assert time.monotonic() < until, "it passes that claim thousands of times a second"
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert seat.entered == Entered(5, token)
        killed += 1
    assert killed == 7


def test_a_pid_that_is_not_a_child_of_the_command_is_left_alone(seat: Seat) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        seat.pid = stranger.pid
        seat.enter(5, 2, 0.0)
        assert not kill_running(seat, Entered(5, 2), parent=1)
        assert state(stranger.pid) in "RSD"
    finally:
        stranger.communicate(b"\n")
    assert stranger.returncode == 0
    assert not kill_running(seat, Entered(5, 2), ME), "gone by now"
    seat.clear()
    seat.enter(5, 2, 0.0)
    assert not kill_running(seat, Entered(5, 2), ME), "nobody sits there"


def test_where_the_kernel_has_no_handles_the_pid_does(
    seat: Seat, child: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)

    def run() -> None:
        seat.enter(5, 2, 0.0)
        time.sleep(600)

    pid = child(run)
    wait_until(lambda: seat.entered is not None)
    assert kill_running(seat, Entered(5, 2), ME)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_one_whose_name_is_no_text_is_killed_too(seat: Seat, child: Callable[..., int]) -> None:
    def run() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, NO_TEXT, 0, 0, 0)
        seat.enter(5, 2, 0.0)
        time.sleep(600)

    pid = child(run)
    wait_until(lambda: seat.entered is not None)
    with pytest.raises(UnicodeDecodeError):
        Path(f"/proc/{pid}/stat").read_text()
    assert kill_running(seat, Entered(5, 2), ME)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_a_process_is_named_in_whole_letters_and_one_that_is_not_is_no_server(
    seat: Seat, child: Callable[..., int], tmp_path: Path
) -> None:
    def run() -> None:
        name_process("durable:\N{CYRILLIC SMALL LETTER O}" + "\N{CYRILLIC SMALL LETTER O}" * 8)
        seat.worker_id = 1
        wait_until(lambda: seat.worker_id == 2)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, NO_TEXT, 0, 0, 0)
        seat.worker_id = 3
        time.sleep(600)

    pid = child(run)
    wait_until(lambda: seat.worker_id == 1)
    assert Path(f"/proc/{pid}/comm").read_text() == "durable:" + "\N{CYRILLIC SMALL LETTER O}" * 3 + "\n"
    seat.worker_id = 2
    wait_until(lambda: seat.worker_id == 3)
    assert not is_server(pid, tmp_path)
