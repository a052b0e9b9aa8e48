"""Two worker commands and two beats on everything at once, some of them killed: a checker decides every bound.

What is written down, all of it by the database's clock:

* {schema}_inside   each step that has a key, on a connection of its own: when it came in and when it went out.
* {schema}_effects  what each step does with `ctx.connection`: it must be there once, for every step that happened.
* {schema}_grants   by a trigger, each claim of a row with a rate limit: its transaction's beginning, its own moment.
* {schema}_firings  by a trigger, each step of a schedule from one next occurrence to another.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import fix_db
from tests.acceptance.bounds import Firing, Grant, Inside, most_at_once, not_once, too_fast, wrongly_fired
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.test_docs import load

schema = fix_db.schema  # processes of its own

BODY = """
import os, time
import psycopg
from durable import Await, ConcurrencyLimit, Done, Machine, Next, RateLimit, ScheduleChildren, every, step
from durable.context import current
from durable.limit_rows import LimitRows

app.limit_rows = LimitRows({"mail": RateLimit(40, 1.0, burst=5)}, {"vendor": ConcurrencyLimit(3, shards=2)})
_connections = {}

def during(what, seconds):
    if os.getpid() not in _connections:
        _connections[os.getpid()] = psycopg.connect(app.dsn(), autocommit=True)
    notes = _connections[os.getpid()]
    (row,) = notes.execute(
        f"INSERT INTO {app.schema}_inside (what, began) VALUES (%s, clock_timestamp()) RETURNING id", [what]
    ).fetchone()
    time.sleep(seconds)
    notes.execute(f"UPDATE {app.schema}_inside SET ended = clock_timestamp() WHERE id = %s", [row])

def effect(ctx, step):
    ctx.connection.execute(f"INSERT INTO {app.schema}_effects (instance, step) VALUES (%s, %s)", [ctx.id, step])

@app.task(name="work")
def work(what="", seconds=0.003):
    effect(current(), "run")
    if what:
        during(what, seconds)

@app.periodic(every(0.5), misfire="all")
@app.task(name="tick")
def tick():
    effect(current(), "run")

@app.machine(name="Chain", inline=True)
class Chain(Machine):
    @step(initial=True)
    def one(self, ctx):
        effect(ctx, "one")
        during("acct:chain", 0.003)
        return Next(self.two)

    @step
    def two(self, ctx):
        effect(ctx, "two")
        during("acct:chain", 0.003)
        return Next(self.three, concurrency_key="vendor:chain", rate_limit="mail:chain")

    @step
    def three(self, ctx):
        effect(ctx, "three")
        during("vendor:chain", 0.003)
        return Done()

@app.machine(name="Order")
class Order(Machine):
    @step(initial=True)
    def reserve(self, ctx):
        effect(ctx, "reserve")
        during("acct:order", 0.002)
        gated = {"args": ("vendor:0", 0.005), "concurrency_key": "vendor:0"}
        return ScheduleChildren([(work, gated), (work, {"rate_limit": "mail:0"})], then=self.paid)

    @step
    def paid(self, ctx):
        effect(ctx, "paid")
        during("acct:order", 0.002)
        return Await("ship", then=self.ship)

    @step
    def ship(self, ctx):
        effect(ctx, "ship")
        during("acct:order", 0.002)
        return Done()
"""
STEPS = {"work": ["run"], "tick": ["run"], "Chain": ["one", "two", "three"], "Order": ["reserve", "paid", "ship"]}

NOTES = """
CREATE TABLE {schema}_inside (id serial PRIMARY KEY, what text, began timestamptz, ended timestamptz);
CREATE TABLE {schema}_effects (instance bigint, step text);
CREATE TABLE {schema}_grants (bucket text, since timestamptz, until timestamptz, weight int);
CREATE TABLE {schema}_firings (id serial PRIMARY KEY, at timestamptz, upto timestamptz, count int);
CREATE FUNCTION {schema}.note_grant() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.{schema}_grants VALUES (NEW.rate_limit, transaction_timestamp(), clock_timestamp(), NEW.weight);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER UPDATE ON {schema}.instances FOR EACH ROW
    WHEN (NEW.status = 'executing' AND OLD.status <> 'executing' AND NEW.rate_limit IS NOT NULL)
    EXECUTE FUNCTION {schema}.note_grant();
CREATE FUNCTION {schema}.note_firing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.{schema}_firings (at, upto, count) VALUES (OLD.next_at, NEW.next_at, NEW.fired - OLD.fired);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER UPDATE ON {schema}.schedules FOR EACH ROW WHEN (NEW.next_at IS DISTINCT FROM OLD.next_at)
    EXECUTE FUNCTION {schema}.note_firing();
