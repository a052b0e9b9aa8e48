"""Group commit: a batch of outcomes in one transaction, whatever goes wrong on the way.

* A missing history partition is made, and the flush repeated.
* A connection that broke may have committed or not: the same outcomes are submitted again, and those that turn out
  stale are looked up, since it may have been the first submission that committed them.
* Busy, full or restarting servers are waited for.
* An outcome that can't be committed at all never fails its neighbours: the batch is halved until it stands alone,
  and then its instance fails with the database's reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import psycopg
from psycopg import errors as pg_errors

from durable.errors import OutcomeError
from durable.runtime import reporting
from durable.runtime.backoff import Backoff
from durable.runtime.failures import error_json
from durable.runtime.link import Link, Stopped
from durable.storage import claims, partitions
from durable.storage.claims import Commit, Flushed
from durable.storage.session import advise, describe

log = logging.getLogger(__name__)

# Errors of the outcome itself: the same statement would fail again, and only for the row that is wrong.
_OUTCOME_ERRORS = (psycopg.DataError, psycopg.IntegrityError, pg_errors.ProgramLimitExceeded, psycopg.NotSupportedError)


class Flusher:
    """Commits outcomes of one worker id over one link.

    pause  waits that many seconds, or less when the process must stop; returns whether it must
    """

    def __init__(self, link: Link, pause: Callable[[float], bool]) -> None:
        self._link = link
        self._pause = pause

    def flush(self, worker: int, batch: Sequence[Commit]) -> Flushed:
        """Commit what can be committed; what is not in `committed` is stale.

        Raises Stopped when the process must end before the database would answer.
        """
        backoff = Backoff(first=0.02, most=2.0)
        submitted_before = False
        no_partition = False
        told = False
        while True:
            try:
                if no_partition:
                    made = partitions.ensure(self._link.connection, self._link.sql)
                    log.warning("the history had no partition for today; made %d", made)
                    no_partition = False
                flushed = claims.flush(self._link.connection, self._link.sql, worker, batch)
                if submitted_before and len(flushed.committed) < len(batch):
                    flushed.add(self._link.run(claims.resolve(batch)))
                return flushed
            except pg_errors.CheckViolation as error:
                # A missing partition is such a violation too, without a constraint; its text depends on the locale.
                if error.diag.constraint_name is not None:
                    return self._halve(worker, batch, error)
                no_partition = True
            except _OUTCOME_ERRORS as error:
                return self._halve(worker, batch, error)
            except psycopg.Error as error:
                submitted_before |= self._link.broken(error)
                if not told:
                    log.warning(
                        "a commit of %d outcomes failed, trying on: %s",
                        len(batch),
                        advise(error, self._link.sql.schema),
                    )
                    told = True
            if self._pause(backoff.next()):
                raise Stopped

    def _halve(self, worker: int, batch: Sequence[Commit], error: psycopg.Error) -> Flushed:
        if len(batch) > 1:
            middle = len(batch) // 2
            try:
                flushed = self.flush(worker, batch[:middle])
            except _OUTCOME_ERRORS:
                self.flush(worker, batch[middle:])
                raise
            flushed.add(self.flush(worker, batch[middle:]))
            return flushed
        (commit,) = batch
        log.error(
            "an outcome can't be committed: %s",
            describe(error),
            extra=reporting.fields(commit.claimed),
        )
        if commit.status == "failed" and commit.result is None:
            raise error  # even the plain failure can't be stored: not this outcome's fault
        reason = OutcomeError(f"the database refused this outcome: {describe(error)}")
        flushed = self.flush(
            worker, [Commit(commit.claimed, "failed", error=error_json(reason), attempt=commit.attempt)]
        )
        flushed.ended |= flushed.committed
        return flushed
