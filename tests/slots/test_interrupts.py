"""Exceptions that are raised in a thread from outside: in user code, once, and never after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from durable.outcomes import SoftTimeLimitExceeded
from durable.runtime.interrupts import HardTimeLimitExceeded, Interrupter
from tests.fix_db import wait_until


def spin() -> None:
    while True:
        time.sleep(0.001)


def in_thread(body: Callable[[Interrupter], Any], outside: Callable[[Interrupter], None]) -> Any:
    """What `body` returns in a thread that has an interrupter, while `outside` runs here."""
    interrupters: list[Interrupter] = []

    def run() -> Any:
        interrupters.append(Interrupter())
        return body(interrupters[0])

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(run)
        wait_until(lambda: interrupters)
        outside(interrupters[0])
        return future.result(20)


def look_until_over(interrupter: Interrupter) -> None:
    wait_until(lambda: interrupter.look(time.monotonic()) or (interrupter._soft_at is None and interrupter._seconds))


def test_a_soft_limit_is_raised_once_and_tells_its_seconds() -> None:
    def body(interrupter: Interrupter) -> tuple[float | None, str]:
        def step() -> tuple[float | None, str]:
            try:
                spin()
            except SoftTimeLimitExceeded as limit:
                time.sleep(0.05)  # cleaning up is not interrupted
                return limit.seconds, type(limit).__name__
            raise AssertionError

        found: tuple[float | None, str] = interrupter.run(step, 0.01, time.monotonic())
        return found

    assert in_thread(body, look_until_over) == (0.01, "SoftTimeLimitExceeded")


def test_what_is_given_up_is_not_caught_as_an_exception() -> None:
    def body(interrupter: Interrupter) -> str:
        def step() -> None:
            while True:
                try:
                    spin()
                except Exception:
                    raise AssertionError from None

        try:
            interrupter.run(step, None, time.monotonic())
        except HardTimeLimitExceeded:
            return "ended"
        raise AssertionError

    def outside(interrupter: Interrupter) -> None:
        wait_until(lambda: interrupter._open)
        interrupter.give_up()

    assert in_thread(body, outside) == "ended"


def test_nothing_is_raised_between_steps() -> None:
    def body(interrupter: Interrupter) -> list[int]:
        found = [interrupter.run(lambda n=n: n, None, time.monotonic()) for n in range(3)]
        interrupter.give_up()
        interrupter.look(time.monotonic() + 60)
        return found + [interrupter.run(lambda n=n: n, 60.0, time.monotonic()) for n in range(3)]

    assert in_thread(body, lambda _: None) == [0, 1, 2, 0, 1, 2]


def test_steps_that_end_while_they_are_given_up_end_one_way_or_the_other_and_leave_nothing_behind() -> None:
    over: list[bool] = []

    def body(interrupter: Interrupter) -> int:
        ended = 0
        try:
            for n in range(3000):
                try:
                    assert interrupter.run(lambda n=n: n, None, time.monotonic()) == n
                    ended += 1
                except HardTimeLimitExceeded:
                    pass
                assert not interrupter._open
        finally:
            over.append(True)
        return ended

    def outside(interrupter: Interrupter) -> None:
        while not over:
            interrupter.give_up()

    assert 0 <= in_thread(body, outside) <= 3000


def test_an_interruption_that_comes_inside_of_the_runtime_comes_after_it() -> None:
    kept: list[str] = []

    def body(interrupter: Interrupter) -> str:
        def begin() -> None:
            wait_until(lambda: interrupter._note is not None)
            for _ in range(1000):
                time.sleep(0)
            kept.append("begun")

        def step() -> str:
            try:
                interrupter.undisturbed(begin)
            except HardTimeLimitExceeded:
                return "after"
            raise AssertionError

        return str(interrupter.run(step, None, time.monotonic()))

    def outside(interrupter: Interrupter) -> None:
        wait_until(lambda: interrupter._puts_off)
        interrupter.give_up()

    assert in_thread(body, outside) == "after"
    assert kept == ["begun"]


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_what_user_code_raises_comes_out(seconds: float | None) -> None:
    def body(interrupter: Interrupter) -> None:
        def step() -> None:
            raise KeyError("x")

        interrupter.run(step, seconds, time.monotonic())

    with pytest.raises(KeyError):
        in_thread(body, lambda _: None)
