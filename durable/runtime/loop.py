"""The event loop of a process with many slots, as its other threads use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from durable.runtime.coroutines import CoroutineRunner


class LoopRunner(CoroutineRunner):
    """Runs coroutines of any thread on the one loop, which runs in the main thread."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def run(self, coroutine: Any) -> Any:
        """Return what the coroutine returns; raises what it raises. Not for the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """End the loop, and what user code has left running on it."""
        self._loop = self.loop
        super().close(last)
