"""Faults that are somebody else's open transactions: a session that is none of ours holds rows for seconds.

Its locks may keep waiting only what needs those very rows. Each is let go by a commit or a rollback.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from durable.errors import DurableError
from tests.chaos.application import REPORT, SCHEMA, TICK
from tests.chaos.client import Log
from tests.chaos.faults import Fault, Made, Missed, World
from tests.chaos.model import Spec

LOOK = 0.1
SECONDS = (0.5, 3.0, 4.0, 7.0)
"""For how long: less and more than a lease."""
WANTED = 5.0
"""Seconds after which a row that was free again and that nobody has touched was wanted by nobody."""
WAITS = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
RUNNABLE = f"""SELECT count(*) FROM (SELECT FROM {SCHEMA}.instances
    WHERE status = 'runnable' AND lane IS NULL AND crashes = 0 LIMIT 20) AS w"""


class Held(Fault):
    """Holds what `lock` locks."""

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        """Lock something in the open transaction; return ids of instances that are kept. Raises Missed."""
        raise NotImplementedError

    def make(self, world: World, dice: random.Random) -> Made:
        seconds, commits = dice.choice(SECONDS), dice.random() < 0.5
        with session(world) as holder, world.postgres.connect() as looker:
            ids = self.lock(holder, world, dice)
            before = _state(looker, ids)
            waited, work, until = 0, [], time.monotonic() + seconds
            while time.monotonic() < until:
                waited = max(waited, _number(looker, WAITS, [holder.info.backend_pid]))
                work.append(_number(looker, RUNNABLE) > 0)
                time.sleep(LOOK)
            released = time.monotonic()
            holder.commit() if commits else holder.rollback()
            wanted = waited > 0 or self.wanted(looker, ids, before)
        if not wanted:
            raise Missed("nobody wanted what was held")
        waiting = sum(work) / len(work)  # how often there was work that no process had taken
        made = {"seconds": seconds, "waited": waited, "waiting": waiting, "released": released, "rows": len(ids)}
        return {**made, **self.concerns(world, ids)}

    def concerns(self, world: World, ids: list[int]) -> Made:
        """Return what the fault log keeps about what was held."""
        return {}

    def wanted(self, looker: psycopg.Connection[Any], ids: list[int], before: list[Any]) -> bool:
        """Whether somebody does something to a held row once it is free."""
        until = time.monotonic() + WANTED
        while time.monotonic() < until:
            if _state(looker, ids) != before:
                return True
            time.sleep(LOOK)
        return False


@contextmanager
def session(world: World) -> Iterator[psycopg.Connection[Any]]:
    """Open the foreign session; what it holds is let go at the end of the block."""
    connection = psycopg.connect(world.postgres.dsn, application_name="chaos stranger", connect_timeout=5)
    try:
        connection.execute("SET lock_timeout = '3s'")
        yield connection
    finally:
        connection.close()


def _number(connection: psycopg.Connection[Any], query: str, params: Any = None) -> int:
    row = connection.execute(query, params).fetchone()
    return int(row[0]) if row else 0


def _state(connection: psycopg.Connection[Any], ids: list[int]) -> list[Any]:
    return connection.execute(
        f"SELECT id, status, token, version, children_pending FROM {SCHEMA}.instances WHERE id = ANY(%s) ORDER BY id",
        [ids],
    ).fetchall()


def _lock(holder: psycopg.Connection[Any], where: str, limit: int, table: str = "instances") -> list[int]:
    """Lock some rows, by chance; return their ids. Raises Missed when there are none."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        rows = holder.execute(
            f"SELECT id FROM {SCHEMA}.{table} WHERE {where} ORDER BY random() LIMIT %s FOR UPDATE SKIP LOCKED", [limit]
        ).fetchall()
        if rows:
            return [row[0] for row in rows]
        holder.rollback()
        time.sleep(0.05)
    raise Missed(f"no rows where {where}")


