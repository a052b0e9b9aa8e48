-- Concurrency keys, gates and rate limits: admitting limited rows, opening what was freed, mending what broke.
--
-- A limited row that is runnable is a candidate (lane null), which pickers see, or parked in a lane, which they don't.
-- The invariant: a lane with parked rows has somebody who will open it: an executing instance of the key (its end does,
-- in its own transaction), a candidate (its claim looks into its lanes), or, for tokens, the bucket's opens_at.
--
-- No lost wakeup: a claim parks a row only while it holds what the end of an executing instance needs: a share lock on
-- the holder of a key, or every shard of a gate. The end comes after the claim's commit then, and sees the parked row.
-- A claim never waits for a lock (what is locked elsewhere is "in flux": neither admitted nor parked), so it cannot be
-- part of a deadlock. Two claims keep off each other by an advisory lock per key and per bucket.

-- name: limited_waits
-- Whether a queue has limited candidates, and in how many seconds the next token lane opens (null: none will). A paused
-- queue has nothing to look for. In pick order, since a session without pinned plans (behind a pooler) would else read
-- the whole table where there are many candidates. Params: queue text, unknown text[]. Rows: candidates, opens_in.
WITH paused AS MATERIALIZED (
    SELECT FROM {schema}.queues WHERE name = %(queue)s AND paused_at IS NOT NULL
)
SELECT NOT EXISTS (SELECT FROM paused) AND (
           SELECT true FROM {schema}.instances AS i
           WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.lane IS NULL
             AND (i.concurrency_key IS NOT NULL OR i.rate_limit IS NOT NULL)
             AND (cardinality(%(unknown)s::text[]) = 0
                  OR i.machine || ':' || i.machine_version <> ALL (%(unknown)s::text[]))
           ORDER BY i.priority, i.eligible_at, i.id LIMIT 1) IS NOT NULL,
       (SELECT extract(epoch FROM min(opens_at) - clock_timestamp())::float8 FROM {schema}.buckets
        WHERE opens_at IS NOT NULL AND NOT EXISTS (SELECT FROM paused));

-- name: live_lease
-- Whether a worker may claim from a queue, for the whole transaction; as in `claim`, which says why.
-- Params: worker bigint, queue text. Rows: id, the asynchronous commit. Locks: workers row FOR KEY SHARE.
SELECT w.id, set_config('synchronous_commit', 'off', true) FROM {schema}.workers AS w
WHERE w.id = %(worker)s AND w.dead_at IS NULL AND w.expires_at > clock_timestamp()
  AND NOT EXISTS (SELECT FROM {schema}.queues AS q WHERE q.name = %(queue)s AND q.paused_at IS NOT NULL)
FOR KEY SHARE;

-- name: unlimited_head
-- The first unlimited row of a queue from a position on. Params: queue text, from_priority int, from_time timestamptz.
-- Rows: priority, eligible_at.
SELECT i.priority, i.eligible_at FROM {schema}.instances AS i
WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes = 0
  AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
  AND (i.priority, i.eligible_at) >= (%(from_priority)s::smallint, %(from_time)s::timestamptz)
ORDER BY i.priority, i.eligible_at, i.id LIMIT 1;

-- name: limited_candidates
-- Candidates in pick order, up to a place in it.
-- Params: queue text, to_priority int, to_time timestamptz, unknown text[], limit bigint. Rows: verdicts.Row.
-- Locks: instances FOR NO KEY UPDATE SKIP LOCKED.
SELECT i.id, i.priority, i.eligible_at, i.queue, i.lane, i.concurrency_key, i.rate_limit, i.weight, i.crashes, true,
       i.machine, i.step
FROM {schema}.instances AS i
WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.lane IS NULL
  AND (i.concurrency_key IS NOT NULL OR i.rate_limit IS NOT NULL)
  AND (i.priority, i.eligible_at) <= (%(to_priority)s::smallint, %(to_time)s::timestamptz)
  AND (cardinality(%(unknown)s::text[]) = 0
       OR i.machine || ':' || i.machine_version <> ALL (%(unknown)s::text[]))
