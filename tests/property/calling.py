"""The events of producers and people: every call of the API is made to the database and to the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from durable import DuplicateError, TaskFailed
from durable.errors import NoTargetError
from durable.storage import inspection
from tests.property.machine import EVENTS, PICKS, Working
from tests.property.model import Instance
from tests.property.program import options, state_of
from tests.property.specs import KEYS, NAMES, events, mostly, specs, tagged
from tests.property.world import QUEUES, SEATS

UNKNOWN = 10**12
_MESSAGES = st.fixed_dictionaries(
    {
        "pick": PICKS,
        "by_key": mostly(False, True),
        "name": st.sampled_from(NAMES),
        "payload": st.integers(0, 9),
        "dedup_key": st.sampled_from([None, None, "d1", "d2"]),
    }
)
_CONFLICT = mostly("raise", "return")
_ACTIONS = st.one_of(specs(), _MESSAGES)
_STEERS = ["cancel", "cascade", "cancel by key", "retry", "retry", "retry"]
_ORDERS = ["pause", "resume", "resume", "purge", "collect", "collect"]
_EVENTS = [
    *EVENTS,
    (
        3,
        "insert",
        {
            "drawn": st.lists(specs(), min_size=1, max_size=3),
            "how": mostly("one", "many", "batch"),
            "conflict": _CONFLICT,
        },
    ),
    (1, "in_a_transaction", {"actions": st.lists(_ACTIONS, min_size=1, max_size=3), "commits": st.booleans()}),
    (
        3,
        "signal",
        {"messages": st.lists(_MESSAGES, min_size=1, max_size=4), "together": st.booleans(), "claims": st.booleans()},
    ),
    (2, "steer", {"pick": PICKS, "what": st.sampled_from(_STEERS)}),
    (1, "administer", {"queue": st.sampled_from(QUEUES), "what": st.sampled_from(_ORDERS)}),
]


class Calling(Working):
    """A machine whose database is also called by the API."""

    @rule(event=events(_EVENTS), spare=specs())
    def then(self, event: tuple[str, dict[str, Any]], spare: dict[str, Any]) -> None:
        """One event; where nothing lives, something is there to be hit."""
        if not any(i.live for i in self.model.instances.values()):
            self.start(tagged(spare, self.tags))
        name, given = event
        getattr(self, name)(**given)

    # Producing

    def insert(self, drawn: list[dict[str, Any]], how: str, conflict: str) -> None:
        given = [tagged(spec, self.tags) for spec in drawn]
        if how != "one":
            self.start_many(given, how == "batch")
            return
        for spec in given:
            self.start(spec, conflict)

    def start(self, spec: dict[str, Any], on_conflict: str = "raise", connection: Any = None) -> None:
        if not self.model.free(spec):
            occupant = self.model.occupant(spec["key"])
            if on_conflict == "return":
                assert self.send(spec, on_conflict, connection).id == occupant
                return
            with pytest.raises(DuplicateError) as refused:
                self.send(spec, on_conflict, connection)
            assert (refused.value.correlation_key, refused.value.existing_id) == (spec["key"], occupant)
            return
        instance_id = self.send(spec, on_conflict, connection).id
        assert all(instance_id > other for other in self.model.instances), "ids only grow"
        self.model.born(instance_id, spec)

    def send(self, spec: dict[str, Any], on_conflict: str, connection: Any) -> Any:
        """Insert a spec by the call that people would use for it."""
        target, state = self.world.programs.target(spec), state_of(spec)
        given = options(spec, "countdown")
        if spec["kind"] == "walk":
            if given == {"queue": "default", "priority": 0} and connection is None:
                return target.delay(**state)
            given = options(spec, "schedule_in")
            return self.world.app.insert(target, state=state, on_conflict=on_conflict, connection=connection, **given)
        if given == {"queue": "default", "priority": 0} and connection is None:
            return target.delay(*state["args"])
        return target.apply_async(tuple(state["args"]), on_conflict=on_conflict, connection=connection, **given)

    def start_many(self, given: list[dict[str, Any]], batch: bool) -> None:
        """Of one key the first counts; the others are dropped and said to be."""
        app, entries = self.world.app, [self.world.programs.entry(spec) for spec in given]
        if batch:
            with app.batch() as collected:
                results = [app.insert(target, **named) for target, named in entries]
            dropped = [n for n, result in enumerate(results) if result in collected.duplicates]
            ids = [result.id for n, result in enumerate(results) if n not in dropped]
        else:
            ids = [result.id for result in app.insert_many(entries)]
        for n, spec in enumerate(given):
            free = self.model.free(spec)
            assert not batch or free == (n not in dropped)
            if free:
                self.model.born(ids.pop(0), spec)
        assert not ids, "more were inserted than had a free key"

    def in_a_transaction(self, actions: list[dict[str, Any]], commits: bool) -> None:
        """Nobody sees what a caller's transaction holds until it commits, and never if it does not."""
        before = copy.deepcopy(self.model)
        with self.world.callers.transaction(force_rollback=not commits):
            for action in actions:
                if "kind" in action:
                    self.start(tagged(action, self.tags), connection=self.world.callers)
                else:
                    self.deliver(action, connection=self.world.callers)
            assert list(self.world.differences(before)) == []
        if not commits:
            self.model = before

    # Signals

    def target(self, message: dict[str, Any]) -> int | str:
        """A key, or one of all instances; now and then one that never was."""
        pick = message["pick"]
        if message["by_key"]:
            return KEYS[pick % len(KEYS)]
        parked = [i.id for i in self.model.instances.values() if i.status == "awaiting_signal"]
        if parked and pick % 3:
            return parked[pick // 3 % len(parked)]
        return UNKNOWN if pick == 999 else self.instance(pick).id

    def deliver(self, message: dict[str, Any], connection: Any = None) -> None:
        target, name, payload, dedup = self.target(message), message["name"], message["payload"], message["dedup_key"]
        meant = self.model.deliver(target, name, payload, dedup)
        if meant is None:
            with pytest.raises(NoTargetError):
                self.world.app.signal(target, name, payload, dedup_key=dedup, connection=connection)
        else:
            assert self.world.app.signal(target, name, payload, dedup_key=dedup, connection=connection) is meant

    def signal(self, messages: list[dict[str, Any]], together: bool, claims: bool) -> None:
        if together:
            self.deliver_many(messages)
        for message in [] if together else messages:
            self.deliver(message)
        if claims:
            self.claim(list(range(len(SEATS))))

    def deliver_many(self, messages: list[dict[str, Any]]) -> None:
        given = [
            {"target": self.target(m), "name": m["name"], "payload": m["payload"], "dedup_key": m["dedup_key"]}
            for m in messages
        ]
        meant = [self.model.deliver(m["target"], m["name"], m["payload"], m["dedup_key"]) for m in given]
        assert self.world.app.signal_many(given) == meant

    # Steering

    def steer(self, pick: int, what: str) -> None:
        if what == "retry":
            self.retry(pick)
            return
        parents = [i.id for i in self.model.instances.values() if i.rounds]
        target: int | str = self.instance(pick).id
        if what == "cancel by key":
            target = KEYS[pick % len(KEYS)]
        elif what == "cascade" and parents:
            target = parents[pick % len(parents)]
        found = self.model.occupant(target) if isinstance(target, str) else target
        meant = found is not None and self.model.cancel(found, what == "cascade")
        assert self.world.app.cancel(target, cascade=what == "cascade") is meant

    def retry(self, pick: int) -> None:
        """A failed one, rather a child; where there is none, one of which that can't be done."""
        failed = [i for i in self.model.instances.values() if i.status == "failed"]
        failed = [i for i in failed if i.parent_round is not None and pick % 2] or failed
        self.retry_one(failed[pick % len(failed)].id if failed else self.instance(pick).id)

    def retry_one(self, instance_id: int) -> None:
        rival = self.model.rival(instance_id)
        if rival is None:
            assert self.world.app.retry(instance_id) is self.model.retry(instance_id)
            return
        with pytest.raises(DuplicateError) as refused:
            self.world.app.retry(instance_id)
        assert refused.value.existing_id == rival

    def administer(self, queue: str, what: str) -> None:
        paused = self.model.paused
        match what:
            case "pause":
                assert self.world.app.pause(queue) is (queue not in paused)
                paused.add(queue)
            case "resume":
                assert self.world.app.resume(queue) is (queue in paused)
                paused.discard(queue)
            case "purge":
                assert self.world.run(inspection.purge(queue)) == self.model.purge(queue)
            case "collect":
                self.world.collect()
                self.model.collect()

    # The end

    def epilogue(self) -> None:
        """Sweep, retry what failed, wake who sleeps and rob whoever runs for it."""
        self.administer("default", "collect")
        for instance_id in [i.id for i in self.model.instances.values() if i.status == "failed"]:
            self.retry_one(instance_id)
        self.is_as_foretold()
        self.come_to_rest()
        for i in [i for i in self.model.instances.values() if i.status == "awaiting_signal"]:
            for name in i.awaits or ():
                assert self.world.app.signal(i.id, name) is self.model.deliver(i.id, name, None, None)
        self.claim([0, 0, 1, 2])
        for step in list(self.flying):
            self.take_away(step, "hand back")
            self.take(step.seat)
            self.flush_late(step)
            self.is_as_foretold()

    def everything_can_be_read(self) -> None:
        assert self.world.app.result(UNKNOWN).status == "not_found"
        for i in self.model.instances.values():
            self.read(i)

    def read(self, i: Instance) -> None:
        result = self.world.app.result(i.id)
        assert (result.status, result.ready(), result.attempts) == (i.status, not i.live, i.version)
        if i.rounds:
            family = [c.id for _, c in sorted(self.model.instances.items()) if c.parent_id == i.id]
            assert [child.id for child in result.children] == family
        if i.live:
            assert result.result is None
        elif i.status == "done":
            assert result.get(timeout=0) == i.result
        else:
            with pytest.raises(TaskFailed) as failure:
                result.get(timeout=0)
            assert failure.value.error_type == i.error
