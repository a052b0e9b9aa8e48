"""What the parts of a process report: events of `durable.telemetry`, and the span of each step.

One function per event, so that every place emits it in the same form. None of them raises.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from durable import telemetry, tracing
from durable.containment import is_contained
from durable.instance import Claimed
from durable.limits import name_of
from durable.storage.claims import Commit, Flushed
from durable.storage.maintenance import RowHolder
from durable.storage.verdicts import Admitted

log = logging.getLogger(__name__)
_step_log = logging.getLogger("durable.step")

_KINDS = {"children": "schedule_childs"}
_ENDS = {"done": "done", "failed": "stop", "cancelled": "stop"}


def fields(claimed: Claimed) -> dict[str, object]:
    """Return the fields of a log record about a step: which one of which instance, no payload."""
    return {
        "instance": claimed.id,
        "task": claimed.machine,
        "step": claimed.step,
        "attempt": claimed.attempt,
        "queue": claimed.queue,
    }


def kind_of(commit: Commit) -> str:
    """Return the kind of an outcome as events name it: next, retry, await, schedule_childs, done or stop."""
    return _ENDS[commit.status] if commit.kind == "end" else _KINDS.get(commit.kind, commit.kind)


def are_steps_watched() -> bool:
    """Whether anybody wants to know of steps."""
    return "step.stop" in telemetry.attached or tracing.tracer() is not None


class WatchedStep:
    """One execution of a step: a span around it, an event when it has an outcome."""

    def __init__(self, claimed: Claimed) -> None:
        self._claimed = claimed
        self._span = _begin_span(claimed)
        self._began = time.perf_counter()

    def end(self, commit: Commit | None) -> None:
        """It has ended; None: without an outcome, so that it runs again."""
        duration = time.perf_counter() - self._began
        kind = "again" if commit is None else kind_of(commit)
        if self._span is not None:
            try:
                self._span.end(kind, _error_of(commit))
            except BaseException as error:
                if not is_contained(error):
                    raise
                tracing.failed()
        if commit is not None:
            telemetry.emit("step.stop", {"duration": duration}, _about(commit))


def _begin_span(claimed: Claimed) -> tracing.StepSpan | None:
    tracer = tracing.tracer()
    if tracer is None:
        return None
    attributes: dict[str, str | int] = {
        "id": claimed.id,
        "fsm": claimed.machine,
        "version": claimed.machine_version,
        "step": claimed.step,
        "attempt": claimed.attempt,
        "queue": claimed.queue,
    }
    causes = [
        tracing.Cause(signal.trace, signal.name, signal.id)
        for signal in claimed.signals
        if signal.trace is not None and signal.name in (claimed.awaits or ())
    ]
    try:
        return tracer.step(f"{claimed.machine} {claimed.step}", attributes, claimed.trace, causes)
    except BaseException as error:
        if not is_contained(error):
            raise
        tracing.failed()
        return None


def _error_of(commit: Commit | None) -> str | None:
    """Return "type: message" of what the step raised or stopped for."""
    if commit is None or commit.error is None:
        return None
    error = json.loads(commit.error)
    return f"{error['type']}: {error['message']}"


def _about(commit: Commit) -> dict[str, object]:
    claimed = commit.claimed
    return {"id": claimed.id, "fsm": claimed.machine, "step": claimed.step, "kind": kind_of(commit)}


def arguments(claimed: Claimed, value: object) -> None:
    """A step begins, and its payloads are to be logged: `value` is its arguments, or its state."""
    _step_log.debug("step starts", extra={**fields(claimed), "arguments": value})


def picked(queue: str, worker: int, demand: int, count: int) -> None:
    """A claim came back."""
    if "pick.stop" in telemetry.attached:
        telemetry.emit("pick.stop", {"count": count, "demand": demand}, {"queue": queue, "worker": worker})


def admitted(queue: str, claim: Admitted) -> None:
    """A claim of limited rows came back: tell what kept rows from going."""
    denied = claim.denied
    if denied.gates and "concurrency.throttled" in telemetry.attached:
        let_in = Counter(row.concurrency_key for row in claim.rows)
        for key, count in denied.gates.items():
            measured = {"wanted": count + let_in[key], "admitted": let_in[key]}
            telemetry.emit("concurrency.throttled", measured, {"key": key, "queue": queue})
    if denied.buckets and "rate_limit.throttled" in telemetry.attached:
        granted = Counter(row.rate_limit for row in claim.rows)
        for bucket, count in denied.buckets.items():
            measured = {"wanted": count + granted[bucket], "granted": granted[bucket]}
            telemetry.emit("rate_limit.throttled", measured, {"key": bucket, "queue": queue})
    if denied.contended:
        telemetry.emit("rate_limit.contended", {"count": denied.contended}, {"queue": queue})
    if denied.busy and "concurrency.contended" in telemetry.attached:
        for row in denied.busy:
            about = {"id": row.id, "fsm": row.machine, "concurrency_key": row.key}
            telemetry.emit("concurrency.contended", {"count": 1}, about)
    if denied.unknown and "rate_limit.unknown" in telemetry.attached:
        parked = Counter((str(row.bucket), row.machine, row.step) for row in denied.unknown)
        for (name, machine, step), count in parked.items():
            limit = {"key": name, "name": name_of(name), "fsm": machine, "step": step}
            telemetry.emit("rate_limit.unknown", {"count": count}, limit)


def stale(commits: Sequence[Commit]) -> None:
    """Outcomes did not count: their rows had been taken away."""
    if not commits:
        return
    instances = [commit.claimed.id for commit in commits]
    log.warning("outcomes were stale: the rows had been taken away", extra={"instances": instances[:20]})
    if "outcome.stale" in telemetry.attached:
        for commit in commits:
            telemetry.emit("outcome.stale", {"count": 1}, _about(commit))


def put_aside(rows: Sequence[Claimed], holders: Sequence[RowHolder], waiting: int) -> None:
    """Outcomes wait for locks that other sessions hold; the others of their batch were committed."""
    shown = ", ".join(f"{row.id} ({row.machine} {row.step})" for row in rows[:5])
    by = "; ".join(
        f"{holder.application or 'a session'} (pid {holder.pid}"
        + (f", its transaction is {holder.age:.0f} s old)" if holder.age is not None else ")")
        for holder in {holder.pid: holder for holder in holders}.values()
    )
    log.warning(
        "%d outcomes wait for locks of other sessions, among them those of instances %s; held by %s; others commit",
        waiting,
        shown,
        by or "a transaction that ended a moment ago, or holds a key or a slot that they need",
        extra={"instances": [row.id for row in rows[:20]]},
    )


def unread(commits: Sequence[Commit], flushed: Flushed) -> None:
    """Signals came while steps ran that ended their instance: tell of those that are unread or run a step again."""
    for commit in commits:
        claimed = commit.claimed
        if claimed.id not in flushed.committed:
            continue
        names = flushed.unread.get(claimed.id)
        if names is not None:
            count = sum(names.values())
            log.warning(
                "instance %d of %s ended in step %s with unread signals: %s",
                claimed.id,
                claimed.machine,
                claimed.step,
                ", ".join(f"{number} {name}" for name, number in names.items()),
                extra=fields(claimed),
            )
        elif claimed.id in flushed.rerun:
            count = flushed.rerun[claimed.id]
            log.info(
                "instance %d of %s runs step %s again: signals arrived while it ran: %d",
                claimed.id,
                claimed.machine,
                claimed.step,
                count,
                extra=fields(claimed),
            )
        else:
            continue
        if "signal.unread" in telemetry.attached:
            about = {"id": claimed.id, "fsm": claimed.machine, "step": claimed.step, "rerun": names is None}
            telemetry.emit("signal.unread", {"count": count}, about)


def drained(queue: str, released: int, in_flight: int) -> None:
    """A worker process was asked to stop, and gave back what it had not begun."""
    log.debug("queue %s: %d rows given back, %d steps are let end", queue, released, in_flight)
    telemetry.emit("scheduler.drain", {"released": released, "in_flight": in_flight}, {"queue": queue})


def reclaimed(by_queue: Mapping[str, int]) -> None:
    """Claims were taken back that nobody alive knew of: queue -> how many."""
    for queue, count in by_queue.items():
        telemetry.emit("scheduler.reclaimed", {"count": count}, {"queue": queue})


def gave_back(worker: str, queue: str, count: int) -> None:
    """A worker process gave back rows that the database said it held and it did not know of."""
    if count:
        log.warning("%s gave back %d rows of a claim it never heard of", worker, count)
        reclaimed({queue: count})


def unknown(claimed: Claimed) -> None:
    """A row was claimed whose task or machine this process does not have."""
    log.error(
        "task %s version %d is not known here; its instances are left to other workers",
        claimed.machine,
        claimed.machine_version,
        extra=fields(claimed),
    )


def reaped(ids: Sequence[int]) -> None:
    """Rows of workers that stopped answering were taken back."""
    if ids:
        telemetry.emit("reaper.reaped", {"count": len(ids)}, {"ids": list(ids)})


def timed_out(by_queue: Mapping[str, int]) -> None:
    """Parks ended by their timeout: queue -> how many."""
    if by_queue:
        telemetry.emit("await.timeout", {"count": sum(by_queue.values())}, {})


def swept(count: int, buckets: int, gates: int) -> None:
    """Garbage was collected: rows and partitions; shards of buckets; shards of gates."""
    telemetry.emit("gc.swept", {"count": count, "buckets": buckets, "gates": gates}, {})