ORDER BY i.priority, i.eligible_at, i.id
LIMIT %(limit)s
FOR NO KEY UPDATE SKIP LOCKED;

-- name: due_buckets
-- Buckets whose lane may open now, the longest due first. Params: limit bigint. Rows: bucket.
SELECT bucket FROM {schema}.buckets
WHERE opens_at IS NOT NULL AND opens_at <= (SELECT clock_timestamp()) ORDER BY opens_at LIMIT %(limit)s;

-- name: try_names
-- Keep other claims off keys and buckets until the transaction ends; whoever is second leaves them be.
-- Params: names text[] (lanes). Rows: name, got.
SELECT n.name, pg_try_advisory_xact_lock(hashtextextended('{schema} ' || n.name, 11))
FROM unnest(%(names)s::text[]) AS n (name);

-- name: limits_named
-- The limits of these names. Params: gates text[], rates text[]. Rows: kind, name, allowed, period, burst, shards.
SELECT kind, name, allowed, period, burst, shards FROM {schema}.limits
WHERE kind = 'concurrency' AND name = ANY (%(gates)s::text[])
UNION ALL
SELECT kind, name, allowed, period, burst, shards FROM {schema}.limits
WHERE kind = 'rate' AND name = ANY (%(rates)s::text[]);

-- name: key_holders
-- Executing instances of keys: those without a slot for all keys, those with one for keys that have no gate (any more).
-- Params: keys text[], ungated text[]. Rows: concurrency_key, and whether its end has to wait for us.
-- Locks: what can be locked FOR SHARE; not what is committing right now.
WITH held AS MATERIALIZED (
    SELECT i.id, i.concurrency_key FROM {schema}.instances AS i
    WHERE i.status = 'executing' AND i.gate_shard IS NULL AND i.concurrency_key IS NOT NULL
      AND i.concurrency_key = ANY (%(keys)s::text[])
    UNION ALL
    SELECT i.id, i.concurrency_key FROM {schema}.instances AS i
    WHERE i.status = 'executing' AND i.gate_shard IS NOT NULL AND i.concurrency_key = ANY (%(ungated)s::text[])
), locked AS MATERIALIZED (
    SELECT i.id FROM {schema}.instances AS i
    WHERE i.id = ANY (ARRAY(SELECT id FROM held)) AND i.status = 'executing' FOR SHARE SKIP LOCKED
)
SELECT concurrency_key, id = ANY (ARRAY(SELECT id FROM locked)) FROM held;

-- name: lock_gates
-- The slots of keys, as far as nobody else holds them. Params: keys text[]. Rows: key, shard, wanted, capacity, used.
-- Locks: gates FOR UPDATE SKIP LOCKED.
SELECT key, shard, wanted, capacity, used FROM {schema}.gates
WHERE key = ANY (%(keys)s::text[]) ORDER BY key, shard FOR UPDATE SKIP LOCKED;

-- name: gate_shards
-- Which shards of keys there are. Params: keys text[]. Rows: key, shard.
SELECT key, shard FROM {schema}.gates WHERE key = ANY (%(keys)s::text[]);

-- name: lock_buckets
-- The tokens of buckets, as far as nobody else holds them, and the clock after the locks were had.
-- Params: buckets text[]. Rows: bucket, shard, full_at, opens_at, now. Locks: buckets FOR UPDATE SKIP LOCKED.
WITH mine AS MATERIALIZED (
    SELECT bucket, shard, full_at, opens_at FROM {schema}.buckets
    WHERE bucket = ANY (%(buckets)s::text[]) ORDER BY bucket, shard FOR UPDATE SKIP LOCKED
)
SELECT bucket, shard, full_at, opens_at, clock_timestamp() FROM mine;

-- name: bucket_shards
-- Which shards of buckets there are, and the clock. Params: buckets text[]. Rows: bucket, shard, now; one with nulls.
SELECT bucket, shard, clock_timestamp() FROM {schema}.buckets WHERE bucket = ANY (%(buckets)s::text[])
UNION ALL
SELECT NULL, NULL, clock_timestamp();

