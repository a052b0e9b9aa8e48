"""Django's database connections in workers: none crosses a fork, and none that was cut outlives a step.

Django closes connections that are broken or too old before and after each *request*. In a worker a step is the request:
`DjangoSteps` is the `around_step` manager that does it. Django binds connections to threads, so it must run in the
thread in which the step uses the ORM: for a plain step its own; for an `async def` step the thread of asgiref's
`sync_to_async`. By default that is one thread for all coroutines of a process, so that one step would close the
connection on which its neighbour iterates. Each step therefore borrows an asgiref thread of its own, as Django's ASGI
handler gives one to each request; threads and connections are used again.

Django is not imported here: an application that uses it has imported it.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections import deque
from typing import Any

from durable.outcomes import SoftTimeLimitExceeded

log = logging.getLogger(__name__)


def _is_configured() -> bool:
    conf = sys.modules.get("django.conf")
    return conf is not None and conf.settings.configured


def _opened() -> list[Any]:
    """Return this thread's Django connections; those not yet used are left out."""
    database = sys.modules.get("django.db")
    if database is None or not _is_configured():
        return []  # to ask would configure Django
    return database.connections.all(initialized_only=True)  # type: ignore[no-any-return]


def close_all() -> None:
    """Close this thread's Django connections and this process's pools of them, before a fork."""
    for connection in _opened():
        try:
            connection.close()
            if getattr(connection, "pool", None) is not None:
                connection.close_pool()
        except Exception:
            log.exception("Django's connection %r could not be closed before a fork", connection.alias)


def of_process() -> DjangoSteps | None:
    """Return the manager factory for steps of this process, or None where Django is not in use."""
    return DjangoSteps() if "django.db" in sys.modules or _is_configured() else None


class DjangoSteps:
    """The factory for `around_step`."""

    def __init__(self) -> None:
        self._sync = importlib.import_module("asgiref.sync")
        self._threads: deque[Any] = deque()
        """asgiref contexts that no step uses; of each, `asgiref` makes the thread when it is first needed."""

    def __call__(self, _context: Any) -> DjangoStep:
        return DjangoStep(self)

    def close_old(self) -> None:
        """Close this thread's connections that are broken, older than CONN_MAX_AGE or still in a transaction."""
        for connection in _opened():
            try:
                if connection.in_atomic_block:
                    log.warning("a step left a transaction of Django's %r open: rolled back", connection.alias)
                    connection.close()
                    connection.in_atomic_block = connection.closed_in_transaction = False
                connection.close_if_unusable_or_obsolete()
            except SoftTimeLimitExceeded:
                raise
            except Exception:
                log.exception("Django's connection %r could not be closed", connection.alias)

    async def borrow(self) -> Any:
        """Give the current step an asgiref thread; return what `give_back` takes."""
        thread = self._threads.pop() if self._threads else self._sync.ThreadSensitiveContext()
        token = self._sync.SyncToAsync.thread_sensitive_context.set(thread)
        try:
            await self._close_old_in(thread)
        except BaseException:
            self._end(thread, token)
            raise
        return thread, token

    async def give_back(self, borrowed: Any) -> None:
        """Take the thread of a step back."""
        thread, token = borrowed
        try:
            await self._close_old_in(thread)
        finally:
            self._end(thread, token)

    def _end(self, thread: Any, token: Any) -> None:
        self._sync.SyncToAsync.thread_sensitive_context.reset(token)
        self._threads.append(thread)

    async def _close_old_in(self, thread: Any) -> None:
        executor = self._sync.SyncToAsync.context_to_thread_executor.get(thread)
        if executor is not None:  # else it has run nothing, and has no connection
            await asyncio.get_running_loop().run_in_executor(executor, self.close_old)


class DjangoStep:
    """The manager of one step, plain or `async def`."""

    def __init__(self, steps: DjangoSteps) -> None:
        self._steps = steps
        self._borrowed: Any = None

    def __enter__(self) -> None:
        self._steps.close_old()

    def __exit__(self, *_: Any) -> None:
        self._steps.close_old()

    async def __aenter__(self) -> None:
        self._borrowed = await self._steps.borrow()

    async def __aexit__(self, *_: Any) -> None:
        await self._steps.give_back(self._borrowed)
