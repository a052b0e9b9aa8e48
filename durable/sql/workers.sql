-- Leases of worker processes and beats, and what happens to the rows of those that die.

-- name: register
-- A new lease. Params: kind, name, host, boot_id, command_start, queue text; pid, command_pid, slots int; ttl float8;
--         tasks text[] ("name:version").
-- Rows: id.
INSERT INTO {schema}.workers (kind, name, host, boot_id, pid, command_pid, command_start, queue, slots, expires_at,
                               tasks)
VALUES (%(kind)s, %(name)s, %(host)s, %(boot_id)s, %(pid)s, %(command_pid)s, %(command_start)s, %(queue)s, %(slots)s,
        clock_timestamp() + make_interval(secs => %(ttl)s), %(tasks)s::text[])
RETURNING id;

-- name: heartbeat
-- Extend the leases that are still alive; one that is missing in the answer is dead for ever.
-- What each process runs is told with it. Params: ids bigint[], entered text[] of each (JSON), ttl float8. Rows: id.
-- Locks: workers, in id order.
WITH mine AS (
    SELECT w.id, m.entered
    FROM {schema}.workers AS w JOIN unnest(%(ids)s::bigint[], %(entered)s::text[]) AS m (id, entered) ON m.id = w.id
    WHERE w.dead_at IS NULL
    ORDER BY w.id FOR NO KEY UPDATE OF w
)
UPDATE {schema}.workers AS w
SET heartbeat_at = clock_timestamp(), expires_at = clock_timestamp() + make_interval(secs => %(ttl)s),
    entered = mine.entered::jsonb
FROM mine WHERE w.id = mine.id AND set_config('synchronous_commit', 'off', true) IS NOT NULL
RETURNING w.id;

-- name: bury
-- Mark leases dead, waiting for claims in progress. Params: ids bigint[]. Rows: id. Locks: workers FOR UPDATE.
WITH dying AS (
    SELECT id FROM {schema}.workers WHERE id = ANY (%(ids)s::bigint[]) AND dead_at IS NULL ORDER BY id FOR UPDATE
)
UPDATE {schema}.workers AS w SET dead_at = clock_timestamp() FROM dying WHERE w.id = dying.id
RETURNING w.id;

-- name: note_crash
-- Note how a dead process has died, in place of what it was running. Params: worker bigint, crash text.
-- Locks: workers, one row, which nothing but this and a sweep touches any more.
UPDATE {schema}.workers SET entered = jsonb_build_array(jsonb_build_object('crash', %(crash)s::text))
WHERE id = %(worker)s AND dead_at IS NOT NULL;

-- name: crash_loops
-- Queues that have lost at least so many worker processes of late.
-- Params: seconds float8, least int. Rows: queue, deaths, how the last one died.
SELECT queue, count(*), (array_agg(entered -> 0 ->> 'crash' ORDER BY dead_at DESC))[1] FROM {schema}.workers
WHERE entered -> 0 ->> 'crash' IS NOT NULL AND dead_at > clock_timestamp() - make_interval(secs => %(seconds)s)
GROUP BY queue HAVING count(*) >= %(least)s ORDER BY queue;

-- name: bury_expired
-- The reaper's first half: mark leases dead that expired while the reaper itself was connected, and not within the
-- grace after Postgres started. A claim in progress holds its row: it is met at the next turn.
-- Params: connected_since timestamptz, ttl float8, grace float8. Rows: id, kind, name, host, pid.
WITH expired AS (
    SELECT id FROM {schema}.workers
    WHERE dead_at IS NULL AND expires_at < clock_timestamp()
      AND greatest(expires_at, %(connected_since)s::timestamptz + make_interval(secs => %(ttl)s)) < clock_timestamp()
      AND pg_postmaster_start_time() + make_interval(secs => %(grace)s) < clock_timestamp()
    ORDER BY id FOR UPDATE SKIP LOCKED
)
UPDATE {schema}.workers AS w SET dead_at = clock_timestamp() FROM expired WHERE w.id = expired.id
RETURNING w.id, w.kind, w.name, w.host, w.pid;

-- name: orphaned
-- Worker ids that still hold rows although their lease is dead or gone. Rows: worker_id, what to say of it.
SELECT DISTINCT i.worker_id,
       CASE WHEN w.id IS NULL THEN 'unknown worker process'
            ELSE 'worker process ' || w.pid || ' of ' || w.name || ' on ' || w.host END
FROM {schema}.instances AS i LEFT JOIN {schema}.workers AS w ON w.id = i.worker_id
WHERE i.status = 'executing' AND (w.id IS NULL OR w.dead_at IS NOT NULL);

