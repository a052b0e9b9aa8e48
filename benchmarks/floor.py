"""The SQL floor: what Postgres itself needs for the same rows, tables and indexes, driven by bare psycopg.

One process: claim 100 rows (status, worker, token), move them to history with a result, in batches, each statement its
own commit, as a worker does. No lease, no fence but the token, no user code, no decoding.
"""

from __future__ import annotations

import sys
import time

import psycopg

from durable.storage.session import PINNED_PLANS

CLAIM = """
WITH picked AS MATERIALIZED (
    SELECT ctid AS row FROM {schema}.instances
    WHERE queue = 'default' AND status = 'runnable' AND crashes = 0 AND concurrency_key IS NULL AND rate_limit IS NULL
    ORDER BY priority, eligible_at, id LIMIT 100 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.instances AS i SET status = 'executing', worker_id = %(worker)s, token = i.token + 1
FROM picked WHERE i.ctid = picked.row
RETURNING i.id, i.token, i.state_type, i.state"""

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


def drain(dsn: str, schema: str, worker: int) -> int:
    """Claim and finish until nothing is runnable; return how many."""
    done = 0
    with psycopg.connect(dsn, autocommit=True) as connection:
        # The same plans as a worker's session, so that neither side wins by luck with the planner.
        connection.execute(PINNED_PLANS)
        claim, finish = CLAIM.format(schema=schema), FINISH.format(schema=schema)
        while True:
            rows = connection.execute(claim, {"worker": worker}, prepare=True, binary=True).fetchall()
            if not rows:
                return done
            rows.sort()
            parameters = {"ids": [row[0] for row in rows], "tokens": [row[1] for row in rows]}
            connection.execute(finish, parameters, prepare=True)
            done += len(rows)


if __name__ == "__main__":
    sys.stdin.readline()  # all processes start together
    started = time.monotonic()
    count = drain(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(count, time.monotonic() - started, flush=True)
