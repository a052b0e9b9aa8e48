"""The SQL floor: what Postgres itself needs for the same rows, tables and indexes, driven by bare psycopg.

One process: claim 100 rows (status, worker, token), write their next step or move them to history with a result, in
batches, each statement its own commit, as a worker does. No lease, no fence but the token, no user code, no decoding.

    python -m benchmarks.floor drain DSN SCHEMA WORKER [STEPS]    until nothing is runnable
    python -m benchmarks.floor listen DSN SCHEMA WORKER           one row per notification, stamped, until killed
"""

from __future__ import annotations

import json
import subprocess
import sys

import psycopg

from benchmarks.database import Database
from benchmarks.stamps import stamp
from benchmarks.workers import ROOT
from durable.storage.session import PINNED_PLANS

CLAIM = """
WITH picked AS MATERIALIZED (
    SELECT ctid AS row FROM {schema}.instances
    WHERE queue = 'default' AND status = 'runnable' AND crashes = 0 AND concurrency_key IS NULL AND rate_limit IS NULL
    ORDER BY priority, eligible_at, id LIMIT {limit} FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.instances AS i SET status = 'executing', worker_id = %(worker)s, token = i.token + 1
FROM picked WHERE i.ctid = picked.row
RETURNING i.id, i.token, i.version, i.state_type, i.state"""

FINISH = """
WITH gone AS (
    DELETE FROM {schema}.instances AS i USING unnest(%(ids)s::bigint[], %(tokens)s::int[]) AS o (id, token)
    WHERE i.id = o.id AND i.token = o.token
    RETURNING i.*
)
INSERT INTO {schema}.history
SELECT id, eligible_at, created_at, clock_timestamp(), expires_at, worker_id, 'done', token, version + 1, attempt,
       machine_version, priority, crashes, cancel_requested, max_attempts, queue, machine, step, state_type, state,
       'json', 'null'::bytea, error, correlation_key, correlation_scope, reason
FROM gone"""


ADVANCE = """
UPDATE {schema}.instances AS i
SET status = 'runnable', worker_id = NULL, version = i.version + 1, step = o.step, state = o.state,
    eligible_at = clock_timestamp()
FROM unnest(%(ids)s::bigint[], %(tokens)s::int[], %(steps)s::text[], %(states)s::bytea[]) AS o (id, token, step, state)
WHERE i.id = o.id AND i.token = o.token"""

CHANNEL = "bench_floor"


def drain(dsn: str, schema: str, worker: int, steps: int = 1) -> None:
    """Claim, advance and finish until nothing is runnable."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        # The same plans as a worker's session, so that neither side wins by luck with the planner.
        connection.execute(PINNED_PLANS)
        claim, finish, advance = (text.format(schema=schema, limit=100) for text in (CLAIM, FINISH, ADVANCE))
        while True:
            rows = connection.execute(claim, {"worker": worker}, prepare=True, binary=True).fetchall()
            if not rows:
                return
            rows.sort()
            ends = [row for row in rows if row[2] >= steps - 1]
            if ends:
                parameters = {"ids": [row[0] for row in ends], "tokens": [row[1] for row in ends]}
                connection.execute(finish, parameters, prepare=True)
            hops = [row for row in rows if row[2] < steps - 1]
            if hops:
                parameters = {
                    "ids": [row[0] for row in hops],
                    "tokens": [row[1] for row in hops],
                    "steps": ["next"] * len(hops),
                    "states": [b'{"n": %d}' % row[2] for row in hops],
                }
                connection.execute(advance, parameters, prepare=True)


def listen(dsn: str, schema: str, worker: int) -> None:
    """Claim a row per notification, say when, and finish it."""
    claim, finish = (text.format(schema=schema, limit=1) for text in (CLAIM, FINISH))
    with psycopg.connect(dsn, autocommit=True) as waiting, psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(PINNED_PLANS)
        waiting.execute(f"LISTEN {CHANNEL}")
        print("listening", flush=True)
        for _ in waiting.notifies():
            for row in connection.execute(claim, {"worker": worker}, prepare=True, binary=True).fetchall():
                stamp(json.loads(row[4])["sent"])
                connection.execute(finish, {"ids": [row[0]], "tokens": [row[1]]}, prepare=True)


def run(database: Database, processes: int, steps: int = 1) -> float:
    """Drain with as many processes, which begin together; return when they did, by the database's clock.

    Raises RuntimeError when one fails.
    """
    floors = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.floor",
                "drain",
                database.dsn,
                database.schema,
                str(1000 + n),
                str(steps),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for n in range(processes)
    ]
    for floor in floors:
        assert floor.stdout is not None
        floor.stdout.readline()  # it has imported what it needs
    began = database.clock()
    for floor in floors:
        assert floor.stdin is not None
        floor.stdin.write(b"\n")
        floor.stdin.close()
    codes = [floor.wait() for floor in floors]
    for floor in floors:
        assert floor.stdout is not None
        floor.stdout.close()
    if any(codes):
        raise RuntimeError(f"floor processes ended with {codes}")
    return began


if __name__ == "__main__":
    what, dsn, schema, worker = sys.argv[1:5]
    if what == "listen":
        listen(dsn, schema, int(worker))
    else:
        print("ready", flush=True)
        sys.stdin.readline()  # all processes start together
        drain(dsn, schema, int(worker), int(sys.argv[5]))
