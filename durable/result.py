"""AsyncResult: where an instance stands and what it returned.

All waiters of a process share one watcher: a thread that asks for all waited-for ids in one statement, 1 ms after a
wait begins, then at distances of an eighth of the time waited, from 0.5 to 50 ms. It lives only while somebody waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from durable import interruption, validation
from durable.children import Child, Children
from durable.context import Signal, blocks_loop, current
from durable.errors import (
    DatabaseUnavailableError,
    DurableError,
    NotFoundError,
    ResultTimeout,
    TaskCancelled,
    TaskFailed,
)
from durable.instance import TERMINAL, Snapshot

R = TypeVar("R")
log = logging.getLogger(__name__)

CELERY_STATES = {
    "executing": "STARTED",
    "awaiting_signal": "STARTED",
    "awaiting_children": "STARTED",
    "done": "SUCCESS",
    "failed": "FAILURE",
    "cancelled": "REVOKED",
}
FIRST_POLL = 0.001
SHORTEST_POLL = 0.0005
LONGEST_POLL = 0.05
UNREACHABLE_PAUSE = 1.0
PROBABLY_FINISHED = 0.02
"""Seconds after which a handle is asked about at once, before anybody waits: a loop over many results stays quick."""
MISSING_AFTER = 1.0
"""Seconds after which an id that nobody inserted ends a wait; an uncommitted insert has that long to commit."""


class ResultSource(Protocol):
    """What an AsyncResult needs of the app."""

    def fetch(self, instance_id: int) -> Snapshot | None: ...
    async def afetch(self, instance_id: int) -> Snapshot | None: ...
    def wait_for(self, instance_id: int) -> Future[Snapshot]: ...
    def stop_waiting(self, instance_id: int, waiter: Future[Snapshot]) -> None: ...
    def decode_result(self, snapshot: Snapshot) -> Any: ...
    def cancel(
        self,
        target: int | str,
        reason: str | None = None,
        *,
        cascade: bool = False,
        terminate: bool = False,
        timeout: float | None = None,
    ) -> bool: ...
    async def acancel(
        self,
        target: int | str,
        reason: str | None = None,
        *,
        cascade: bool = False,
        terminate: bool = False,
        timeout: float | None = None,
    ) -> bool: ...
    def retry(self, instance_id: int) -> bool: ...
    async def aretry(self, instance_id: int) -> bool: ...
    def signal(
        self,
        target: int | str,
        name: str,
        payload: Any = None,
        *,
        dedup_key: str | None = None,
        timeout: float | None = None,
    ) -> bool: ...
    async def asignal(
        self,
        target: int | str,
        name: str,
        payload: Any = None,
        *,
        dedup_key: str | None = None,
        timeout: float | None = None,
    ) -> bool: ...
    def children_of(self, instance_id: int) -> Children: ...
    async def achildren_of(self, instance_id: int) -> list[Child]: ...
    def unread_of(self, instance_id: int) -> list[Signal]: ...
    async def aunread_of(self, instance_id: int) -> list[Signal]: ...


class AsyncResult(Generic[R]):
    """A handle on one instance, by id. Reading costs a query each time until the instance is finished.

    Everything that asks the database has a twin for coroutines, with an `a` before its name.
    """

    def __init__(self, instance_id: int | None, source: ResultSource) -> None:
        self._id = instance_id
        self._source = source
        self._made_at = time.monotonic()
        self._final: Snapshot | None = None
        self._missing: Callable[[], DurableError] | None = None

    @property
    def id(self) -> int:
        """The instance's id. Inside `with app.batch()` it is known only after the block: DurableError until then."""
        if self._id is None:
            raise self._missing() if self._missing else DurableError("this result gets its id when its batch ends")
        return self._id

    def _settle(self, instance_id: int | None, missing: Callable[[], DurableError] | None = None) -> None:
        self._id, self._missing = instance_id, missing

    def _snapshot(self, name: str) -> Snapshot | None:
        if self._final is None:
            blocks_loop(f"result.{name}", f"result.a{name.removesuffix('()')}()")
        return self._final or self._keep(self._source.fetch(self.id))

    async def _asnapshot(self) -> Snapshot | None:
        return self._final or self._keep(await self._source.afetch(self.id))

    def _keep(self, snapshot: Snapshot | None) -> Snapshot | None:
        if snapshot is not None and snapshot.status in TERMINAL:
            self._final = snapshot
        return snapshot

    @property
    def status(self) -> str:
        """The instance's status, or `not_found` for an id that never existed or is gone."""
        return _status(self._snapshot("status"))

    async def astatus(self) -> str:
        """`status` for coroutines."""
        return _status(await self._asnapshot())

    @property
    def state(self) -> str:
        """`status` in Celery's words: PENDING STARTED RETRY SUCCESS FAILURE REVOKED; PENDING for what is not found."""
        return _celery_state(self._snapshot("state"))

    async def astate(self) -> str:
        """`state` for coroutines."""
        return _celery_state(await self._asnapshot())

    def ready(self) -> bool:
        """Whether it is finished: done, failed or cancelled."""
        return _status(self._snapshot("ready()")) in TERMINAL

    async def aready(self) -> bool:
        """`ready` for coroutines."""
        return _status(await self._asnapshot()) in TERMINAL

    def successful(self) -> bool:
        """Whether it ended `done`."""
        return _status(self._snapshot("successful()")) == "done"

    async def asuccessful(self) -> bool:
        """`successful` for coroutines."""
        return _status(await self._asnapshot()) == "done"

    def failed(self) -> bool:
        """Whether it ended `failed`."""
        return _status(self._snapshot("failed()")) == "failed"

    async def afailed(self) -> bool:
        """`failed` for coroutines."""
        return _status(await self._asnapshot()) == "failed"

    @property
    def attempts(self) -> int:
        """Executions that counted as attempts so far; crashes and hand-backs excluded. 0 when not found."""
        snapshot = self._snapshot("attempts")
        return 0 if snapshot is None else snapshot.version

    async def aattempts(self) -> int:
        """`attempts` for coroutines."""
        snapshot = await self._asnapshot()
        return 0 if snapshot is None else snapshot.version

    @property
    def result(self) -> Any:
        """What it returned (for `Stop(reason)` the reason); None while it is not finished."""
        return self._result(self._snapshot("result"))

    async def aresult(self) -> Any:
        """`result` for coroutines."""
        return self._result(await self._asnapshot())

    def _result(self, snapshot: Snapshot | None) -> Any:
        return None if snapshot is None or snapshot.status not in TERMINAL else self._source.decode_result(snapshot)

    @property
    def error(self) -> TaskFailed | None:
        """The failure as an exception, not raised; None unless it ended failed or cancelled."""
        snapshot = self._snapshot("error")
        return None if snapshot is None else _failure(snapshot)

    async def aerror(self) -> TaskFailed | None:
        """`error` for coroutines."""
        snapshot = await self._asnapshot()
        return None if snapshot is None else _failure(snapshot)

    @interruption.transparent
    def get(self, timeout: float | None = None, propagate: bool = True, *, allow_in_step: bool = False) -> R:
        """Wait until it is finished and return its result; calling it again is always safe.

        timeout        seconds to wait; None for ever
        propagate      False: return the result (None for most failures) instead of raising
        allow_in_step  a step that waits for another holds its slot: refused unless asked for
        Raises TaskFailed or its subclass TaskCancelled; ResultTimeout; NotFoundError for an id that does not exist.
        """
        _check_wait(allow_in_step)
        seconds = validation.timeout(timeout)
        if self._final is None:
            blocks_loop("result.get()", "result.aget()")
        if self._final is None and (seconds == 0 or time.monotonic() - self._made_at > PROBABLY_FINISHED):
            self._keep(self._source.fetch(self.id))
        if self._final is None:
            waiter = self._source.wait_for(self.id)
            try:
                self._keep(waiter.result(seconds))
            except ResultTimeout:
                raise
            except TimeoutError:
                raise self._timed_out(seconds) from None
            finally:
                self._source.stop_waiting(self.id, waiter)
        return self._outcome(propagate)

    @interruption.transparent
    async def aget(self, timeout: float | None = None, propagate: bool = True, *, allow_in_step: bool = False) -> R:
        """`get` for coroutines."""
        _check_wait(allow_in_step)
        seconds = validation.timeout(timeout)
        if self._final is None and (seconds == 0 or time.monotonic() - self._made_at > PROBABLY_FINISHED):
            await self.astatus()
        if self._final is None:
            waiter = self._source.wait_for(self.id)
            try:
                self._keep(await _wrapped(waiter, seconds))
            except ResultTimeout:
                raise
            except TimeoutError:
                raise self._timed_out(seconds) from None
            finally:
                self._source.stop_waiting(self.id, waiter)
        return self._outcome(propagate)

    def _timed_out(self, seconds: float | None) -> ResultTimeout:
        return ResultTimeout(f"instance {self.id} was not finished after {seconds:g} s; it goes on, ask again")

    def _outcome(self, propagate: bool) -> R:
        assert self._final is not None, "a wait ends with a finished snapshot"
        failure = _failure(self._final)
        if failure is not None and propagate:
            raise failure
        return self._source.decode_result(self._final)  # type: ignore[no-any-return]

    def cancel(
        self,
        reason: str | None = None,
        *,
        cascade: bool = False,
        terminate: bool = False,
        timeout: float | None = None,
    ) -> bool:
        """Cancel it, as `app.cancel` does. False when it is finished already."""
        blocks_loop("result.cancel()", "result.acancel()")
        return self._source.cancel(self.id, reason, cascade=cascade, terminate=terminate, timeout=timeout)

    async def acancel(
        self,
        reason: str | None = None,
        *,
        cascade: bool = False,
        terminate: bool = False,
        timeout: float | None = None,
    ) -> bool:
        """`cancel` for coroutines."""
        return await self._source.acancel(self.id, reason, cascade=cascade, terminate=terminate, timeout=timeout)

    def retry(self) -> bool:
        """Have it go on from its failed step; as `app.retry`. This handle then follows the new run."""
        blocks_loop("result.retry()", "result.aretry()")
        return self._followed(self._source.retry(self.id))

    async def aretry(self) -> bool:
        """`retry` for coroutines."""
        return self._followed(await self._source.aretry(self.id))

    def _followed(self, retried: bool) -> bool:
        if retried:
            self._final = None
        return retried

    def signal(
        self, name: str, payload: Any = None, *, dedup_key: str | None = None, timeout: float | None = None
    ) -> bool:
        """Put a message into its inbox; as `app.signal`."""
        blocks_loop("result.signal()", "result.asignal()")
        return self._source.signal(self.id, name, payload, dedup_key=dedup_key, timeout=timeout)

    async def asignal(
        self, name: str, payload: Any = None, *, dedup_key: str | None = None, timeout: float | None = None
    ) -> bool:
        """`signal` for coroutines."""
        return await self._source.asignal(self.id, name, payload, dedup_key=dedup_key, timeout=timeout)

    @property
    def children(self) -> Children:
        """Its children of every round, live and finished."""
        blocks_loop("result.children", "result.achildren()")
        return self._source.children_of(self.id)

    async def achildren(self) -> list[Child]:
        """`children` for coroutines: all of them, by id."""
        return await self._source.achildren_of(self.id)

    @property
    def unread(self) -> list[Signal]:
        """The signals that it accepted and no step was shown, oldest first; empty until it is finished."""
        blocks_loop("result.unread", "result.aunread()")
        return self._source.unread_of(self.id)

    async def aunread(self) -> list[Signal]:
        """`unread` for coroutines."""
        return await self._source.aunread_of(self.id)

    def __repr__(self) -> str:
        return f"<AsyncResult {self._id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and self._id == other._id and self._source is other._source

    def __hash__(self) -> int:
        return hash(self.id)


