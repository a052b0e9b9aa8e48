"""`ctx.connection` of `async def` steps in a process with many slots.

A property can't await, and a loop that waited for a connection would wait for steps of its own. So a step that is known
to ask for its connection gets it before it begins. One that asks for the first time gets what is free; if nothing is,
it is run again (`StepAgain`), with a connection this time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from durable.instance import Claimed
from durable.runtime.step_transaction import StepAgain, StepConnections, StepTransaction

Aside = Callable[..., Awaitable[Any]]
"""Awaits a function that is run in a thread."""


class AsyncConnections:
    """Used on the loop's thread alone.

    count  at most so many transactions of async steps at once
    aside  runs what opens and ends them
    """

    def __init__(self, connections: StepConnections, count: int, aside: Aside) -> None:
        self._connections = connections
        self.aside = aside
        self._free = count
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._users: set[tuple[str, int, str]] = set()

    def is_asked_for(self, claimed: Claimed) -> bool:
        """Whether that step has asked for its connection before."""
        return bool(self._users) and (claimed.machine, claimed.machine_version, claimed.step) in self._users

    async def begin(self, claimed: Claimed) -> StepTransaction:
        """Open the transaction of a step that is about to begin; `release` it. Raises StepAgain."""
        if self._free:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it had just been its turn
                    self.release()
                raise
        try:
            transaction: StepTransaction = await self.aside(self._connections.begin, claimed, True)
        except BaseException:
            self.release()
            raise
        return transaction

    def begin_now(self, claimed: Claimed) -> StepTransaction:
        """Open the transaction of a step that runs; `release` it. Raises StepAgain when that would mean to wait."""
        self._users.add((claimed.machine, claimed.machine_version, claimed.step))
        if not self._free:
            raise StepAgain("no step connection is free; it gets one before it begins")
        self._free -= 1
        try:
            return self._connections.begin(claimed, True, wait=False)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """The transaction has ended: the longest waiting one is next."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # one whose step was cancelled while it waited has no use for it
                turn.set_result(None)
                return
        self._free += 1
