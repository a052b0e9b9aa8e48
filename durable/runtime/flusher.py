"""Group commit: a batch of outcomes in one transaction, whatever goes wrong on the way.

* A missing history partition is made, and the flush repeated.
* A connection that broke may have committed or not: the same outcomes are submitted again, and those that turn out
  stale are looked up, since it may have been the first submission that committed them.
* Busy, full or restarting servers are waited for.
* A row that another session has locked (a signal in a caller's open transaction, say) delays its own outcome, and those
  of a parent's children where the parent's row is locked. The others commit: `lock_free` takes what is free. An outcome
  that waits for something else (a child's correlation key in an open transaction) is found by trying each alone.
  Both are in `Flushed.locked`; the engine offers them again (locked_outcomes.py).
* An outcome whose error has letters that the database's encoding lacks is committed with escapes instead.
* An outcome that can't be committed at all never fails its neighbours: the batch is halved until it stands alone,
  and then its instance fails with the database's reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import psycopg
from psycopg import errors as pg_errors

from durable.errors import OutcomeError
from durable.runtime import reporting
from durable.runtime.backoff import Backoff
from durable.runtime.failures import error_json, in_ascii
from durable.runtime.link import LOCKED, Link, Stopped
from durable.storage import claims, partitions
from durable.storage.claims import Around, Commit, Flushed
from durable.storage.session import TEXT_REFUSED, advise, describe

log = logging.getLogger(__name__)

# Errors of the outcome itself: the same statement would fail again, and only for the row that is wrong.
_OUTCOME_ERRORS = (
    psycopg.DataError,
    psycopg.IntegrityError,
    pg_errors.ProgramLimitExceeded,
    pg_errors.StatementTooComplex,
    psycopg.NotSupportedError,
)

_TEXT_REFUSED = (*TEXT_REFUSED, "0A000")
"""0A000: Postgres 15 has no conversion at all from UTF8 to SQL_ASCII."""

ALONE_MOST = 0.5
"""Seconds in which outcomes are tried one by one; the rest of the batch is put aside untried, for a next turn."""


class Flusher:
    """Commits outcomes of one worker id over one link.

    pause  waits that many seconds, or less when the process must stop; returns whether it must
    """

    def __init__(self, link: Link, pause: Callable[[float], bool]) -> None:
        self._link = link
        self._pause = pause

    def flush(self, worker: int, batch: Sequence[Commit]) -> Flushed:
        """Commit what can be committed; an outcome that is neither in `committed` nor in `locked` is stale.

        Raises Stopped when the process must end before the database would answer.
        """
        return self._flush(worker, batch)

    def flush_again(self, worker: int, batch: Sequence[Commit]) -> Flushed:
        """`flush` for outcomes that were `locked` before: waits for no row that another session holds."""
        return self._flush(worker, batch, around=True, resubmitted=True)

    def _flush(
        self, worker: int, batch: Sequence[Commit], *, around: bool = False, resubmitted: bool = False
    ) -> Flushed:
        """Commit a batch.

        around       leave out the outcomes whose rows other sessions hold, instead of waiting for those
        resubmitted  whether an earlier submission may have been committed without our hearing of it
        """
        backoff = Backoff(first=0.02, most=2.0)
        no_partition = False
        told = False
        while True:
            attempt = Around()
            try:
                if no_partition:
                    made = partitions.ensure(self._link.connection, self._link.sql)
                    log.warning("the history had no partition for today; made %d", made)
                    no_partition = False
                if around:
                    flushed = self._link.run_atomically(claims.flush_free(worker, batch, attempt))
                else:
                    flushed = claims.flush(self._link.connection, self._link.sql, worker, batch)
                if resubmitted and len(flushed.committed) + len(flushed.locked) < len(batch):
                    known = flushed.committed | flushed.locked.keys()
                    missing = [commit for commit in batch if commit.claimed.id not in known]
                    flushed.add(self._link.run(claims.resolve(missing)))
                return flushed
            except pg_errors.CheckViolation as error:
                # A missing partition is such a violation too, without a constraint; its text depends on the locale.
                if error.diag.constraint_name is not None:
                    return self._halve(worker, batch, error, around, resubmitted)
                no_partition = True
            except _OUTCOME_ERRORS as error:
                return self._halve(worker, batch, error, around, resubmitted)
            except psycopg.Error as error:
                if isinstance(error, LOCKED):
                    if not around:
                        around = True
                        continue
                    if (
                        attempt.locked is not None
                    ):  # not the rows themselves, nor the table: something that an outcome needs
                        return self._one_by_one(worker, batch, resubmitted)
                resubmitted |= self._link.broken(error)
                if not told:
                    log.warning(
                        "a commit of %d outcomes failed, trying on: %s",
                        len(batch),
                        advise(error, self._link.sql.schema),
                    )
                    told = True
            if self._pause(backoff.next()):
                raise Stopped

    def _one_by_one(self, worker: int, batch: Sequence[Commit], resubmitted: bool) -> Flushed:
        """Commit each outcome in a transaction of its own, for as long as that may take."""
        if len(batch) == 1:
            return Flushed(locked={batch[0].claimed.id: None})
        flushed = Flushed()
        until = time.monotonic() + ALONE_MOST
        for commit in batch:
            if time.monotonic() < until:
                flushed.add(self._flush(worker, [commit], around=True, resubmitted=resubmitted))
            else:
                flushed.locked[commit.claimed.id] = None
        return flushed

    def _halve(
        self, worker: int, batch: Sequence[Commit], error: psycopg.Error, around: bool, resubmitted: bool
    ) -> Flushed:
        if len(batch) > 1:
            middle = len(batch) // 2
            try:
                flushed = self._flush(worker, batch[:middle], around=around, resubmitted=resubmitted)
            except _OUTCOME_ERRORS:
                self._flush(worker, batch[middle:], around=around, resubmitted=resubmitted)
                raise
            flushed.add(self._flush(worker, batch[middle:], around=around, resubmitted=resubmitted))
            return flushed
        (commit,) = batch
        if commit.error is not None and error.sqlstate in _TEXT_REFUSED and commit.error != in_ascii(commit.error):
            commit.error = in_ascii(commit.error)
            return self._flush(worker, batch, around=around, resubmitted=resubmitted)
        log.error(
            "an outcome can't be committed: %s",
            describe(error),
            extra=reporting.fields(commit.claimed),
        )
        if commit.status == "failed" and commit.result is None:
            raise error  # even the plain failure can't be stored: not this outcome's fault
        reason = OutcomeError(f"the database refused this outcome: {describe(error)}")
        flushed = self._flush(
            worker, [Commit(commit.claimed, "failed", error=error_json(reason), attempt=commit.attempt)]
        )
        flushed.ended |= flushed.committed
        return flushed