def _status(snapshot: Snapshot | None) -> str:
    return "not_found" if snapshot is None else snapshot.status


def _celery_state(snapshot: Snapshot | None) -> str:
    if snapshot is None:
        return "PENDING"
    waits = "RETRY" if snapshot.error is not None else "STARTED" if snapshot.version else "PENDING"
    return CELERY_STATES.get(snapshot.status, waits)


@interruption.transparent
async def _wrapped(waiter: Future[Snapshot], seconds: float | None) -> Snapshot:
    return await asyncio.wait_for(asyncio.wrap_future(waiter), seconds)


def _check_wait(allow_in_step: bool) -> None:
    step = current()
    if step is not None and not allow_in_step:
        raise DurableError(
            f"{step!r} waits for another instance while it holds a worker's slot: with every slot waiting, nothing "
            "runs. Return and let the other one enqueue what comes next, or pass allow_in_step=True"
        )


def _failure(snapshot: Snapshot) -> TaskFailed | None:
    if snapshot.status not in ("failed", "cancelled"):
        return None
    error = snapshot.error or {}
    kind = TaskCancelled if snapshot.status == "cancelled" else TaskFailed
    return kind(snapshot.id, error.get("type", snapshot.status), error.get("message", ""), error.get("traceback") or "")


class Watcher:
    """The process's one poller for finished ids.

    finished  asks the database which of these ids are finished
    exists    tells whether an id is there at all
    begun     called when somebody begins to wait, before the first look
    """

    def __init__(
        self,
        finished: Callable[[Sequence[int]], list[Snapshot]],
        exists: Callable[[int], Snapshot | None],
        begun: Callable[[], None],
    ) -> None:
        self._begun = begun
        self._finished = finished
        self._exists = exists
        self._wake = threading.Condition()
        self._waiting: dict[int, list[tuple[Future[Snapshot], float]]] = {}
        self._thread: threading.Thread | None = None
        self._fresh = False

    def wait_for(self, instance_id: int) -> Future[Snapshot]:
        """Return a future of the finished snapshot."""
        future: Future[Snapshot] = Future()
        with self._wake:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="durable-results", daemon=True)
                thread.start()  # where no thread can be had, nothing is left that waits for one
                self._thread = thread
            self._waiting.setdefault(instance_id, []).append((future, time.monotonic()))
            self._fresh = True
            self._wake.notify()
        return future

    def stop_waiting(self, instance_id: int, waiter: Future[Snapshot]) -> None:
        """Forget a future."""
        with self._wake:
            left = [entry for entry in self._waiting.get(instance_id, ()) if entry[0] is not waiter]
            if left:
                self._waiting[instance_id] = left
            else:
                self._waiting.pop(instance_id, None)

    def _watch(self) -> None:
        began = look_at = 0.0
        while True:
            with self._wake:
                if not self._waiting:
                    self._wake.wait(5.0)
                    if not self._waiting:
                        self._thread = None
                        return
                fresh, self._fresh = self._fresh, False
            try:
                now = time.monotonic()
                if fresh:
                    # Look again soon; but never later than was meant, however many begin to wait one after another.
                    began = now
                    look_at = min(look_at, now + FIRST_POLL) if look_at > now else now + FIRST_POLL
                    self._begun()
                with self._wake:
                    if not self._fresh:
                        self._wake.wait(max(0.0, look_at - time.monotonic()))
                    ids = list(self._waiting)
                now = time.monotonic()
                if now < look_at:
                    continue
                look_at = now + min(max(SHORTEST_POLL, (now - began) / 8), LONGEST_POLL)
                self._resolve(self._finished(ids))
                self._fail_missing()
            except DatabaseUnavailableError as error:
                log.warning("results can't be read, waiting goes on", extra={"error": str(error)})
                time.sleep(UNREACHABLE_PAUSE)
            except Exception as error:
                self._fail_all(error)

    def _take(self, instance_id: int) -> list[Future[Snapshot]]:
        with self._wake:
            return [entry[0] for entry in self._waiting.pop(instance_id, ())]

    def _resolve(self, snapshots: Sequence[Snapshot]) -> None:
        for snapshot in snapshots:
            for future in self._take(snapshot.id):
                if future.set_running_or_notify_cancel():
                    future.set_result(snapshot)

    def _fail_missing(self) -> None:
        """End waits for ids that were never inserted; looked at once per wait, after a grace."""
        now = time.monotonic()
        with self._wake:
            old = [
                instance_id
                for instance_id, entries in self._waiting.items()
                if any(MISSING_AFTER <= now - since < float("inf") for _, since in entries)
            ]
        for instance_id in old:
            if self._exists(instance_id) is None:
                self._fail(instance_id, NotFoundError(f"there is no instance {instance_id}"))
            else:
                with self._wake:
                    entries = self._waiting.get(instance_id)
                    if entries is not None:
                        self._waiting[instance_id] = [(future, float("-inf")) for future, _ in entries]

    def _fail(self, instance_id: int, error: Exception) -> None:
        for future in self._take(instance_id):
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            ids = list(self._waiting)
        for instance_id in ids:
            self._fail(instance_id, error)
