"""The engine: the thread of a worker process that owns its one connection, and claims and commits for its slot.

One turn: commit what is ready, give back what waits behind a long step, claim if the buffer wants rows, sleep until
rung. Which rows, which locks, who may die where:

* A claim marks rows (worker, token + 1) and enters `held` here. Between that commit and our knowing of it anything may
  die: `reconcile` gives back what the database says we hold and we don't know.
* A row leaves `held` when its outcome is durable, stale, or it was given back. An outcome that waits for another
  session's lock keeps it there (`locked`), and is offered again. An outcome for a row not in `held` is
  dropped: its lease was lost and somebody else owns the row.
* The process may die at any moment: the agent (or the reaper) takes everything back by worker id.

Only this thread touches the connection, `held` is written only here.
"""

from __future__ import annotations

import logging
import math
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from durable.app import Durable
from durable.instance import Claimed
from durable.runtime import identity, reporting
from durable.runtime.admission import LimitedPicker
from durable.runtime.arrivals import Arrivals
from durable.runtime.assembly import Parts, Process, one_slot
from durable.runtime.buffer import Outbox
from durable.runtime.flusher import Flusher
from durable.runtime.link import Link, Stopped
from durable.runtime.locked_outcomes import LockedOutcomes
from durable.runtime.lookout import Lookout
from durable.runtime.pacing import BEHIND_A_LONG_STEP
from durable.runtime.picker import Picker
from durable.runtime.reconcile import Reconcile
from durable.runtime.saturation import Saturation
from durable.runtime.shared import BUSY, IDLE, LOOK, RESCAN, ROWS, SUSPECT, Bell, Seat, SharedSeats, poll_timeout
from durable.runtime.step_transaction import IDLE_SECONDS
from durable.runtime.waiting import Waiting
from durable.storage import claims, maintenance, workers
from durable.storage.claims import Commit, Flushed
from durable.storage.session import Operation, advise

log = logging.getLogger(__name__)

LOCKS_TOLD_EVERY = 60.0
"""Seconds between two log lines of one process about outcomes that wait for locks."""
LOOK_FOR_LOCKED = 2.0
"""Seconds until claims are released again whose rows other sessions held."""
BRIEF_STEP = 0.003
"""Mean seconds of a step up to which a process goes on looking for rows while it runs one."""