-- name: lane_heads
-- The best rows parked in lanes. Params: queue text, unknown text[], lanes text[], counts int[].
-- Rows:   verdicts.Row, `ours`: of the queue, and of a machine that this worker knows.
-- Locks:  instances FOR NO KEY UPDATE SKIP LOCKED.
SELECT h.* FROM unnest(%(lanes)s::text[], %(counts)s::int[]) AS l (lane, count)
CROSS JOIN LATERAL (
    SELECT i.id, i.priority, i.eligible_at, i.queue, i.lane, i.concurrency_key, i.rate_limit, i.weight, i.crashes,
           i.queue = %(queue)s AND (cardinality(%(unknown)s::text[]) = 0
                                    OR i.machine || ':' || i.machine_version <> ALL (%(unknown)s::text[])),
           i.machine, i.step
    FROM {schema}.instances AS i
    WHERE i.status = 'runnable' AND i.lane = l.lane COLLATE "C"
    ORDER BY i.priority, i.eligible_at, i.id
    LIMIT l.count
    FOR NO KEY UPDATE SKIP LOCKED
) AS h;

-- name: admit
-- Flip locked rows to executing. Params: worker bigint, ids bigint[], shards int[] (the gate's; null: the key alone).
-- Rows:   instance.Claimed, limits included.
UPDATE {schema}.instances AS i
SET status = 'executing', worker_id = %(worker)s, token = i.token + 1, reason = NULL, lane = NULL,
    gate_shard = a.shard
FROM unnest(%(ids)s::bigint[], %(shards)s::int[]) AS a (id, shard)
WHERE i.id = ANY (ARRAY[a.id])
RETURNING i.id, i.token, i.version, i.priority, i.eligible_at, i.machine, i.machine_version, i.step, i.attempt,
          i.crashes, i.state_type, i.state, i.max_attempts, i.correlation_key, i.correlation_scope IS NOT NULL,
          CASE WHEN i.version = 0 THEN i.expires_at <= clock_timestamp() END, i.queue, i.parent_id, i.children_round,
          i.inbox, i.awaits, i.parent_round, i.trace, i.concurrency_key, i.gate_shard, i.rate_limit;

-- name: set_lanes
-- Park locked rows, or (lane null) make candidates of them. Params: ids bigint[], lanes text[]. Rows: queue, lane.
UPDATE {schema}.instances AS i SET lane = l.lane
FROM unnest(%(ids)s::bigint[], %(lanes)s::text[]) AS l (id, lane)
WHERE i.id = ANY (ARRAY[l.id])
RETURNING i.queue, i.lane;

-- name: write_gates
-- Store locked shards, and new ones. Params: keys text[], shards, wanteds, capacities, used int[].
INSERT INTO {schema}.gates AS g (key, shard, wanted, capacity, used)
SELECT * FROM unnest(%(keys)s::text[], %(shards)s::int[], %(wanteds)s::int[], %(capacities)s::int[], %(used)s::int[])
ON CONFLICT (key, shard)
DO UPDATE SET wanted = excluded.wanted, capacity = excluded.capacity, used = excluded.used;

-- name: write_buckets
-- Store locked shards, and new ones. A lane that seems empty since all its rows are held gets a time to open all the
-- same: they may stay parked. Params: buckets text[], shards int[], full_ats, opens_ats timestamptz[].
INSERT INTO {schema}.buckets AS b (bucket, shard, full_at, opens_at)
SELECT w.bucket, w.shard, w.full_at,
       CASE WHEN w.opens_at IS NULL AND w.shard = 0
             AND EXISTS (SELECT FROM {schema}.instances AS i
                         WHERE i.status = 'runnable' AND i.lane = 'rate ' || w.bucket COLLATE "C")
            THEN clock_timestamp() + interval '1 s' ELSE w.opens_at END
FROM unnest(%(buckets)s::text[], %(shards)s::int[], %(full_ats)s::timestamptz[], %(opens_ats)s::timestamptz[])
     AS w (bucket, shard, full_at, opens_at)
ON CONFLICT (bucket, shard) DO UPDATE SET full_at = excluded.full_at, opens_at = excluded.opens_at;

-- name: close_buckets
-- No time to open for lanes whose limit is gone: whoever stores it again opens them. Params: buckets text[].
-- Locks: buckets FOR UPDATE SKIP LOCKED.
UPDATE {schema}.buckets AS b SET opens_at = NULL
FROM (SELECT bucket, shard FROM {schema}.buckets
      WHERE bucket = ANY (%(buckets)s::text[]) AND opens_at IS NOT NULL FOR UPDATE SKIP LOCKED) AS idle
WHERE b.bucket = idle.bucket AND b.shard = idle.shard;

-- name: credit_slots
-- Give slots back, in the transaction that ended what held them. The capacity of a lowered limit falls with them.
-- By key, not by ctid: of a row that was waited for, the ctid is one that this statement's snapshot does not see.
-- Params: keys text[], shards int[], counts int[], in order of key and shard. Locks: gates FOR UPDATE, in that order.
WITH mine AS MATERIALIZED (
    SELECT c.key, c.shard, c.count
    FROM unnest(%(keys)s::text[], %(shards)s::int[], %(counts)s::int[]) AS c (key, shard, count)
    CROSS JOIN LATERAL (SELECT FROM {schema}.gates AS s WHERE s.key = c.key AND s.shard = c.shard
                        FOR UPDATE) AS g
)
UPDATE {schema}.gates AS g
SET used = greatest(0, g.used - mine.count),
    capacity = least(g.capacity, greatest(g.wanted, greatest(0, g.used - mine.count)))
FROM mine WHERE g.key = mine.key AND g.shard = mine.shard;

-- name: open_lanes
-- Make a candidate of the best row of each lane; its claim looks for more. A row that somebody else holds is passed
-- over for the next; where all are held, they are waited for, since each may stay parked. Without `wait` such a lane is
-- left to the repair of limits.
-- Params: lanes text[], in order; wait bool. Rows: queue, count.
-- Locks: instances FOR NO KEY UPDATE, in order of the lanes; SKIP LOCKED without `wait`.
WITH head AS MATERIALIZED (
    SELECT h.id FROM unnest(%(lanes)s::text[]) AS l (lane)
    CROSS JOIN LATERAL (
        SELECT free.id FROM (
            SELECT i.id FROM {schema}.instances AS i
            WHERE i.status = 'runnable' AND i.lane = l.lane COLLATE "C"
            ORDER BY i.priority, i.eligible_at, i.id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS free
        UNION ALL
        SELECT held.id FROM (
            SELECT i.id FROM {schema}.instances AS i
            WHERE i.status = 'runnable' AND i.lane = l.lane COLLATE "C" AND %(wait)s::bool
            ORDER BY i.priority, i.eligible_at, i.id LIMIT 1 FOR NO KEY UPDATE) AS held
        LIMIT 1
    ) AS h
), opened AS (
    UPDATE {schema}.instances AS i SET lane = NULL FROM head WHERE i.id = ANY (ARRAY[head.id]) RETURNING i.queue
)
SELECT queue, count(*) FROM opened GROUP BY queue;

-- name: relimit
-- Give rows that go on their next limits. Params: ids bigint[], concurrency_keys, rate_limits text[], weights int[].
UPDATE {schema}.instances AS i
SET concurrency_key = l.concurrency_key, rate_limit = l.rate_limit, weight = l.weight
FROM unnest(%(ids)s::bigint[], %(concurrency_keys)s::text[], %(rate_limits)s::text[], %(weights)s::int[])
     AS l (id, concurrency_key, rate_limit, weight)
WHERE i.id = ANY (ARRAY[l.id]);

-- name: open_due_lanes
-- For whoever keeps the clock where no worker does: one candidate for each token lane that is due for 20 ms, and again
-- a second later unless its claim says otherwise; never again for a lane that is empty. One whose rows are all held is not.
-- Params: limit bigint. Rows: queue, count. Locks: buckets FOR UPDATE SKIP LOCKED, instances likewise.
WITH due AS MATERIALIZED (
    SELECT b.bucket, b.shard FROM {schema}.buckets AS b
    WHERE b.opens_at IS NOT NULL AND b.opens_at <= (SELECT clock_timestamp() - interval '20 ms')
    ORDER BY b.opens_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), head AS MATERIALIZED (
    SELECT due.bucket, due.shard, h.id,
           EXISTS (SELECT FROM {schema}.instances AS i
                   WHERE i.status = 'runnable' AND i.lane = 'rate ' || due.bucket COLLATE "C") AS parked
    FROM due LEFT JOIN LATERAL (
        SELECT i.id FROM {schema}.instances AS i
        WHERE i.status = 'runnable' AND i.lane = 'rate ' || due.bucket COLLATE "C"
        ORDER BY i.priority, i.eligible_at, i.id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS h ON true
), later AS (
    UPDATE {schema}.buckets AS b
    SET opens_at = CASE WHEN head.parked THEN clock_timestamp() + interval '1 s' END
    FROM head WHERE b.bucket = head.bucket AND b.shard = head.shard
), opened AS (
    UPDATE {schema}.instances AS i SET lane = NULL FROM head WHERE i.id = ANY (ARRAY[head.id]) RETURNING i.queue
)
SELECT queue, count(*) FROM opened GROUP BY queue;

-- name: limits_in_use
-- Whether anything is there that could need mending: a parked row, a drawn slot. Rows: bool.
SELECT EXISTS (SELECT FROM {schema}.instances WHERE status = 'runnable' AND lane IS NOT NULL)
       OR EXISTS (SELECT FROM {schema}.instances WHERE status = 'executing' AND gate_shard IS NOT NULL)
       OR EXISTS (SELECT FROM {schema}.gates WHERE used > 0);

-- name: any_parked
-- Whether any row is parked at all. Rows: parked.
SELECT EXISTS (SELECT FROM {schema}.instances WHERE status = 'runnable' AND lane IS NOT NULL);

-- name: parked_lanes
-- A page of the lanes in which rows are parked. Params: after text, limit int. Rows: lane.
WITH RECURSIVE found AS (
    SELECT (SELECT min(lane) FROM {schema}.instances
            WHERE status = 'runnable' AND lane IS NOT NULL AND lane > %(after)s COLLATE "C") AS lane, 1 AS n
    UNION ALL
    SELECT (SELECT min(i.lane) FROM {schema}.instances AS i
            WHERE i.status = 'runnable' AND i.lane IS NOT NULL AND i.lane > found.lane), found.n + 1
    FROM found WHERE found.lane IS NOT NULL AND found.n < %(limit)s
)
SELECT lane FROM found WHERE lane IS NOT NULL;

-- name: unattended_lanes
-- Those lanes that nobody will open: no instance of the key executes, or its gate has a slot to give; a bucket without
-- a time to open although its limit exists. (Candidates may see to one already: opening it once more costs little.)
-- Params: lanes text[]. Rows: lane.
SELECT l.lane FROM unnest(%(lanes)s::text[]) AS l (lane)
WHERE CASE WHEN l.lane LIKE 'key %%'
           THEN NOT EXISTS (SELECT FROM {schema}.instances AS i
                            WHERE i.status = 'executing' AND i.gate_shard IS NULL
                              AND i.concurrency_key = substr(l.lane, 5))
            AND (NOT EXISTS (SELECT FROM {schema}.instances AS i
                             WHERE i.status = 'executing' AND i.gate_shard IS NOT NULL
                               AND i.concurrency_key = substr(l.lane, 5))
                 OR coalesce((SELECT sum(g.used) FROM {schema}.gates AS g WHERE g.key = substr(l.lane, 5)), 0)
                    < (SELECT m.allowed FROM {schema}.limits AS m
                       WHERE m.kind = 'concurrency' AND m.name = split_part(substr(l.lane, 5), ':', 1)))
           ELSE EXISTS (SELECT FROM {schema}.limits AS m
                        WHERE m.kind = 'rate' AND m.name = split_part(substr(l.lane, 6), ':', 1))
            AND NOT EXISTS (SELECT FROM {schema}.buckets AS b
                            WHERE b.bucket = substr(l.lane, 6) AND b.opens_at IS NOT NULL)
      END
ORDER BY l.lane;

-- name: lanes_of_limit
-- The lanes of every key or partition of a limit's name: from its colon to the character after it, chr(59). Params: kind text, name text. Rows: lane.
WITH RECURSIVE bounds AS (
    SELECT CASE %(kind)s::text WHEN 'rate' THEN 'rate ' ELSE 'key ' END || %(name)s::text COLLATE "C" AS lane
), found AS (
    SELECT (SELECT min(i.lane) FROM {schema}.instances AS i
            WHERE i.status = 'runnable' AND i.lane IS NOT NULL AND i.lane > bounds.lane || ':'
              AND i.lane < bounds.lane || chr(59)) AS lane FROM bounds
    UNION ALL
    SELECT (SELECT min(i.lane) FROM {schema}.instances AS i
            WHERE i.status = 'runnable' AND i.lane IS NOT NULL AND i.lane > found.lane
              AND i.lane < (SELECT bounds.lane || chr(59) FROM bounds))
    FROM found WHERE found.lane IS NOT NULL
)
SELECT lane FROM found WHERE lane IS NOT NULL
UNION ALL SELECT lane FROM bounds
ORDER BY lane;

-- name: wrong_gates
-- Shards whose counter differs from the instances that execute on them. Params: limit bigint. Rows: key, shard.
SELECT g.key, g.shard FROM {schema}.gates AS g
WHERE g.used <> (SELECT count(*) FROM {schema}.instances AS i
                 WHERE i.status = 'executing' AND i.gate_shard IS NOT NULL AND i.concurrency_key = g.key
                   AND i.gate_shard = g.shard)
ORDER BY g.key, g.shard LIMIT %(limit)s;

-- name: recount_shards
-- Set the counters of locked shards to what executes on them, in a statement after the one that locked them: whoever
-- changes a counter needs its lock. Params: keys text[], shards int[]. Rows: key.
UPDATE {schema}.gates AS g
SET used = n.used, capacity = greatest(n.used, least(g.capacity, g.wanted))
FROM (SELECT c.key, c.shard, (SELECT count(*) FROM {schema}.instances AS i
                              WHERE i.status = 'executing' AND i.gate_shard IS NOT NULL AND i.concurrency_key = c.key
                                AND i.gate_shard = c.shard) AS used
      FROM unnest(%(keys)s::text[], %(shards)s::int[]) AS c (key, shard)) AS n
WHERE g.key = n.key AND g.shard = n.shard AND g.used <> n.used
RETURNING g.key;

-- name: sweep_gates
-- Forget shards that nobody uses; the next claim makes them again. Params: limit bigint. Rows: key.
DELETE FROM {schema}.gates AS g USING (
    SELECT key, shard FROM {schema}.gates WHERE used = 0 LIMIT %(limit)s FOR UPDATE SKIP LOCKED) AS idle
WHERE g.key = idle.key AND g.shard = idle.shard RETURNING g.key;

-- name: sweep_buckets
-- Forget buckets that have been full for a minute in every shard and that nobody waits for. (A shard that is missing
-- beside others counts as drawn.) Params: limit bigint. Rows: bucket.
DELETE FROM {schema}.buckets AS b USING (
    SELECT s.bucket, s.shard FROM {schema}.buckets AS s
    WHERE s.full_at < clock_timestamp() - interval '1 minute' AND s.opens_at IS NULL
      AND NOT EXISTS (SELECT FROM {schema}.buckets AS o
                      WHERE o.bucket = s.bucket
                        AND (o.full_at >= clock_timestamp() - interval '1 minute' OR o.opens_at IS NOT NULL))
    LIMIT %(limit)s FOR UPDATE OF s SKIP LOCKED) AS idle
WHERE b.bucket = idle.bucket AND b.shard = idle.shard RETURNING b.bucket;

-- name: read_limits
-- Every limit. Rows: kind, name, allowed, period, burst, shards, pinned.
SELECT kind, name, allowed, period, burst, shards, pinned FROM {schema}.limits ORDER BY kind, name;

-- name: put_limits
-- Insert limits, or change those that differ; by an app (pin false) not over those that were set by hand.
-- Params: kinds, names text[], alloweds int[], periods float8[] in seconds, bursts, shards int[], pin bool.
-- Rows:   kind, name of the changed ones.
INSERT INTO {schema}.limits AS l (kind, name, allowed, period, burst, shards, pinned)
SELECT u.kind, u.name, u.allowed, make_interval(secs => u.period), u.burst, u.shards, %(pin)s
FROM unnest(%(kinds)s::text[], %(names)s::text[], %(alloweds)s::int[], %(periods)s::float8[], %(bursts)s::int[],
            %(shards)s::int[]) AS u (kind, name, allowed, period, burst, shards)
ORDER BY u.kind, u.name
ON CONFLICT (kind, name) DO UPDATE
SET allowed = excluded.allowed, period = excluded.period, burst = excluded.burst, shards = excluded.shards,
    pinned = excluded.pinned, updated_at = clock_timestamp()
WHERE (%(pin)s OR NOT l.pinned)
  AND (l.allowed, l.period, l.burst, l.shards, l.pinned)
      IS DISTINCT FROM (excluded.allowed, excluded.period, excluded.burst, excluded.shards, excluded.pinned)
RETURNING kind, name;

-- name: unpin_limit
-- Give a limit back to the app. Params: kind, name text. Rows: kind, name.
UPDATE {schema}.limits SET pinned = false, updated_at = clock_timestamp()
WHERE kind = %(kind)s AND name = %(name)s RETURNING kind, name;

-- name: drop_limit
-- Delete a limit. Params: kind, name text. Rows: kind, name.
DELETE FROM {schema}.limits WHERE kind = %(kind)s AND name = %(name)s RETURNING kind, name;

-- name: limit_use
-- Every limit with what it governs now: keys or buckets in use, slots drawn, rows that wait (at most `most` counted).
-- Params: most bigint. Rows: inspection of limits: kind, name, allowed, period in seconds, burst, shards, pinned,
--         in_use, executing, waiting.
SELECT l.kind, l.name, l.allowed, extract(epoch FROM l.period)::float8, l.burst, l.shards, l.pinned,
       CASE l.kind WHEN 'rate' THEN (SELECT count(DISTINCT b.bucket) FROM {schema}.buckets AS b
                                     WHERE split_part(b.bucket, ':', 1) = l.name)
                   ELSE (SELECT count(DISTINCT g.key) FROM {schema}.gates AS g
                         WHERE split_part(g.key, ':', 1) = l.name AND g.used > 0) END,
       CASE l.kind WHEN 'rate' THEN 0
                   ELSE (SELECT coalesce(sum(g.used), 0) FROM {schema}.gates AS g
                         WHERE split_part(g.key, ':', 1) = l.name) END,
       (SELECT count(*) FROM (
            SELECT FROM {schema}.instances AS i
            WHERE i.status = 'runnable' AND i.lane IS NOT NULL
              AND (i.lane = w.lane OR (i.lane > w.lane || ':' AND i.lane < w.lane || chr(59)))
            LIMIT %(most)s) AS waiting)
FROM {schema}.limits AS l
CROSS JOIN LATERAL (SELECT CASE l.kind WHEN 'rate' THEN 'rate ' ELSE 'key ' END || l.name COLLATE "C" AS lane) AS w
ORDER BY l.kind, l.name;
