"""Runs `async def` user code of a prefork slot: one event loop per process, made when first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

PATIENCE = 1.0
"""Seconds that what is left running on a loop gets to end when it is cancelled."""


class CoroutineRunner:
    """Runs coroutines to their end on one loop, so that what user code keeps on it stays usable."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Any) -> Any:
        """Return what the coroutine returns; raises what it raises."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(coroutine)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """End the loop, and what user code has left running on it; `last` is run on it before, if there is a loop."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        if last is not None:
            loop.run_until_complete(last())
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=PATIENCE))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()
