"""Two operations brought together at one point of the first, and what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple

from psycopg import errors
from psycopg.pq import TransactionStatus

from durable import DuplicateError
from durable.instance import Claimed
from durable.storage.admission import Admitted
from tests.fix_rows import Session
from tests.interleaving import Held
from tests.races.pairs.operations import OPERATIONS
from tests.races.pairs.world import NEW, SCHEMA, Producer, Scene, Shape, State, Traits, World

Turns = tuple[tuple[str, int], ...]
"""Operations and the sides that they are on, one after the other."""

MOST_TURNS = 8


class Ended(NamedTuple):
    """How everything stood, what the two answered, whether the second waited for the first."""

    state: State
    answers: tuple[Any, Any]
    waited: bool = False


class Refused(str):
    """An answer: the error that an operation ended with, as its caller expects of it."""


class Pair:
    """Sessions for two operations, each as a worker's and as a producer's; and one that makes and watches the world."""

    def __init__(self, dsn: str) -> None:
        self.world = World(dsn)
        self._sessions = [{True: Session(dsn, SCHEMA), False: Producer(dsn)} for _ in range(2)]
        self._blocker = Producer(dsn)
        self._threads = ThreadPoolExecutor(2)
        self._alone: dict[tuple[Any, ...], Ended] = {}
        self._statements: dict[tuple[Any, ...], Sequence[str]] = {}
        self._settled: dict[tuple[Any, ...], Shape] = {}

    def close(self) -> None:
        self._threads.shutdown()
        for session in [self.world, self._blocker, *(s for kinds in self._sessions for s in kinds.values())]:
            session.connection.close()

    def session(self, name: str, side: int) -> Session:
        return self._sessions[side][OPERATIONS[name].pinned]

    def one_after_the_other(self, traits: Traits, target: int, order: Turns) -> Ended:
        """What operations come to without meeting; `order` of (name, side)."""
        key = (traits, target, order)
        if key not in self._alone:
            self._alone[key] = self._end(*self._serially(traits, target, order))
        return self._alone[key]

    def _serially(self, traits: Traits, target: int, order: Turns) -> list[Any]:
        self.world.make(traits)
        answers: list[Any] = [None, None]
        for name, side in order:
            answers[side] = self._run(name, Scene(traits, target, side))
        return answers

    def statements(self, traits: Traits, target: int, name: str) -> Sequence[str]:
        """The statements of an operation that meets nobody."""
        key = (traits, target, name)
        if key not in self._statements:
            self._statements[key] = self._all_statements(*key)
        return self._statements[key]

    def _all_statements(self, traits: Traits, target: int, name: str) -> Sequence[str]:
        self.world.make(traits)
        held = Held(self.session(name, 0), OPERATIONS[name].make(Scene(traits, target, 0)))
        names = []
        try:
            while (statement := held.step()) is not None:
                names.append(statement)
        except errors.UniqueViolation:
            pass
        held.rollback()
        return names

    def meet(self, traits: Traits, target: int, first: str, second: str, at: int, commits: bool) -> Ended:
        """Hold the first after so many statements, let the second go as far as it can, then end the first."""
        self.world.make(traits)
        held = Held(self.session(first, 0), OPERATIONS[first].make(Scene(traits, target, 0)))
        try:
            for _ in range(at):
                held.step()
            future = self._go(second, Scene(traits, target, 1))
            waited = not future.done()
            answer = answered(held.commit) if commits else None
        finally:
            if held.session.connection.info.transaction_status != TransactionStatus.IDLE:
                held.rollback()
        return Ended(*self._end(answer, future.result(20))[:2], waited)

    def behind(self, traits: Traits, target: int, first: str, second: str, row: int) -> Ended:
        """Let both wait in turn while a third holds one row, in the middle of a statement that locks several."""
        self.world.make(traits)
        blocker = self._blocker
        blocker.connection.execute("BEGIN")
        blocker.fetch("SELECT FROM {schema}.instances WHERE id = %s FOR UPDATE", [row])
        try:
            futures = [self._go(name, Scene(traits, target, side)) for side, name in enumerate((first, second))]
        finally:
            blocker.connection.execute("ROLLBACK")
        first_answer, second_answer = (future.result(20) for future in futures)
        return self._end(first_answer, second_answer)

    def settle(self, traits: Traits, target: int, turns: Turns) -> Shape:
        """Let these take turns until nothing changes any more; return what that comes to, whoever claims what."""
        before, after = None, self.world.state()
        for _ in range(MOST_TURNS):
            if before == after:
                return after.shape(whoever=True)
            self.world.run_on()
            for name, side in turns:
                self._run(name, Scene(traits, target, side))
            before, after = after, self.world.state()
        raise AssertionError(f"{turns} never come to rest: {before} {after}")

    def settled(self, traits: Traits, target: int, order: Turns, turns: Turns) -> Shape:
        """What it comes to when operations that did not meet have taken their turns."""
        key = (traits, target, order, turns)
        if key not in self._settled:
            self._serially(traits, target, order)
            self._settled[key] = self.settle(traits, target, turns)
        return self._settled[key]

    def _end(self, *answers: Any) -> Ended:
        return Ended(self.world.state(), (answers[0], answers[1]))

    def _run(self, name: str, scene: Scene) -> Any:
        session = self.session(name, scene.side)
        return answered(lambda: session.atomically(OPERATIONS[name].make(scene)))

    def _go(self, name: str, scene: Scene) -> Future[Any]:
        """Start an operation in a thread; return when it is through or waits for a lock."""
        future = self._threads.submit(self._run, name, scene)
        pid = self.session(name, scene.side).pid
        waits = f"SELECT FROM pg_stat_get_activity({pid}) WHERE wait_event_type = 'Lock'".encode()
        until = time.monotonic() + 20
        while not wait_for([future], 0.001).done and not self.world.connection.execute(waits).rowcount:
            assert time.monotonic() < until, f"{name} neither went through nor waited for a lock"
        return future


def answered(action: Callable[[], Any]) -> Any:
    """Return an answer in plain values, or which refusal it was. A deadlock is none."""
    try:
        return plain(action())
    except (DuplicateError, errors.UniqueViolation, errors.UndefinedTable) as error:  # the last: a day that is gone
        return Refused(type(error).__name__)


def plain(value: Any) -> Any:
    """Return an answer so that it can be compared: without clocks, and without ids that were drawn."""
    if isinstance(value, Claimed):
        return [value.id, value.token]
    if isinstance(value, Admitted):
        return plain([value.rows, value.ready, value.parked])
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(part) for part in value)
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return "new" if type(value) is int and value >= NEW else value
