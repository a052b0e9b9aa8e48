"""A step that runs in one of many slots."""

from __future__ import annotations

from collections.abc import Callable

from durable.instance import Claimed


class Running:
    """One step.

    index      its place in the roster
    began      time.monotonic()
    limit      seconds of its time limit, None for none; limit_at: time.monotonic() from which it is beyond
    look       told the time now and then: it minds the soft limit
    interrupt  what may end it early
    done       its outcome was handed over; given_up: its outcome will not count
    """

    __slots__ = ("began", "claimed", "done", "given_up", "index", "interrupt", "limit", "limit_at", "look")

    def __init__(
        self,
        claimed: Claimed,
        index: int,
        began: float,
        limit: float | None,
        look: Callable[[float], None] | None,
        interrupt: Callable[[], object],
    ) -> None:
        self.claimed = claimed
        self.index = index
        self.began = began
        self.limit = limit
        self.limit_at = None if limit is None else began + limit
        self.look = look
        self.interrupt = interrupt
        self.done = False
        self.given_up = False
