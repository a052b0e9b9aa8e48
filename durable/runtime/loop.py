"""The event loop of a process with many slots, as its other threads use it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from durable import forks
from durable.containment import is_contained
from durable.runtime.coroutines import CoroutineRunner, adopt, contained, leave, log_exit


class LoopRunner(CoroutineRunner):
    """Runs coroutines of any thread on the one loop, which runs in the main thread."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def disown(self) -> None:
        """In a child that user code forks: nothing runs on the loop any more."""
        if not self.loop.is_closed():
            leave(self.loop)

    def run(self, coroutine: Any) -> Any:
        """Return what the coroutine returns; raises what it raises. Not for the loop's own thread."""
        context = contextvars.copy_context()
        value, error = self.result(contained(lambda: coroutine), context)
        adopt(context)
        if error is not None:
            raise error
        return value

    def result(self, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context) -> Any:
        """Return what a coroutine of ours, which contains what user code raises, returns when run in a context."""
        result: Future[Any] = Future()

        def begin() -> None:
            asyncio.Task(coroutine, loop=self.loop, context=context).add_done_callback(end)

        def end(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                result.set_exception(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(task.result())

        self.loop.call_soon_threadsafe(begin)
        return result.result()

    def serve(self, until_over: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the loop, in the main thread, until a coroutine of ours has ended, whatever stops the loop before."""
        task = self.loop.create_task(until_over())
        task.add_done_callback(lambda _: self.loop.stop())
        while not task.done():
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                if forks.strayed:
                    forks.end(error)
                if not is_contained(error):
                    raise
                log_exit(error)
        task.result()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """End the loop, and what user code has left running on it."""
        self._loop = self.loop
        super().close(last)