class Engine:
    """Claims and commits for one slot.

    stop_asked  returns None, or the time.monotonic() by which the process must be gone
    lookout     when to claim again though nothing was announced
    """

    def __init__(
        self,
        app: Durable,
        queue: str,
        name: str,
        seats: SharedSeats,
        seat: Seat,
        bell: Bell,
        stop_asked: Callable[[], float | None],
        lookout: Lookout,
    ) -> None:
        self._app = app
        self._queue, self._name = queue, name
        self._seat = seat
        self._bell = bell
        self._stop_asked = stop_asked
        self._poll = select.poll()
        self._poll.register(bell.reader, select.POLLIN)
        self._waiting = Waiting(seats, bell, stop_asked)
        self._link = Link(
            app.dsn,
            app.sql,
            f"durable {app.name} worker {queue} {os.getpid()}",
            pooler=app.conf.pooler,
            most_wait=app.conf.max_poll_interval,
            pause=self._waiting.pause,
            patience=app.conf.worker_patience,
        )
        self._flusher = Flusher(self._link, self._waiting.pause)
        self._picker = Picker(self._link, queue)
        self.outbox = Outbox(bell.ring)
        process = Process(app, queue, self.outbox, seat, bell, lambda: self._worker, self.owns, self._stopping)
        self.slot, self.buffer, self._pacing, self._step_connections = self._assemble(process)
        self._saturation = Saturation(queue, self.slot, self.buffer, self.outbox, self._pacing)
        self._held: dict[int, int] = {}
        self._locked = LockedOutcomes()
        self._tell_of_locks_at = -math.inf
        self._limited = LimitedPicker(self._link, queue, app.wakeups)
        self._arrivals = Arrivals(
            app,
            self._link,
            self._picker,
            name,
            self._held,
            self._release,
            lambda: self._reconcile.again(LOOK_FOR_LOCKED),
        )
        self._worker = 0
        self._more, self._took_all = True, False
        self._lookout = lookout
        self._looking = self._announced = False
        self._suspect = False
        self._alone = False
        self._reconcile = Reconcile(app.conf.reconcile_interval)

    def _assemble(self, process: Process) -> Parts:
        return one_slot(process)

    def owns(self, claimed: Claimed) -> bool:
        """Whether a claimed row is still ours."""
        return self._held.get(claimed.id) == claimed.token

    def _stopping(self) -> bool:
        return self._stop_asked() is not None

    def run(self) -> None:
        """Serve the slot until asked to stop, then drain."""
        try:
            self._register()
            while self._stop_asked() is None:
                self._turn()
            self._drain()
        except Stopped:
            log.warning("%s stops while the database is away; its claims are taken back later", self._name)
        finally:
            self.buffer.close()
            self._link.drop()

    def _turn(self) -> None:
        self._step_connections.close_idle()
        self._saturation.report()
        rung, hints = self._bell.silence(), self._seat.take_hints()
        if hints & RESCAN:
            self._picker.rescan()
        self._announced |= bool(hints & ROWS)
        if hints & LOOK:
            self._lookout.take_over()
        elif hints or (rung and not self._lookout.is_covered()):
            self._more = True
            self._limited.look_soon()
        if hints & SUSPECT:
            self._hear_of_suspect()
        if self._seat.lost == self._worker:
            self._start_over()
        try:
            self._flush_if_due()
            self._flush_locked()
            self._give_back_excess()
            self._watch_if_due()
            self._claim_if_wanted()
            self._reconcile_if_due()
        except psycopg.Error as error:
            self._after_error(error)
            return
        self._sleep()

    # Lease

    def _register(self) -> None:
        before, ttl = time.monotonic(), self._app.conf.lease_ttl
        tasks = [f"{task}:{version}" for task, version in (*self._app.tasks, *self._app.machines)]
        me = identity.own("worker", self._name, self._queue, self.slot.count, command=os.getppid(), tasks=tasks)
        while True:
            try:
                self._worker = self._link.run(workers.register(me, ttl))
                break
            except psycopg.Error as error:
                self._after_error(error)
        self._seat.deadline = before + ttl
        self._seat.worker_id = self._worker
        self._more = True

    def _start_over(self) -> None:
        """Our lease was found dead: everything we hold belongs to others. Go on under a new id."""
        buffered, commits = self.buffer.take_back(), [*self._locked.clear(), *self.outbox.take(len(self.outbox))]
        self._held.clear()
        self.outbox.settled_all()
        dropped = len(buffered) + len(commits)
        log.warning("%s lost its lease; %d claims are dropped, it goes on under a new id", self._name, dropped)
        reporting.stale(commits)
        self._register()

    # Commit

    def _flush_if_due(self) -> None:
        while self._pacing.flush_is_due():
            self._flush(self.outbox.take(self._app.conf.outcomes_per_commit))

    def _flush(self, batch: Sequence[Commit]) -> None:
        self._commit(batch)

    def _flush_locked(self) -> None:
        """Offer outcomes again that had to wait for another session's lock."""
        if not len(self._locked):
            return
        batch = self._locked.take_due(self._app.conf.outcomes_per_commit)
        if batch:
            began = time.monotonic()
            self._commit(batch, again=True)
            self._locked.took(time.monotonic() - began)

    def _commit(self, batch: Sequence[Commit], *, again: bool = False) -> None:
        """Commit outcomes, and do what follows from that; `again`: those that waited for a lock."""
        owned = [commit for commit in batch if self.owns(commit.claimed)]
        waiting = [commit for commit in owned if commit.flushed is None]
        if self._stopping() or self._seat.paused:
            for commit in waiting:
                if commit.status == "executing":
                    commit.status = "runnable"  # nothing new begins here: somebody else takes the next step
        flushed = Flushed()
        for commit in batch:
            if commit.flushed is not None:  # committed with what its step wrote
                flushed.add(commit.flushed)
        if len(self._locked) and not again:
            held_up = {c.claimed.id: c.claimed.reports_to for c in waiting if self._locked.holds_up(c)}
            flushed.locked |= held_up
            waiting = [commit for commit in waiting if commit.claimed.id not in held_up]
        try:
            if waiting:
                flush = self._flusher.flush_again if again else self._flusher.flush
                flushed.add(flush(self._worker, waiting))
        finally:
            # Whatever could not be committed is no longer known here: reconcile gives it back, to be run again.
            going_on = flushed.committed - flushed.ended
            hops = [c for c in owned if c.status == "executing" and c.claimed.id in going_on]
            still_held = {hop.claimed.id for hop in hops} | flushed.locked.keys()
            for commit in owned:
                if commit.claimed.id not in still_held:
                    self._held.pop(commit.claimed.id, None)
            if len(self._locked):
                self._locked.forget(commit.claimed.id for commit in batch if commit.claimed.id not in flushed.locked)
            if not again:  # else they count as settled since they were put aside
                self.outbox.settled(len(batch))
        waits = [commit for commit in owned if commit.claimed.id in flushed.locked] if flushed.locked else []
        for commit in waits:
            self._locked.put(commit, flushed.locked[commit.claimed.id])
        if hops:
            self._go_on(hops, flushed)
        known = flushed.committed | flushed.locked.keys() if flushed.locked else flushed.committed
        reporting.stale([commit for commit in batch if commit.claimed.id not in known])
        if flushed.unread or flushed.rerun:
            reporting.unread(batch, flushed)
        self._claim_after_flush(flushed)
        if self._queue in flushed.opened:
            self._limited.look_now()
        self._limited.look_soon()
        self._send(self._app.wakeups.became_ready(flushed.ready))
        if any(c.status == "scheduled" or c.timeout is not None for c in batch if c.claimed.id in flushed.committed):
            self._send(self._app.wakeups.due_sooner())
        if waits:
            self._tell_of_locks(waits, flushed)

    def _tell_of_locks(self, waits: Sequence[Commit], flushed: Flushed) -> None:
        """Log, now and then, which outcomes wait for a lock, and who holds it."""
        if time.monotonic() >= self._tell_of_locks_at:
            self._tell_of_locks_at = time.monotonic() + LOCKS_TOLD_EVERY
            wanted = {i for commit in waits for i in (commit.claimed.id, flushed.locked[commit.claimed.id]) if i}
            holders = self._link.run(maintenance.row_holders(sorted(wanted)))
            reporting.put_aside([commit.claimed for commit in waits], holders, len(self._locked))

    def _claim_after_flush(self, flushed: Flushed) -> None:
        """Claim again, unless a colleague does so for all and these outcomes have made nothing runnable here."""
        if self._more or flushed.ready.get(self._queue) or flushed.rerun or not self._lookout.is_covered():
            self._more = True
        elif self._may_sleep():
            self._seat.state = IDLE

    def _go_on(self, hops: Sequence[Commit], flushed: Flushed) -> None:
        """Run the next step of inline machines at once, on the claim that is still held."""
        rows = [hop.next_claim(flushed.inboxes.get(hop.claimed.id)) for hop in hops]
        try:
            rows = self._arrivals.with_inboxes(rows)
        except psycopg.Error:
            for row in rows:
                self._held.pop(row.id, None)  # reconcile, which follows every error, gives them back
            raise
        self.buffer.put_first(rows)

    def _send(self, wakeups: Sequence[Operation[Any]]) -> None:
        self._link.notify(wakeups)

    # Give back

    def _give_back_excess(self) -> None:
        keep = self._pacing.keep(self.slot.began)
        if keep is not None:
            self._release(self.buffer.take_back(keep=keep))

    def _release(self, rows: Sequence[Claimed], reason: str | None = None) -> None:
        if not rows:
            return
        for row in rows:
            self._held.pop(row.id, None)  # first: if the release fails, reconcile finds them
        pairs = [(row.id, row.token) for row in rows]
        if not self._give_back(pairs, reason):
            self._reconcile.again(LOOK_FOR_LOCKED)

    def _give_back(self, pairs: Sequence[tuple[int, int]], reason: str | None) -> bool:
        """Release claims; return whether all could be: rows that other sessions hold are left claimed."""
        counts, whole = self._link.run_around_locks(lambda wait: claims.release(self._worker, pairs, reason, wait=wait))
        self._send(self._app.wakeups.handed_back(counts))
        return whole

    # Claim

    def _demand(self) -> int:
        # Once it has taken all there was, a look would only be in the way of the outcomes.
        if self._locked.full:
            return 0
        isolating = self._alone or (self._suspect and not len(self._locked))
        buffering = not (isolating or self._limited.dry or (self._took_all and not self._more))
        return self._pacing.demand(buffering=buffering)

    def _hear_of_suspect(self) -> None:
        """A row with a crash behind it waits for a process that holds nothing."""
        self._suspect = True

    def _may_sleep(self) -> bool:
        """Whether a claim that finds nothing is followed by sleep until somebody rings for a row."""
        return len(self._held) <= len(self._locked)

    def _have_rows(self) -> None:
        self._seat.state = BUSY

    def _claim_if_wanted(self) -> None:
        demand = self._demand()
        if not demand or time.monotonic() >= self._seat.deadline:
            return
        self._alone = self._alone and len(self._held) > len(self._locked)
        if self._suspect and not self._held:
            self._suspect = False
            rows = self._claimed(self._picker.claim_suspect(self._worker))
            if rows:
                self._alone = True
                self._buffer_rows(rows)
                return
        # A process that slept has looked for limited rows before: its latency is that of unlimited ones.
        due = self._limited.is_due() and not (self._more and self._seat.state == IDLE)
        if self._may_sleep() and (due or self._more):
            # Before the claim that may find nothing: a wake-up between the two then rings us.
            self._seat.state = IDLE
        if (due and self._claim_limited(demand)) or not self._more:
            return
        looking, announced = self._looking, self._announced
        self._looking = self._announced = False
        began = time.monotonic()
        found = self._picker.claim(self._worker, demand)
        if found and not announced:
            self._lookout.found(len(found))
        rows = self._claimed(found)
        self._more, self._took_all = len(found) >= demand, 0 < len(found) < demand
        self._buffer_rows(rows)
        if not self._more:
            self._watch(began)
            if not rows and not due and not looking:  # limited rows are looked for before sleep, not at every look
                self._claim_limited(demand)

    def _watch_if_due(self) -> None:
        """As the lookout: claim, unless a row claimed now would have to wait behind a step."""
        if not self._lookout.is_due():
            return
        if self._held and not self._claims_beside_work():
            self._watch(time.monotonic())
        else:
            self._more = self._looking = True

    def _watch(self, claimed_at: float) -> None:
        """After a claim that took all there was: claim again soon, or have a sleeping colleague do so."""
        if self._held and not self._claims_beside_work() and self._lookout.hand_over():
            return
        self._lookout.watch(claimed_at)

    def _claims_beside_work(self) -> bool:
        """Whether a row that is claimed now begins soon: steps are brief, and no other row waits."""
        mean = self.slot.mean_step
        return mean is not None and mean <= BRIEF_STEP and len(self.buffer) <= 1

    def _claim_limited(self, demand: int) -> bool:
        """Look for limited rows; return whether there were any."""
        position = self._picker.position if self._more or self._took_all else None
        slots, alone, unknown = self.buffer.free, self.slot.runs_suspects and not self._held, self._picker.unknown
        found = self._limited.claim(self._worker, demand, slots, alone, unknown, position)
        rows = self._claimed(found)
        if self._limited.suspect:
            self._hear_of_suspect()
        self._alone |= any(row.crashes for row in rows)
        if rows:
            # A token must not wait behind other rows.
            self.buffer.put_first([row for row in reversed(rows) if row.rate_limit is not None])
            self.buffer.put(row for row in rows if row.rate_limit is None)
            self._have_rows()
        return bool(found)

    def _claimed(self, rows: list[Claimed]) -> list[Claimed]:
        """Take claimed rows in; those that can't be run here are dealt with at once."""
        if not rows:
            return rows
        self._reconcile.holding()
        self._held |= {row.id: row.token for row in rows}
        try:
            return self._arrivals.runnable_here(self._worker, self._arrivals.with_inboxes(rows))
        except psycopg.Error:
            for row in rows:
                self._held.pop(row.id, None)  # reconcile, which follows every error, gives the whole claim back
            raise

    def _buffer_rows(self, rows: list[Claimed]) -> None:
        if rows:
            self.buffer.put(rows)
            self._have_rows()

    def _reconcile_if_due(self) -> None:
        """Give back rows that the database says we hold and we don't know: a claim whose answer was lost."""
        if time.monotonic() >= self._reconcile.at:
            count, whole = self._release_strange()
            reporting.gave_back(self._name, self._queue, count)
            self._reconcile.done(holding=bool(self._held))
            if not whole:
                self._reconcile.again(LOOK_FOR_LOCKED)

    def _release_strange(self, reason: str | None = None) -> tuple[int, bool]:
        """Release claims that the database has and we don't; return how many, and whether all could be released."""
        there = self._link.run(claims.held(self._worker))
        strange = [(instance_id, token) for instance_id, token in there.items() if self._held.get(instance_id) != token]
        return len(strange), not strange or self._give_back(strange, reason)

    def _after_error(self, error: psycopg.Error) -> None:
        """A statement outside of a flush failed: whatever it was about is looked up again, on a new connection."""
        if not self._link.broken(error):
            log.warning("%s: a statement failed, trying on: %s", self._name, advise(error, self._app.schema))
            self._waiting.pause(0.5)
        self._picker.rescan()
        self._more = True
        self._reconcile.failed()

    # Waiting

    def _sleep(self) -> None:
        """Sleep until rung, or until something is due."""
        if self._stop_asked() is not None:
            return
        now = time.monotonic()
        until = min(self._reconcile.at, self._step_connections.idle_since + IDLE_SECONDS, self._saturation.due)
        if len(self._locked):
            until = min(until, self._locked.due)
        pending = len(self.outbox)
        if pending:
            until = min(until, self.outbox.oldest_at + self._app.conf.flush_delay)
        if len(self.buffer):
            began = self.slot.began if self.slot.running else now
            until = min(until, began + BEHIND_A_LONG_STEP + 0.001)
        demand = self._demand()
        if demand and now >= self._seat.deadline:
            until = min(until, now + 0.2)
        elif demand and (self._more or (self._suspect and not self._held)):
            return
        elif demand:
            until = min(until, self._limited.next_at)
        until = min(until, self._lookout.at)
        self.outbox.wake_at = self._app.conf.outcomes_per_commit if pending else 1
        # An outcome that came before wake_at was set rang nobody.
        if len(self.outbox) == pending and not self._pacing.flush_is_due():
            self._poll.poll(poll_timeout(until))
        self.outbox.wake_at = math.inf

    # Shutdown

    def _drain(self) -> None:
        """Give the buffered rows back, let the running step end, commit, give back what is left, end the lease."""
        buffered = self.buffer.take_back()
        self._retried(lambda: self._release(buffered))
        reporting.drained(self._queue, len(buffered), int(self.slot.running))
        self.buffer.close()
        # A process that retires lets its steps take their time, but waits no longer for other sessions' locks.
        locked_until = time.monotonic() + self._app.conf.drain_timeout
        while not self.slot.ended or len(self.outbox) or (len(self._locked) and time.monotonic() < locked_until):
            self._in_drain()
            if len(self.outbox):
                self._flush(self.outbox.take(self._app.conf.outcomes_per_commit))
                continue
            self._flush_locked()
            left = (self._stop_asked() or 0.0) - time.monotonic()
            if left <= 0:
                break
            self.outbox.wake_at = 1
            self._poll.poll(min(50.0, left * 1000))
            self._bell.silence()
        if self.slot.running:
            log.warning("%s stops a step before its end; it runs again elsewhere", self._name)
        if len(self._locked):
            waiting = [commit.claimed.id for commit in self._locked.clear()]
            log.warning(
                "%s stops with %d outcomes that waited for locks of other sessions; these instances run again: %s",
                self._name,
                len(waiting),
                waiting[:20],
            )
        self._retried(self._leave)

    def _in_drain(self) -> None:
        """Called again and again while steps end."""

    def _leave(self) -> None:
        self._held.clear()
        self._release_strange("its worker was shut down")
        self._link.run(workers.bury([self._worker]))

    def _retried(self, action: Callable[[], None]) -> None:
        while True:
            try:
                return action()
            except psycopg.Error as error:
                self._link.broken(error)
                log.warning("%s: %s; trying on", self._name, advise(error, self._app.schema))
                if self._waiting.pause(0.1):
                    raise Stopped from error
