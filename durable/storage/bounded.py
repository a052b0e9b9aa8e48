"""Connections on which every wait for the server ends: psycopg's own, with a bound.

A connection can stay open and never answer again, for example behind a proxy that is stuck or a balancer whose host is
gone: TCP acknowledges what is sent, so no keepalive fires. A wait that exceeds its bound closes the connection and
raises NoAnswerError. What the statement did is unknown then, as after any connection that was lost.

The bound costs less than a microsecond per wait: psycopg wakes an idle wait every 0.1 s, and the clock is read then.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator
from typing import Any, NoReturn, TypeVar

import psycopg

from durable import interruption

C = TypeVar("C", bound=psycopg.Connection[Any])
Waiting = Generator[Any, Any, Any]

_opening = threading.local()


class NoAnswerError(psycopg.OperationalError):
    """The server did not answer within the bound; the connection is closed."""


class _Bound:
    """What both kinds of connection share.

    Attributes:
        patience: Seconds that one wait may take.
        deadline: `time.monotonic()` by which every wait must end. It may be changed while a wait is under way, from
            another thread or from a signal handler.
        lock_timeout: Seconds that statements wait for a lock, to be set in each transaction because no session keeps it
            (behind a pooler); 0 when nothing is to be set.
        opened_at: `time.monotonic()` when a pool opened it.
    """

    patience: float = math.inf
    deadline: float = math.inf
    lock_timeout: float = 0.0
    opened_at: float = 0.0
    pgconn: Any

    def _expire(self, began: float) -> NoReturn:
        self.pgconn.finish()
        waited = time.monotonic() - began
        raise NoAnswerError(f"the server did not answer within {waited:.2g} s; the connection is closed")

    @interruption.transparent
    def _bounded(self, waiting: Waiting) -> Waiting:
        """Pass psycopg's generator on, and check the clock whenever it has to wait again."""
        began = time.monotonic()
        until = began + self.patience
        try:
            state = next(waiting)
            while True:
                ready = yield state
                state = waiting.send(ready)
                if time.monotonic() >= min(until, self.deadline):
                    self._expire(began)
        except StopIteration as stop:
            return stop.value


class BoundedConnection(psycopg.Connection[Any], _Bound):
    """A sync connection with bounded waits; see `open_bounded`."""

    @interruption.transparent
    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._bounded(gen), *args, **kwargs)

    @classmethod
    def _connect_gen(cls, *args: Any, **kwargs: Any) -> Any:
        # psycopg bounds each attempt, and makes one per address of each host; this bounds them all together.
        return _attempt(super()._connect_gen(*args, **kwargs), getattr(_opening, "until", math.inf))


class AsyncBoundedConnection(psycopg.AsyncConnection[Any], _Bound):
    """An async connection with bounded waits. Bound its `connect` by `asyncio.timeout`."""

    @interruption.transparent
    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().wait(self._bounded(gen), *args, **kwargs)


def open_bounded(kind: type[C], dsn: str, until: float = math.inf, **kwargs: Any) -> C:
    """Connect, all attempts together until `time.monotonic()` says `until`.

    Raises:
        psycopg.OperationalError: No host let us in, or none did in time.
    """
    _opening.until = until
    try:
        return kind.connect(dsn, **kwargs)
    finally:
        _opening.until = math.inf


def hurry(until: float) -> None:
    """Let an attempt to connect that this thread is making end by then; for a signal handler."""
    _opening.until = until


def _attempt(attempt: Waiting, until: float) -> Waiting:
    began = time.monotonic()
    try:
        state = next(attempt)
        while True:
            if time.monotonic() >= min(until, getattr(_opening, "until", math.inf)):
                raise NoAnswerError(f"connection timeout: no answer within {time.monotonic() - began:.2g} s")
            ready = yield state
            state = attempt.send(ready)
    except StopIteration as stop:
        return stop.value
