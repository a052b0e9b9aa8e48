"""Runs `async def` user code of a prefork slot: one event loop per process, made when first needed.

User code runs in a task of its own, and nothing but that task's outcome comes out: an exit in another task, or a loop
that is stopped, does not end the run. Tasks that a step leaves running are cancelled when it ends. The loop is never
the thread's current one, so that plain steps neither see nor close it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import select
import selectors
import sys
import weakref
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from functools import partial
from typing import Any

from durable import forks, interruption
from durable.containment import is_contained
from durable.context import current

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that tasks get to end when they are cancelled."""

Tasks = weakref.WeakSet[asyncio.Task[Any]]
_made: ContextVar[Tasks | None] = ContextVar("durable_made", default=None)
"""Takes in the tasks that are made in this context."""
_UNSET = object()


@interruption.transparent
async def contained(call: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[Any, BaseException | None]:
    """Return what a coroutine returns, or what it raises: a loop that runs this task is not ended by SystemExit."""
    try:
        value = await call()
    except BaseException as error:
        if forks.strayed:
            forks.end(error)
        return None, error
    if forks.strayed:
        forks.end()
    return value, None


async def outlast(future: asyncio.Future[Any]) -> Any:
    """Return the result of a future, or raise its exception; a cancellation of the waiting task is not heeded."""
    while not future.done():
        waiting = asyncio.get_running_loop().create_future()
        wake = partial(_wake, waiting)
        future.add_done_callback(wake)
        try:
            await waiting
        except asyncio.CancelledError:  # by a step that cancels every task of the loop
            future.remove_done_callback(wake)
    return future.result()


def _wake(waiting: asyncio.Future[None], _: object) -> None:
    if not waiting.done():
        waiting.set_result(None)


def adopt(context: contextvars.Context) -> None:
    """Set in the current context what was set in another one that began as a copy of it."""
    for variable, value in context.items():
        if variable is not _made and variable.get(_UNSET) is not value:
            variable.set(value)


def noting_tasks(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """Have a loop note the tasks that user code makes on it; return the loop."""

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        context = options.get("context")
        made = _made.get() if context is None else context.get(_made)
        if made is not None:
            made.add(task)
        return task

    loop.set_task_factory(make)
    return loop


class CurrentLoop:
    """The event loop that is current in a thread (`asyncio.get_event_loop`) while no step runs there."""

    def __init__(self) -> None:
        # asyncio tells of it only by making a loop where there is none; a policy that keeps it elsewhere is left alone.
        self._local: Any = getattr(asyncio.get_event_loop_policy(), "_local", None)

    def mend(self) -> None:
        """Forget a loop that a step has made current and closed, as `asyncio.run` does, so that the next can make one.

        One that is open stays: plain steps may run what they keep at module level on it, one after the other.
        """
        local = self._local
        if local is not None:
            loop = local._loop
            if local._set_called if loop is None else loop.is_closed():
                local._loop, local._set_called = None, False


class CoroutineRunner:
    """Runs coroutines to their end on one loop, so that what user code keeps on it stays usable."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._made: Tasks = weakref.WeakSet()
        forks.shared(self)

    def disown(self) -> None:
        """In a child that user code forks: nothing runs on the loop any more."""
        if self._loop is not None:
            leave(self._loop)

    def run(self, coroutine: Any) -> Any:
        """Return what the coroutine returns; raises what it raises."""
        loop = self._loop
        if loop is None or loop.is_closed() or loop.is_running():
            loop = self._loop = noting_tasks(asyncio.new_event_loop())
        context = contextvars.copy_context()
        context.run(_made.set, self._made)
        task = asyncio.Task(contained(lambda: coroutine), loop=loop, context=context)
        self._run_until_done(loop, task)
        adopt(context)
        if self._made:
            self._end_left(loop)
        value, error = task.result()
        if error is not None:
            raise error
        return value

    def _run_until_done(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        """Run a loop until a task is done, whoever stops the loop and whatever else raises on it."""
        task.add_done_callback(lambda _: loop.stop())
        while not task.done():
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                if forks.strayed:
                    forks.end(error)
                if not is_contained(error):
                    self._end_tasks(loop, [task, *self._made])
                    raise
                log_exit(error)

    def _end_left(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the tasks that a step has left running. If they go on all the same, the loop is replaced."""
        left = [task for task in self._made if not task.done()]
        self._made = weakref.WeakSet()
        if not left:
            return
        log_left(left)
        if not self._end_tasks(loop, left):
            log.warning("tasks go on after their cancellation: later steps get a new event loop")
            self._loop = None
            loop.close()

    def _end_tasks(self, loop: asyncio.AbstractEventLoop, tasks: list[asyncio.Task[Any]]) -> bool:
        """Cancel tasks and wait for them; return whether they have ended in time."""
        for task in tasks:
            task.cancel()
        waiting = asyncio.Task(asyncio.wait(tasks, timeout=PATIENCE), loop=loop)
        self._run_until_done(loop, waiting)
        return not waiting.result()[1]

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """End the loop, and what user code has left running on it; `last` is run on it before, if there is a loop."""
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed():
            return
        if last is not None:
            loop.run_until_complete(last())
        left = asyncio.all_tasks(loop)
        if left:
            self._end_tasks(loop, list(left))
        self._run_until_done(loop, loop.create_task(loop.shutdown_asyncgens()))
        loop.close()


def log_exit(error: BaseException) -> None:
    """Log that a task, which may belong to no step any more, has tried to end the process."""
    log.warning("%s in a task or a callback of the event loop; the process goes on", type(error).__name__)


def log_left(tasks: list[asyncio.Task[Any]]) -> None:
    """Log that a step has left tasks running, which are cancelled now."""
    context = current()
    step = "a step" if context is None else f"instance {context.id}, step {context.step!r} of {context.name},"
    names = ", ".join(task.get_name() for task in tasks[:5])
    log.warning("%s left %d asyncio tasks running; they are cancelled: %s", step, len(tasks), names)


def leave(loop: asyncio.AbstractEventLoop) -> None:
    """In a child that user code forks: have a loop run nothing more, and share nothing with the parent's.

    Other tasks of the loop are steps of other instances. A child that waits on the loop would run them.
    """
    for handle in [*getattr(loop, "_ready", ()), *getattr(loop, "_scheduled", ())]:
        handle.cancel()
    loop.call_soon(forks.end, RuntimeError("a child forked in an async step has no event loop: it can't await"))
    selector = getattr(loop, "_selector", None)
    if sys.platform == "linux" and isinstance(selector, selectors.EpollSelector):
        # A file descriptor that is closed here would be taken off the parent's list too: the two share it.
        with select.epoll() as fresh:
            os.dup2(fresh.fileno(), selector.fileno(), inheritable=False)
    forks.silence(*[end.fileno() for name in ("_ssock", "_csock") if (end := getattr(loop, name, None)) is not None])
    asyncio.set_event_loop(None)