"""
TABLES = ("inside", "effects", "grants", "firings")


class Notes:
    """What was written down."""

    def __init__(self, connection: Any, schema: str) -> None:
        self._connection = connection
        self._schema = schema

    def rows(self, query: str, *parameters: Any) -> list[Any]:
        return self._connection.execute(query.replace("{schema}", self._schema), parameters).fetchall()  # type: ignore[no-any-return]

    def inside(self, kind: str) -> dict[str, list[Inside]]:
        found: dict[str, list[Inside]] = {}
        query = "SELECT what, began, ended FROM {schema}_inside WHERE what LIKE %s"
        for what, began, ended in self.rows(query, f"{kind}:%"):
            found.setdefault(what, []).append(Inside(began, ended))
        return found

    def grants(self) -> dict[str, list[Grant]]:
        found: dict[str, list[Grant]] = {}
        for bucket, *rest in self.rows("SELECT bucket, since, until, weight FROM {schema}_grants"):
            found.setdefault(bucket, []).append(Grant(*rest))
        return found

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM {{schema}}_{table}")[0][0])


@pytest.fixture
def tasks(tasks_module: Callable[[str], Path], connection: Any, schema: str, monkeypatch: Any) -> Iterator[Any]:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    tasks = load(tasks_module(BODY) / "tasks.py")
    tasks.app.migrate()
    connection.execute(NOTES.replace("{schema}", schema))
    yield tasks
    tasks.app.close()
    del sys.modules["tasks"]
    for table in TABLES:
        connection.execute(f"DROP TABLE {schema}_{table}")


def load_of(tasks: Any, rng: random.Random) -> list[tuple[Any, dict[str, Any]]]:
    """Keyed, gated, rated, heavy and plain tasks and machines, in an order that is the same each time."""
    work, entries = tasks.work, []
    for n in range(40):
        acct, vendor, mail = f"acct:{n % 3}", f"vendor:{n % 2}", f"mail:{n % 2}"
        entries += [
            (work, {"args": (acct,), "concurrency_key": acct}),
            (work, {"args": (vendor, 0.01), "concurrency_key": vendor, "priority": n % 3}),
            (work, {"rate_limit": mail, "weight": 1 + (n % 8 == 0)}),
            (work, {}),
        ]
    entries += [(tasks.Chain, {"concurrency_key": "acct:chain"}) for _ in range(10)]
    rng.shuffle(entries)
    return entries


def test_no_bound_is_ever_exceeded_on_a_mixed_load_while_processes_are_killed(
    tasks: Any, connection: Any, schema: str, durable_worker: Callable[..., Command]
) -> None:
    app, notes, rng = tasks.app, Notes(connection, schema), random.Random(7)
    entries = load_of(tasks, rng)
    app.insert_many(entries[:120])
    workers = [durable_worker("worker", "-c", "3") for _ in range(2)]
    beats = [durable_worker("beat", wait=False) for _ in range(2)]
    orders = [app.insert(tasks.Order, concurrency_key="acct:order") for _ in range(8)]
    for target, options in entries[120:]:
        app.insert(target, **options)  # candidates, one by one
    app.signal_many([{"target": order.id, "name": "ship"} for order in orders[:4]])

    for kill, least in enumerate((30, 70, 110)):
        wait_until(lambda least=least: notes.count("effects") >= least, 60, f"effects before kill {kill}")  # type: ignore[misc]
        victims = wait_until(lambda kill=kill: workers[kill % 2].children("durable:"), what="a child to kill")  # type: ignore[misc]
        os.kill(rng.choice(victims), signal.SIGKILL)  # type: ignore[call-overload]
    beats[0].process.kill()
    workers[0].process.kill()
    workers.append(durable_worker("worker", "-c", "3"))
    app.signal_many([{"target": order.id, "name": "ship"} for order in orders[4:]])

    live = "SELECT FROM {schema}.instances WHERE finished_at IS NULL AND machine <> 'tick' LIMIT 1"
    wait_until(lambda: not notes.rows(live), 90, "the end of everything")
    wait_until(lambda: notes.count("firings") >= 3, 30, "occurrences")
    for command in (beats[1], *workers[1:]):  # also an agent may stand in for a beat
        assert command.stop() == 0

    ended = notes.rows("SELECT id, machine, status::text FROM {schema}.history")
    assert {status for _, _, status in ended} == {"done"}
    assert len([machine for _, machine, _ in ended if machine != "tick"]) == len(entries) + 3 * len(orders)
    expected = [(instance, step) for instance, machine, _ in ended for step in STEPS[machine]]
    assert not_once(expected, notes.rows("SELECT instance, step FROM {schema}_effects")) == {}

    exclusive, gated, grants = notes.inside("acct"), notes.inside("vendor"), notes.grants()
    assert {key: most_at_once(steps) for key, steps in exclusive.items()} == dict.fromkeys(exclusive, 1)
    assert all(most_at_once(steps) <= 3 for steps in gated.values())
    assert {bucket: wrong for bucket, given in grants.items() if (wrong := too_fast(given, 40.0, 5))} == {}
    assert (len(exclusive), len(gated), len(grants)) == (5, 3, 3), "nothing was left out"
    assert notes.rows("SELECT key, used FROM {schema}.gates WHERE used > 0") == []

    fired = [Firing(*row) for row in notes.rows("SELECT at, upto, count FROM {schema}_firings ORDER BY id")]
    ((ticks,),) = notes.rows("SELECT count(*) FROM {schema}.instance_view WHERE machine = 'tick'")
    assert wrongly_fired(fired, timedelta(seconds=0.5), ticks) == []
