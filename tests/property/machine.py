"""The events of workers: what they do to the database they do to the model.

After every event all of the database is compared with the model. At the end everything that can go on goes on, until
each instance has ended or waits for what nobody has sent.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

from durable.instance import Claimed
from durable.storage import workers
from durable.storage.claims import Commit
from tests.property.model import MOST_CRASHES, Flight, Instance, Model
from tests.property.world import QUEUES, SEATS, World

MOST_ROUNDS = 300
PICKS = st.integers(0, 999)
SEAT = st.integers(0, len(SEATS) - 1)

_DUTIES = [(), ("promote",), ("time out",), ("promote", "time out"), ("promote", "time out")]
_THEN = ["", "again", "again, late", "again, late", "late"]
EVENTS: list[tuple[int, str, dict[str, Any]]] = [
    (3, "claim", {"seats": st.lists(SEAT, min_size=1, max_size=3)}),
    (3, "commit", {"pick": PICKS, "together": st.booleans()}),
    (5, "work", {"seat": SEAT, "steps": st.integers(2, 8)}),
    (2, "commit_late", {"picks": st.lists(PICKS, min_size=1, max_size=3)}),
    (1, "trouble", {"seat": SEAT, "what": st.sampled_from(["lapse", "start over", "reap", "reap"])}),
    (
        3,
        "rob",
        {"pick": PICKS, "how": st.sampled_from(["hand back", "give up", "die"]), "then": st.sampled_from(_THEN)},
    ),
    (2, "tick", {"minutes": st.sampled_from([0, 1, 1, 5]), "duties": st.sampled_from(_DUTIES)}),
]


@dataclass(frozen=True)
class Step:
    """A step that a seat has run: what it really ends in, and what the model says."""

    seat: int
    commit: Commit
    flight: Flight


class Working(RuleBasedStateMachine):
    """A machine whose events are what workers do, die of and are late with."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.world.reset()
        self.model = Model()
        self.tags = itertools.count(1)
        self.flying: list[Step] = []
        self.ghosts: list[Step] = []
        """Steps whose outcome was committed or whose claim may be lost; none of them may commit again."""
        self.lapsed: set[int] = set()

    @invariant()
    def is_as_foretold(self) -> None:
        differences = list(self.world.differences(self.model))
        assert not differences, "\n".join(differences)

    def instance(self, pick: int) -> Instance:
        """A live instance; with every fourth pick any."""
        found = [i for _, i in sorted(self.model.instances.items()) if i.live or not pick % 4]
        return (found or list(self.model.instances.values()))[-1 - pick // 4 % max(1, len(found))]

    def worker(self, seat: int) -> int:
        return self.world.drivers[seat].worker

    # Claims

    def claim(self, seats: list[int]) -> None:
        for seat in seats:
            self.take(seat)

    def take(self, seat: int) -> bool:
        """Claim one row, the right one, and run its step; whether there was one."""
        rows = self.world.rows()
        found = self.world.drivers[seat].claims(1)
        assert len(found) <= 1
        flight = None if seat in self.lapsed else self.foretold(seat, rows, found)
        assert [row.id for row in found] == ([] if flight is None else [flight.id])
        if flight is not None:
            self.fly(seat, found[0], flight)
        return flight is not None

    def foretold(self, seat: int, rows: dict[int, Any], found: list[Claimed]) -> Flight | None:
        """The claim that had to be made. Among limited rows the database may choose the key."""

        def place(i: Instance) -> Any:
            return i.priority, rows[i.id]["eligible_at"], i.id

        queue, worker = SEATS[seat], self.worker(seat)
        for suspect in (False, True):
            candidates = self.model.claimable(queue, suspect=suspect)
            if candidates and (flight := self.model.claim(min(candidates, key=place).id, worker)):
                return flight
        limited = self.model.claimable(queue, limited=True)
        if not found:
            stuck = [i for i in limited if self.only_here(i)]
            assert not stuck, f"nothing was claimed, but instance {stuck[0].id} may go"
            return None
        chosen = [i for i in limited if i.id == found[0].id]
        assert chosen, f"instance {found[0].id} was claimed and is not claimable"
        best = min((i for i in limited if i.limit == chosen[0].limit), key=place)
        return self.model.claim(best.id, worker)

    def only_here(self, i: Instance) -> bool:
        """Whether nobody waits for a row's key in another queue, whose turn it might be."""
        waiting = [o for o in self.model.instances.values() if o.limit == i.limit and o.status == "runnable"]
        return all(o.queue == i.queue for o in waiting)

    def fly(self, seat: int, claimed: Claimed, flight: Flight) -> None:
        assert (claimed.token, claimed.version) == (flight.token, flight.version)
        self.flying.append(Step(seat, self.world.drivers[seat].execute(claimed), flight))

    # Outcomes

    def flush_steps(self, seat: int, steps: list[Step]) -> None:
        """Commit outcomes of one seat together, and run the next steps of inline hops."""
        driver = self.world.drivers[seat]
        committed = driver.flush(*(step.commit for step in steps))
        assert sorted(committed) == self.model.flush([step.flight for step in steps], self.world.child)
        self.flying = [step for step in self.flying if step not in steps]
        self.ghosts = [*self.ghosts, *steps][-30:]
        if len(driver.engine.buffer):
            hops = driver.claims()
            assert {hop.id for hop in hops} == {i for i in committed if self.model.instances[i].status == "executing"}
            for hop in hops:
                self.fly(seat, hop, self.model.look(hop.id))

    def of_seat(self, seat: int) -> list[Step]:
        return [step for step in self.flying if step.seat == seat]

    def picked(self, pick: int) -> Step | None:
        """A step that is not committed, maybe one that was shown signals; one is claimed where there is none."""
        for seat in range(len(SEATS)):
            if not self.flying:
                self.take(seat)
        flying = [step for step in self.flying if step.flight.shown and pick % 2] or self.flying
        return flying[pick % len(flying)] if flying else None

    def commit(self, pick: int, together: bool) -> None:
        if step := self.picked(pick):
            self.flush_steps(step.seat, self.of_seat(step.seat) if together else [step])

    def work(self, seat: int, steps: int) -> None:
        """Claim and commit, as in quiet times; a worker that found nothing since its lease is gone starts over."""
        for _ in range(steps):
            if self.take(seat):
                self.flush_steps(seat, self.of_seat(seat))
        if seat in self.lapsed:
            self.start_over([seat])
        if self.world.app.resume(SEATS[seat]):
            self.model.paused.remove(SEATS[seat])

    def commit_late(self, picks: list[int]) -> None:
        """Outcomes come from workers that do not know that their claim is gone, or that they have committed."""
        for pick in picks if self.ghosts else []:
            self.flush_late(self.ghosts[-1 - pick % len(self.ghosts)])

    def flush_late(self, step: Step) -> None:
        flusher = self.world.drivers[step.seat]._flusher
        committed = flusher.flush(step.flight.worker, [step.commit]).committed
        assert sorted(committed) == self.model.flush([step.flight], self.world.child)

    # Deaths

    def forget(self, steps: list[Step]) -> None:
        self.flying = [step for step in self.flying if step not in steps]
        self.ghosts += steps

    def start_over(self, seats: Sequence[int]) -> None:
        for seat in seats:
            self.forget(self.of_seat(seat))
            self.world.drivers[seat].engine._start_over()
            self.lapsed.discard(seat)

    def trouble(self, seat: int, what: str) -> None:
        """A worker stands still and its lease runs out; it notices, or another takes its place; rows are taken back."""
        match what:
            case "lapse":
                self.world.lapse(self.worker(seat))
                self.lapsed.add(seat)
            case "start over":
                self.start_over(sorted(self.lapsed))
            case "reap":
                alive = {self.worker(seat) for seat in range(len(SEATS)) if seat not in self.lapsed}
                self.world.reap()
                self.model.reap({i.worker for i in self.model.instances.values() if i.worker} - alive)

    def rob(self, pick: int, how: str, then: str) -> None:
        """Take a claim away before the commit. Maybe the same seat has it again, and the first outcome comes late."""
        step = self.picked(pick)
        if step is None:
            return
        if how == "die":
            for what in ("lapse", "start over", "reap"):
                self.trouble(step.seat, what)
        else:
            self.take_away(step, how)
        if "again" in then:
            self.take(step.seat)
        if "late" in then:
            self.flush_late(step)

    def take_away(self, step: Step, how: str) -> None:
        driver, claimed = self.world.drivers[step.seat], step.commit.claimed
        if how == "give up":
            driver.run(workers.give_up(step.flight.worker, [(claimed.id, claimed.token, "slow")], MOST_CRASHES))
            driver.engine._held.pop(claimed.id, None)
            self.model.give_up(step.flight)
        else:
            driver.engine._release([claimed])
            self.model.release(step.flight)
        self.forget([step])

    # Time

    def tick(self, minutes: int, duties: Sequence[str]) -> None:
        if minutes:
            self.world.travel(60 * minutes)
            self.model.now += 60 * minutes
        if "promote" in duties:
            self.world.promote()
            self.model.promote()
        if "time out" in duties:
            self.world.time_out()
            self.model.time_out()

    # The end

    def teardown(self) -> None:
        if sys.exc_info()[0] is None:
            self.come_to_rest()
            self.epilogue()
            self.come_to_rest()
            self.everybody_has_ended_or_waits()
            self.everything_can_be_read()

    def epilogue(self) -> None:
        """What hits families that have come far."""

    def everything_can_be_read(self) -> None:
        """What producers are told of every instance."""

    def come_to_rest(self) -> None:
        for queue in QUEUES:
            self.world.app.resume(queue)
        self.model.paused.clear()
        for what in ("start over", "reap"):
            self.trouble(0, what)
        for _ in range(MOST_ROUNDS):
            busy = False
            for seat in range(len(SEATS)):
                if steps := self.of_seat(seat):
                    self.flush_steps(seat, steps)
                busy |= bool(self.of_seat(seat)) or self.take(seat)
            if busy:
                continue
            waiting = self.model.instances.values()
            if not any(i.status in ("scheduled", "runnable") or (i.live and i.deadline is not None) for i in waiting):
                break
            self.tick(60, ("promote", "time out"))
        self.is_as_foretold()

    def everybody_has_ended_or_waits(self) -> None:
        instances = self.model.instances.values()
        for i in instances:
            children = [c for c in instances if c.parent_id == i.id and c.parent_round is not None and c.live]
            waits = i.status == "awaiting_signal" or (i.status == "awaiting_children" and children)
            assert not i.live or waits, f"instance {i.id} is {i.status} and does not go on"