-- name: reclaim
-- Take back every row of a dead worker. Rows that it had entered count a crash; at `max_crashes` they fail. The one for
-- which it was killed counts none.
-- A row whose outcome is committing right now is locked and skipped: the next turn meets it, if it is still there.
-- It waits for no lock, so it needs no order; asked for one, the planner would walk the primary key of every row.
-- Params: worker bigint; except bigint[] (ids left for a later turn); entered_ids bigint[], entered_tokens int[] (what
--         it was running), all_entered bool (when that is not known); max_crashes int; error jsonb for those that fail. Rows: id, queue, status, crashed,
--         concurrency_key, gate_shard.
WITH taken AS MATERIALIZED (
    SELECT i.ctid AS row, (%(all_entered)s OR e.id IS NOT NULL) AND NOT i.terminate_requested AS crashed
    FROM {schema}.instances AS i
    LEFT JOIN unnest(%(entered_ids)s::bigint[], %(entered_tokens)s::int[]) AS e (id, token)
           ON e.id = i.id AND e.token = i.token
    WHERE i.worker_id = %(worker)s AND i.status = 'executing' AND i.id <> ALL (%(except)s::bigint[])
    FOR NO KEY UPDATE OF i SKIP LOCKED
), judged AS MATERIALIZED (
    SELECT t.row, t.crashed, i.cancel_requested AS cancelled,
           t.crashed AND i.crashes + 1 >= %(max_crashes)s AS lost
    FROM taken AS t JOIN {schema}.instances AS i ON i.ctid = t.row
)
UPDATE {schema}.instances AS i
SET status = CASE WHEN j.cancelled THEN 'cancelled' WHEN j.lost THEN 'failed' ELSE 'runnable' END::{schema}.status,
    finished_at = CASE WHEN j.cancelled OR j.lost THEN clock_timestamp() END,
    error = CASE WHEN j.cancelled THEN i.error WHEN j.lost THEN %(error)s ELSE i.error END,
    crashes = i.crashes + j.crashed::int, worker_id = NULL
FROM judged AS j WHERE i.ctid = j.row
RETURNING i.id, i.queue, i.status::text, j.crashed, i.concurrency_key, i.gate_shard;

-- name: give_up
-- Take rows back whose steps ran too long, from a worker that lives: each counts a crash; at `max_crashes` it fails. One
-- whose outcome is committing right now is locked and skipped: it was in time.
-- Params: worker bigint; ids bigint[] in order, tokens int[], errors text[] (JSON, for those that fail);
--         max_crashes int. Rows: id, queue, status, crashed, concurrency_key, gate_shard.
-- Locks: instances FOR NO KEY UPDATE SKIP LOCKED.
WITH taken AS MATERIALIZED (
    SELECT i.ctid AS row, g.error, i.cancel_requested AS cancelled, NOT i.terminate_requested AS crashed,
           NOT i.terminate_requested AND i.crashes + 1 >= %(max_crashes)s AS lost
    FROM unnest(%(ids)s::bigint[], %(tokens)s::int[], %(errors)s::text[]) AS g (id, token, error)
    JOIN {schema}.instances AS i ON i.id = ANY (ARRAY[g.id])
    WHERE (i.worker_id, i.token, i.status)
          IS NOT DISTINCT FROM (%(worker)s::bigint, g.token, 'executing'::{schema}.status)
    FOR NO KEY UPDATE OF i SKIP LOCKED
)
UPDATE {schema}.instances AS i
SET status = CASE WHEN t.cancelled THEN 'cancelled' WHEN t.lost THEN 'failed' ELSE 'runnable' END::{schema}.status,
    finished_at = CASE WHEN t.cancelled OR t.lost THEN clock_timestamp() END,
    error = CASE WHEN t.cancelled THEN i.error WHEN t.lost THEN t.error::jsonb ELSE i.error END,
    crashes = i.crashes + t.crashed::int, worker_id = NULL
FROM taken AS t WHERE i.ctid = t.row
RETURNING i.id, i.queue, i.status::text, t.crashed, i.concurrency_key, i.gate_shard;

-- name: terminations
-- Which of these claims are to be killed for a cancel. Params: ids bigint[], tokens int[]. Rows: id, token.
SELECT i.id, i.token
FROM unnest(%(ids)s::bigint[], %(tokens)s::int[]) AS r (id, token)
JOIN {schema}.instances AS i ON i.id = ANY (ARRAY[r.id])
WHERE (i.token, i.status, i.terminate_requested) IS NOT DISTINCT FROM (r.token, 'executing'::{schema}.status, true);

-- name: predecessors
-- Live leases of this host and boot, to be compared with the commands that exist.
-- Params: host, boot_id text. Rows: id, command_pid, command_start, name.
SELECT id, command_pid, command_start, name FROM {schema}.workers
WHERE host = %(host)s AND boot_id = %(boot_id)s AND dead_at IS NULL;

-- name: workers
-- Worker processes and beats with a live lease. Rows: id .. busy.
SELECT w.id, w.kind, w.name, w.host, w.pid, w.queue, w.slots, w.started_at, w.heartbeat_at, w.expires_at,
       w.expires_at > clock_timestamp(),
       (SELECT count(*) FROM {schema}.instances AS i WHERE i.worker_id = w.id AND i.status = 'executing')