class HeldInstances(Held):
    """Rows of instances that run, and that wait to run."""

    name, weight = "held-instances", 2.0

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        status = dice.choice(("executing", "executing", "runnable", "awaiting_signal", "scheduled"))
        return _lock(holder, f"status = '{status}'", dice.choice((1, 3, 20)))


class HeldParent(Held):
    """A parent whose barrier every end of a child lowers."""

    name, weight = "held-parent", 1.5

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        return _lock(holder, "status = 'awaiting_children'", dice.choice((1, 3)))


class HeldSignal(Held):
    """A signal in a caller's transaction that is not committed yet, to an instance that runs, or to a parent."""

    name, weight = "held-signal", 1.5

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        status = dice.choice(("executing", "awaiting_children", "awaiting_signal"))
        ids = _lock(holder, f"status = '{status}' AND machine <> 'poison'", 1)
        try:
            world.app.signal(ids[0], "note", {"from": "a stranger"}, connection=holder)
        except DurableError as error:
            raise Missed(f"no signal: {error}") from error
        return ids


class HeldKey(Held):
    """An insert in a caller's transaction that holds the correlation key of a schedule."""

    name, weight = "held-key", 1.5

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        name = f"{self.name}-{world.number()}"
        spec = Spec(name, "job", "job", {"k": name, "fails": 0})
        log = Log(world.fleet.clients / f"{name}.jsonl")
        log.write(call=f"{name}:1", op="insert", type="invoke", specs=[spec.as_json()])  # unknown: held, who knows
        machine, options = spec.entry()
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                return [world.app.insert(machine, connection=holder, correlation_key=REPORT, **options).id]
            except DurableError:  # the schedule's own instance has it
                holder.rollback()
                time.sleep(0.02)
        raise Missed("the key was never free")

    def wanted(self, looker: psycopg.Connection[Any], ids: list[int], before: list[Any]) -> bool:
        return True  # the schedule wants it every TICK


class HeldSchedule(Held):
    """The row of a schedule."""

    name, weight = "held-schedule", 1.0

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        holder.execute(f"SELECT FROM {SCHEMA}.schedules WHERE name = 'report' FOR UPDATE")
        return []

    def wanted(self, looker: psycopg.Connection[Any], ids: list[int], before: list[Any]) -> bool:
        time.sleep(2 * TICK)
        return True


class HeldWorker(Held):
    """The row of a worker: its lease, as an operator's `SELECT ... FOR UPDATE` might hold it."""

    name, weight = "held-worker", 0.7

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        locked = _lock(holder, "dead_at IS NULL", 1, "workers")
        return [_number(holder, f"SELECT pid FROM {SCHEMA}.workers WHERE id = ANY (%s)", [locked])]

    def concerns(self, world: World, ids: list[int]) -> Made:
        return {"pids": ids, "place": world.fleet.homes.get(ids[0])}  # the agent renews the leases of all its children

    def wanted(self, looker: psycopg.Connection[Any], ids: list[int], before: list[Any]) -> bool:
        return True  # each heartbeat wants it


class HeldLimit(Held):
    """Rows of gates or buckets: what they limit has to wait, and nothing else."""

    name, weight = "held-limit", 1.0

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        table = dice.choice(("gates", "buckets"))
        rows = holder.execute(
            f"SELECT FROM {SCHEMA}.{table} ORDER BY random() LIMIT 2 FOR UPDATE SKIP LOCKED"
        ).fetchall()
        if not rows:
            raise Missed(f"no {table}")
        return []

    def wanted(self, looker: psycopg.Connection[Any], ids: list[int], before: list[Any]) -> bool:
        return True  # of each key and partition there is always work


class HeldDuty(Held):
    """The rows by which processes agree on who does a duty."""

    name, weight = "held-duty", 0.7

    def lock(self, holder: psycopg.Connection[Any], world: World, dice: random.Random) -> list[int]:
        holder.execute(f"SELECT FROM {SCHEMA}.duties FOR UPDATE")
        return []

    def wanted(self, looker: psycopg.Connection[Any], ids: list[int], before: list[Any]) -> bool:
        return True  # the limits are looked after several times a second
