"""Many slots in one worker process: `durable worker -P threads` and `-P asyncio`.

The main thread is an event loop. `async def` steps run on it, each as a task; plain steps run in threads:

    threads   a thread per slot takes rows; for an `async def` step it waits until the loop has run it
    asyncio   the loop takes rows; plain steps wait for one of a few threads

What each slot is stepping is in `_running` and in the roster that the supervisor and the agent read. A step that is
given up, for its time limit or a cancel that terminates, leaves both at once, and the engine takes its row from us; its
slot comes free when the step ends, and what it returns then is stale. Nobody's neighbour is touched.

Locks: `_lock` guards `_running`, `_free` and what becomes of a step (done or given up: one of them, once).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from durable import forks
from durable.app import Durable
from durable.instance import Claimed
from durable.runtime import reporting
from durable.runtime.async_connections import AsyncConnections
from durable.runtime.async_step import AsyncExecutor, Execution
from durable.runtime.backoff import Backoff
from durable.runtime.buffer import Outbox
from durable.runtime.coroutines import adopt, outlast
from durable.runtime.executor import Executor, is_async
from durable.runtime.interrupts import Interrupter, ThreadLimits
from durable.runtime.loop import LoopRunner
from durable.runtime.roster import Roster
from durable.runtime.running import Running
from durable.runtime.shared import Seat
from durable.runtime.shared_buffer import SharedBuffer
from durable.runtime.slots import THREADS
from durable.runtime.step_transaction import StepAgain, StepConnections
from durable.storage.claims import Commit

log = logging.getLogger(__name__)

LEASE_LOOK = 0.05
ASIDE = 8
"""Threads for what must not wait on the loop."""
STEP_CONNECTIONS = 4


def plain_threads(kind: str, slots: int) -> int:
    """How many threads run plain steps."""
    return slots if kind == THREADS else min(slots, max(8, (os.cpu_count() or 1) + 4))


class ManySlots:
    """Runs steps.

    owns      whether a claimed row is still this process's
    stopping  whether the process was asked to stop
    """

    def __init__(
        self,
        app: Durable,
        kind: str,
        buffer: SharedBuffer,
        outbox: Outbox,
        seat: Seat,
        connections: Callable[[LoopRunner], StepConnections],
        owns: Callable[[Claimed], bool],
        stopping: Callable[[], bool],
    ) -> None:
        assert seat.roster is not None, "made with the seats"
        self._app = app
        self._kind = kind
        self._buffer = buffer
        self._outbox = outbox
        self._seat = seat
        self._roster: Roster = seat.roster
        self._owns = owns
        self._stopping = stopping
        self._variables = contextvars.copy_context()
        self._coroutines = LoopRunner()
        self._loop = self._coroutines.loop
        self.step_connections = connections(self._coroutines)
        self._limits = ThreadLimits(time.monotonic)
        self._executor = Executor(app, self._coroutines, self.step_connections.begin, self._limits)
        most = app.conf.step_connections or STEP_CONNECTIONS
        self._aside_threads = ThreadPoolExecutor(ASIDE, "durable-aside")
        # Their own, so that those who wait for a connection never keep those from ending who have one.
        self._connection_threads = ThreadPoolExecutor(2 * most, "durable-connections")
        self._async_connections = AsyncConnections(self.step_connections, most, self._aside_connections)
        self._async_executor = AsyncExecutor(app, self._executor, self._async_connections, self._aside)
        self.time_limits = self._executor.time_limits
        self._lock = threading.Lock()
        self._free = deque(range(buffer.slots))
        self._running: dict[int, Running] = {}
        self._plain: SimpleQueue[Claimed | None] = SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._closed = False
        self.returned: deque[Claimed] = deque()
        """Rows that were taken and not begun, for the engine to give back."""
        buffer.on_rows = self._rows_came
        self.mean_step: float | None = None
        self.runs_suspects = False
        self.worn: Callable[[], bool] | None = None
        """Asked after each step: whether the process is to be replaced. It has asked for that then."""
        self.given_up = 0
        """Slots that are taken by steps that were given up."""
        self.on_step: Callable[[], None] | None = None
        """Called when a step begins."""

    # What the engine asks

    @property
    def count(self) -> int:
        """How many slots may be used at the moment."""
        return self._buffer.most

    @property
    def running(self) -> int:
        """How many steps run that have not been given up."""
        return len(self._running)

    @property
    def ended(self) -> bool:
        """Whether no more rows will come and no step runs whose outcome counts."""
        return self._buffer.closed and not self._running and self._buffer.taken <= self.given_up

    @property
    def began(self) -> float:
        """time.monotonic() since when rows in the buffer have not moved."""
        return self._buffer.moved_at

    def expect(self, seconds: float) -> None:
        """Engine: rows have waited that long for a slot."""
        self.mean_step = max(self.mean_step or 0.0, seconds)

    def steps(self) -> list[Running]:
        """What runs at the moment."""
        with self._lock:
            return list(self._running.values())

    # The main thread

    def run(self) -> None:
        """Run steps until the buffer is closed."""
        self._variables = contextvars.copy_context()
        self._executor.take_variables()
        body = self._serve if self._kind == THREADS else self._serve_plain
        for number in range(plain_threads(self._kind, self._buffer.slots)):
            # Daemons: one that is stuck in a step does not keep the process.
            thread = threading.Thread(target=self._guarded, args=(body,), name=f"durable-slot-{number}", daemon=True)
            thread.start()
        forks.contained(self._coroutines.serve, self._until_over)
        self._closed = True
        self.close()

    async def _until_over(self) -> None:
        while not self.ended:
            with suppress(asyncio.CancelledError):  # by a step that cancels every task of the loop
                await self._over.wait()
            self._over.clear()

    def _rows_came(self) -> None:
        if self._kind != THREADS:
            self.tell_loop(self._pump)
        if self._buffer.closed:
            self.tell_loop(self._over.set)

    def tell_loop(self, callback: Callable[[], object]) -> None:
        """Any thread: have the loop call something, unless it has ended."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def close(self) -> None:
        """End what steps have left running on the loop."""
        self._coroutines.close()

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            forks.contained(body)
        except BaseException as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if self._closed:
            return  # a step that was given up, and ends with the loop
        log.critical("a slot failed", exc_info=error)
        os._exit(70)

    # Slots that are threads

    def _serve(self) -> None:
        """threads: take rows, run them one after another."""
        interrupter = self._limits.begin_thread()
        while (claimed := self._buffer.take()) is not None:
            try:
                if is_async(self._app, claimed):
                    variables = self._variables.copy()
                    self._coroutines.result(self._step_async(claimed, variables), variables)
                else:
                    self._step_plain(claimed, interrupter)
            finally:
                self._slot_is_free()

    def _serve_plain(self) -> None:
        """asyncio: run the plain steps that the loop has taken."""
        interrupter = self._limits.begin_thread()
        while (claimed := self._plain.get()) is not None:
            try:
                if self._stopping() or self._seat.paused:
                    self.returned.append(claimed)  # it has waited for this thread: it does not begin any more
                else:
                    self._step_plain(claimed, interrupter)
            finally:
                self._slot_is_free()
                self.tell_loop(self._pump)

    def _step_plain(self, claimed: Claimed, interrupter: Interrupter) -> None:
        if not self._has_lease(claimed):
            return
        step = self._enter(claimed, interrupter.look, interrupter.give_up)
        commit: Commit | None = None
        backoff = Backoff(first=0.02, most=1.0)
        while commit is None:
            try:
                commit = self._executor.execute(claimed)
            except StepAgain as reason:
                if not self._may_run_again(step, reason):
                    break
                time.sleep(backoff.next())
                if not self._has_lease(claimed) or not self._rearm(step):
                    break
        self._leave(step, commit)  # not if anything else was raised: the process ends, and this step is charged

    def _has_lease(self, claimed: Claimed) -> bool:
        """Wait for the lease; False when the row is not ours any more."""
        while time.monotonic() >= self._seat.deadline and self._owns(claimed):
            time.sleep(LEASE_LOOK)
        return self._owns(claimed)

    # Slots that are tasks on the loop

    def _pump(self) -> None:
        """asyncio: take rows for the slots that are free."""
        while (claimed := self._buffer.take_now()) is not None:
            if is_async(self._app, claimed):
                variables = self._variables.copy()
                task = asyncio.Task(self._serve_async(claimed, variables), loop=self._loop, context=variables)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                self._plain.put(claimed)

    async def _serve_async(self, claimed: Claimed, variables: contextvars.Context) -> None:
        try:
            await self._step_async(claimed, variables)
        except BaseException as error:
            self._failed(error)
        finally:
            self._slot_is_free()
            self._pump()

    async def _step_async(self, claimed: Claimed, variables: contextvars.Context) -> None:
        prepared = await self._prepared(claimed, variables)
        if prepared is None:
            return
        execution: Execution = prepared

        def cancel() -> None:
            if execution.task is not None:
                execution.task.cancel()

        step = self._enter(claimed, None, lambda: self.tell_loop(cancel))
        commit: Commit | None = None
        backoff = Backoff(first=0.02, most=1.0)
        while commit is None:
            try:
                commit = await self._async_executor.execute(execution)
            except StepAgain as reason:
                if not self._may_run_again(step, reason):
                    break
                await _sleep(backoff.next())
                again = await self._prepared(claimed, variables)
                if again is None or not self._rearm(step):
                    await self._async_executor.discard(again)
                    break
                execution = again
        self._leave(step, commit)  # not if anything else was raised: the process ends, and this step is charged

    async def _prepared(self, claimed: Claimed, variables: contextvars.Context) -> Execution | None:
        """Wait for the lease, and for the connection of a step that will ask for one; None: it is not ours any more."""
        backoff = Backoff(first=0.02, most=1.0)
        while time.monotonic() >= self._seat.deadline and self._owns(claimed):
            await _sleep(LEASE_LOOK)
        while self._owns(claimed):
            if not self._async_connections.is_asked_for(claimed):
                return Execution(claimed, variables)
            try:
                return Execution(claimed, variables, await self._async_connections.begin(claimed))
            except (StepAgain, asyncio.CancelledError) as reason:
                log.info("the step waits: %s", reason, extra=reporting.fields(claimed))
                if self._stopping():
                    return None
                await _sleep(backoff.next())
        return None

    async def _aside(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._in_thread(self._aside_threads, forks.contained, function, *args)

    async def _aside_connections(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._in_thread(self._connection_threads, function, *args)

    async def _in_thread(self, threads: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a thread, with the step's context variables."""
        variables = contextvars.copy_context()  # the step's own may be entered by the loop meanwhile
        try:
            return await outlast(self._loop.run_in_executor(threads, variables.run, function, *args))
        finally:
            adopt(variables)

    # Entering and leaving

    def _enter(
        self, claimed: Claimed, look: Callable[[float], None] | None, interrupt: Callable[[], object]
    ) -> Running:
        now = time.monotonic()
        limit = self.time_limits.get((claimed.machine, claimed.machine_version)) if self.time_limits else None
        with self._lock:
            step = Running(claimed, self._free.popleft(), now, limit, look, interrupt)
            self._roster.enter(step.index, claimed.id, claimed.token, now, step.limit_at or 0.0)
            self._running[step.index] = step
        if self.on_step is not None:
            self.on_step()
        return step

    def _may_run_again(self, step: Running, reason: StepAgain) -> bool:
        if step.given_up or self._stopping() or not self._owns(step.claimed):
            return False
        self._arm(step, None)  # the wait is not the step's
        log.info("the step runs again: %s", reason, extra=reporting.fields(step.claimed))
        return True

    def _rearm(self, step: Running) -> bool:
        if step.given_up or self._stopping() or not self._owns(step.claimed):
            return False
        self._arm(step, None if step.limit is None else time.monotonic() + step.limit)
        return True

    def _arm(self, step: Running, limit_at: float | None) -> None:
        with self._lock:
            step.limit_at = limit_at
            if not step.given_up:
                claimed = step.claimed
                self._roster.enter(step.index, claimed.id, claimed.token, time.monotonic(), limit_at or 0.0)

    def _leave(self, step: Running, commit: Commit | None) -> None:
        if forks.strayed:
            forks.end(sys.exception())  # the rest of this process is the parent's
        with self._lock:
            step.done = True
            if step.given_up:
                self.given_up -= 1
                self._free.append(step.index)
        if step.given_up:
            # What was committed together with what the step wrote may have been in time.
            if commit is not None and not (commit.flushed and commit.flushed.committed):
                reporting.stale([commit])
            return
        if commit is not None:
            self._outbox.hand_over(commit)
        self._roster.leave(step.index)
        took = time.monotonic() - step.began
        mean = self.mean_step
        with self._lock:
            self.mean_step = took if mean is None else mean + (took - mean) * 0.2
            del self._running[step.index]
            self._free.append(step.index)
            if self.worn is not None:
                self.worn()

    def give_up(self, step: Running) -> bool:
        """Watch: a step's outcome will not count; interrupt it. False if it is done already."""
        with self._lock:
            if step.done or step.given_up:
                return False
            step.given_up = True
            self.given_up += 1
            self._roster.leave(step.index)
            del self._running[step.index]
            step.interrupt()  # under the lock: its thread can't leave it and be met in another step
        self.tell_loop(self._over.set)
        return True

    def _slot_is_free(self) -> None:
        self._buffer.leave()
        if self._buffer.closed:
            self.tell_loop(self._over.set)


async def _sleep(seconds: float) -> None:
    """Sleep, less long if a step cancels every task of the loop."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(seconds)