FROM {schema}.workers AS w WHERE w.dead_at IS NULL ORDER BY w.kind, w.name, w.id;

-- name: held_by_workers
-- Every claim of the worker processes, and since when its step runs, as their agents last told: null when it does not.
-- Params: worker text|null (name of the command). Rows: inspection.Held.
SELECT w.name, w.host, w.pid, w.queue, i.id, i.machine, i.step, i.attempt,
       w.heartbeat_at - make_interval(secs => e.seconds), w.heartbeat_at
FROM {schema}.instances AS i JOIN {schema}.workers AS w ON w.id = i.worker_id
LEFT JOIN (
    SELECT o.id AS worker_id, (entry ->> 0)::bigint AS id, (entry ->> 1)::integer AS token,
           min((entry ->> 2)::float8) AS seconds
    FROM {schema}.workers AS o CROSS JOIN jsonb_array_elements(o.entered) AS entry
    WHERE o.dead_at IS NULL GROUP BY 1, 2, 3) AS e ON (e.worker_id, e.id, e.token) = (w.id, i.id, i.token)
WHERE i.status = 'executing' AND w.dead_at IS NULL AND (%(worker)s::text IS NULL OR w.name = %(worker)s)
ORDER BY w.name, w.host, w.pid, i.id;

-- name: told_since
-- Whether every live worker process has told what it runs since a moment. Params: moment timestamptz. Rows: bool.
SELECT NOT EXISTS (SELECT FROM {schema}.workers
                   WHERE kind = 'worker' AND dead_at IS NULL AND expires_at > clock_timestamp()
                     AND heartbeat_at < %(moment)s::timestamptz);

-- name: registered
-- What each command can run: its live worker processes, by queue. Params: worker text|null. Rows: inspection.Registered.
SELECT w.name, w.host, w.command_pid, array_agg(DISTINCT w.queue ORDER BY w.queue),
       ARRAY(SELECT DISTINCT task FROM {schema}.workers AS o CROSS JOIN unnest(o.tasks) AS t (task)
             WHERE o.name = w.name AND o.host = w.host AND o.command_pid = w.command_pid AND o.dead_at IS NULL
               AND o.kind = 'worker' AND o.expires_at > clock_timestamp()
             ORDER BY task)
FROM {schema}.workers AS w
WHERE w.kind = 'worker' AND w.dead_at IS NULL AND w.expires_at > clock_timestamp()
  AND (%(worker)s::text IS NULL OR w.name = %(worker)s)
GROUP BY w.name, w.host, w.command_pid
ORDER BY w.name, w.host, w.command_pid;

-- name: health
-- Leases nobody has ended, of one name and one host. Params: name, host text|null (any).
-- Rows: id, kind, name, host, pid, command_pid, queue, live, seconds since the last heartbeat.
SELECT id, kind, name, host, pid, command_pid, queue, expires_at > clock_timestamp(),
       extract(epoch FROM clock_timestamp() - heartbeat_at)::float8
FROM {schema}.workers
WHERE dead_at IS NULL AND (%(name)s::text IS NULL OR name = %(name)s) AND (%(host)s::text IS NULL OR host = %(host)s)
ORDER BY kind, name, id;

-- name: queue_heads
-- Who is next in the queues of these workers that are not paused, and how many of their slots run nothing. Limited rows
-- may have to wait.
-- Params: workers bigint[], known text[]|null ("name:version"; all). Rows: queue, free, id, seconds it has waited.
SELECT q.queue, q.free, h.id, extract(epoch FROM clock_timestamp() - h.eligible_at)::float8
FROM (SELECT w.queue,
             sum(greatest(0, w.slots - (SELECT count(*) FROM {schema}.instances AS i
                                        WHERE i.worker_id = w.id AND i.status = 'executing')))::int AS free
      FROM {schema}.workers AS w
      WHERE w.id = ANY (%(workers)s::bigint[]) GROUP BY w.queue) AS q
CROSS JOIN LATERAL (
    SELECT i.id, i.eligible_at FROM {schema}.instances AS i
    WHERE i.queue = q.queue AND i.status = 'runnable' AND i.crashes = 0
      AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
      AND (%(known)s::text[] IS NULL OR i.machine || ':' || i.machine_version = ANY (%(known)s::text[]))
    ORDER BY i.priority, i.eligible_at, i.id LIMIT 1) AS h
WHERE NOT EXISTS (SELECT FROM {schema}.queues AS k WHERE k.name = q.queue AND k.paused_at IS NOT NULL)
ORDER BY q.queue;

-- name: server
-- What the overview and a worker's start want to know of the server. Rows: version, database, max_connections.
SELECT split_part(current_setting('server_version'), ' ', 1), current_database()::text,
       current_setting('max_connections')::int;
