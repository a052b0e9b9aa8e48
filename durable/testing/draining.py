"""drain: run everything runnable in the calling process."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from durable import validation
from durable.app import Durable
from durable.containment import is_contained
from durable.context import current
from durable.errors import DatabaseUnavailableError, DrainError, DurableError, UnknownTaskError
from durable.instance import Claimed
from durable.runtime.failures import raised
from durable.runtime.link import Stopped
from durable.storage import testing
from durable.storage.session import run, run_atomically
from durable.testing import journal
from durable.testing.seams import connected
from durable.testing.worker import LocalWorker, hired


def drain(
    app: Durable,
    queue: str | None = None,
    with_scheduled: bool = True,
    max_steps: int = 1000,
    *,
    raise_errors: bool = False,
) -> dict[str, int]:
    """Run everything runnable in the calling process, through the production SQL, until nothing is left to run.

    queue           only this one; None: all
    with_scheduled  when nothing is runnable, the scheduled row that is due first is run as if its time had come, until
                    none is left: retry delays and waits for tokens pass so too. Deadlines of parks do not: see
                    `fire_timeouts`
    max_steps       steps after which it gives up
    raise_errors    re-raise the first exception that a step ends with, after its outcome (a retry, say) was committed;
                    otherwise it is logged, as in production
    Returns a tally: `steps`, and how many of them ended in `next`, `retry`, `await`, `schedule_children`, `done`,
    `failed`, `cancelled`, `rerun` (the last step runs again for a signal); `stale` if somebody took a row away
    meanwhile; no entry where there was none.
    Raises DrainError after `max_steps`; UnknownTaskError, after everything else was run, when rows of tasks were left
    alone that this app does not have; DatabaseUnavailableError.
    """
    if queue is not None:
        validation.queue(queue)
    if current() is not None:
        raise DurableError("a step can't drain: it would run others inside of itself")
    options = (queue, with_scheduled, max_steps, raise_errors)
    return journal.recorded("drain", lambda: _anywhere(app, *options))


def _anywhere(app: Durable, *options: Any) -> dict[str, int]:
    if asyncio._get_running_loop() is None:
        return _drain(app, *options)
    # Async steps need a loop of their own, and a thread has at most one.
    with ThreadPoolExecutor(1, "durable-drain") as threads:
        return threads.submit(copy_context().run, _drain, app, *options).result()


def _drain(app: Durable, queue: str | None, with_scheduled: bool, max_steps: int, raise_errors: bool) -> dict[str, int]:
    tally: Counter[str] = Counter(steps=0)
    errors: list[BaseException] = []
    token = raised.set(errors)
    try:
        with connected(app, "drain") as connection, hired(app, connection) as worker:
            while True:
                found = run(connection, app.sql, testing.next_claimable(queue, worker.unknown))
                if found is not None:
                    _run(worker, worker.claim(*found), errors, tally, max_steps, raise_errors)
                    continue
                if with_scheduled and run(connection, app.sql, testing.awaits_tokens()):
                    run_atomically(connection, app.sql, testing.refill())
                    continue
                scheduled = run(connection, app.sql, testing.earliest_scheduled(queue))
                if scheduled is None or not (scheduled[1] or with_scheduled):
                    break
                run_atomically(connection, app.sql, testing.promote(scheduled[0]))
    except Stopped as error:
        raise DatabaseUnavailableError("an outcome could not be committed; the log says why") from error
    finally:
        raised.reset(token)
    if worker.unknown:
        raise UnknownTaskError(
            f"{app!r} has no task {', '.join(worker.unknown)} (name:version); its instances were left as they are. "
            "Import the module that defines it, or drain one queue"
        )
    return dict(tally)


def _run(
    worker: LocalWorker,
    claimed: Claimed | None,
    errors: list[BaseException],
    tally: Counter[str],
    max_steps: int,
    raise_errors: bool,
) -> None:
    """Run a row's step, and its next ones as long as they are inline."""
    while claimed is not None:
        if tally["steps"] >= max_steps:
            raise DrainError(
                f"there is still work after max_steps={max_steps} steps: {claimed.machine} instance {claimed.id} at "
                f"step {claimed.step!r} comes next, attempt {claimed.attempt}; so far {dict(tally)}",
                dict(tally),
            )
        errors.clear()
        commit = worker.execute(claimed)
        for error in errors:
            if not is_contained(error):
                raise error
        tally["steps"] += 1
        outcome, claimed = worker.commit(commit)
        tally[outcome or "stale"] += 1
        if errors and raise_errors:
            raise errors[0]
