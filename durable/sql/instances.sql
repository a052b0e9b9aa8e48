-- Producing instances and reading them back.

-- name: insert_one
-- Insert one instance without a correlation key. (ON CONFLICT costs a record of WAL and a fifth of the insert: only
-- those with a key have it.)
-- Params: one scalar per column; delay and expires_in in seconds; at and expires_at as timestamps.
-- Rows:   id.
INSERT INTO {schema}.instances
    (queue, priority, status, eligible_at, expires_at, machine, machine_version, step, state_type, state,
     max_attempts, concurrency_key, rate_limit, weight, trace)
SELECT %(queue)s, %(priority)s, CASE WHEN t.at > t.now THEN 'scheduled' ELSE 'runnable' END::{schema}.status,
       greatest(t.at, t.now), coalesce(%(expires_at)s, t.now + make_interval(secs => %(expires_in)s)),
       %(machine)s, %(machine_version)s, %(step)s, %(state_type)s, %(state)b,
       %(max_attempts)s, %(concurrency_key)s, %(rate_limit)s, %(weight)s, %(trace)s
FROM (SELECT n.now, coalesce(%(at)s, n.now + make_interval(secs => %(delay)s), n.now) AS at
      FROM (SELECT clock_timestamp() AS now) AS n) AS t
RETURNING id;

-- name: insert_one_keyed
-- Insert one instance with a correlation key; no row comes back when it is occupied.
-- Params: as insert_one; correlation_key; correlation_scope as text[].
-- Rows:   id.
INSERT INTO {schema}.instances
    (queue, priority, status, eligible_at, expires_at, machine, machine_version, step, state_type, state,
     max_attempts, correlation_key, correlation_scope, concurrency_key, rate_limit, weight, trace)
SELECT %(queue)s, %(priority)s, CASE WHEN t.at > t.now THEN 'scheduled' ELSE 'runnable' END::{schema}.status,
       greatest(t.at, t.now), coalesce(%(expires_at)s, t.now + make_interval(secs => %(expires_in)s)),
       %(machine)s, %(machine_version)s, %(step)s, %(state_type)s, %(state)b,
       %(max_attempts)s, %(correlation_key)s, %(correlation_scope)s::text[]::{schema}.status[],
       %(concurrency_key)s, %(rate_limit)s, %(weight)s, %(trace)s
FROM (SELECT n.now, coalesce(%(at)s, n.now + make_interval(secs => %(delay)s), n.now) AS at
      FROM (SELECT clock_timestamp() AS now) AS n) AS t
ON CONFLICT DO NOTHING
RETURNING id;

-- name: insert_many
-- Insert a batch without correlation keys.
-- Params: one array per column, as in insert_one; lanes: where a row is parked unless it is scheduled.
-- Rows:   one: the ids, in the order of the input.
WITH inserted AS (
    INSERT INTO {schema}.instances
        (queue, priority, status, eligible_at, expires_at, machine, machine_version, step, state_type, state,
         max_attempts, parent_id, parent_round, concurrency_key, rate_limit, weight, lane, trace)
    SELECT i.queue, i.priority, CASE WHEN t.at > t.now THEN 'scheduled' ELSE 'runnable' END::{schema}.status,
           greatest(t.at, t.now), coalesce(i.expires_at, t.now + make_interval(secs => i.expires_in)),
           i.machine, i.machine_version, i.step, i.state_type, i.state, i.max_attempts, i.parent_id, i.parent_round,
           i.concurrency_key, i.rate_limit, i.weight, CASE WHEN t.at > t.now THEN NULL ELSE i.lane END, i.trace
    FROM (
        SELECT * FROM unnest(
            %(queues)s::text[], %(priorities)s::int[], %(delays)s::float8[], %(ats)s::timestamptz[],
            %(expires_ins)s::float8[], %(expires_ats)s::timestamptz[], %(machines)s::text[],
            %(machine_versions)s::int[], %(steps)s::text[], %(state_types)s::text[], %(states)s::bytea[],
            %(max_attempts)s::int[], %(parent_ids)s::bigint[], %(parent_rounds)s::int[], %(concurrency_keys)s::text[],
            %(rate_limits)s::text[], %(weights)s::int[], %(lanes)s::text[], %(traces)s::text[]
        ) WITH ORDINALITY AS a (queue, priority, delay, at, expires_in, expires_at, machine, machine_version, step,
                                state_type, state, max_attempts, parent_id, parent_round, concurrency_key, rate_limit,
                                weight, lane, trace, n)
        ORDER BY a.n
    ) AS i
    CROSS JOIN LATERAL (SELECT s.now, coalesce(i.at, s.now + make_interval(secs => i.delay), s.now) AS at
                        FROM (SELECT clock_timestamp() AS now) AS s) AS t
    RETURNING id
)
SELECT array_agg(id ORDER BY id) FROM inserted;

-- name: new_ids
-- Ids for a batch that is copied in or has correlation keys, and the time. Params: count int.
-- Rows: one: ids, rising; clock_timestamp() in microseconds since 2000.
SELECT (SELECT array_agg(nextval('{schema}.instance_ids')) FROM generate_series(1, %(count)s::int)),
       ((extract(epoch FROM clock_timestamp()) - 946684800) * 1000000)::bigint;

-- name: copy_instances
-- Copy a batch without correlation keys in; the rows are those of storage.copying. A default that is a clock makes COPY
-- write row by row, but an explicit created_at would need a right that producers have not been granted.
COPY {schema}.instances
    (id, state, eligible_at, status, expires_at, queue, priority, machine, machine_version, step, state_type,
     max_attempts, parent_id, parent_round, concurrency_key, rate_limit, weight, lane, trace)
FROM STDIN (FORMAT binary);

-- name: insert_many_keyed
-- Insert a batch with correlation keys in the order given, which is key order, so that two batches with the same new
-- keys cannot deadlock; duplicates are dropped. (Keys are not sorted here: a database's collation may differ from the order across statements.)
-- Params: as insert_many; ids; correlation_keys; correlation_scopes as comma separated text.
-- Rows:   one: those of the ids that were inserted.
WITH input AS MATERIALIZED (
    SELECT u.*
    FROM (
        SELECT * FROM unnest(
            %(ids)s::bigint[], %(queues)s::text[], %(priorities)s::int[], %(delays)s::float8[], %(ats)s::timestamptz[],
            %(expires_ins)s::float8[], %(expires_ats)s::timestamptz[], %(machines)s::text[],
            %(machine_versions)s::int[], %(steps)s::text[], %(state_types)s::text[], %(states)s::bytea[],
            %(max_attempts)s::int[], %(correlation_keys)s::text[], %(correlation_scopes)s::text[],
            %(parent_ids)s::bigint[], %(parent_rounds)s::int[], %(concurrency_keys)s::text[], %(rate_limits)s::text[],
            %(weights)s::int[], %(lanes)s::text[], %(traces)s::text[]
        ) WITH ORDINALITY AS a (id, queue, priority, delay, at, expires_in, expires_at, machine, machine_version, step,
                                state_type, state, max_attempts, correlation_key, correlation_scope, parent_id,
                                parent_round, concurrency_key, rate_limit, weight, lane, trace, n)
        ORDER BY a.n
    ) AS u
), inserted AS (
    INSERT INTO {schema}.instances
        (id, queue, priority, status, eligible_at, expires_at, machine, machine_version, step, state_type, state,
         max_attempts, correlation_key, correlation_scope, parent_id, parent_round, concurrency_key, rate_limit, weight,
         lane, trace)
    SELECT i.id, i.queue, i.priority, CASE WHEN t.at > t.now THEN 'scheduled' ELSE 'runnable' END::{schema}.status,
           greatest(t.at, t.now), coalesce(i.expires_at, t.now + make_interval(secs => i.expires_in)),
           i.machine, i.machine_version, i.step, i.state_type, i.state, i.max_attempts, i.correlation_key,
           string_to_array(i.correlation_scope, ',')::{schema}.status[], i.parent_id, i.parent_round,
           i.concurrency_key, i.rate_limit, i.weight, CASE WHEN t.at > t.now THEN NULL ELSE i.lane END, i.trace
    FROM input AS i
    CROSS JOIN LATERAL (SELECT s.now, coalesce(i.at, s.now + make_interval(secs => i.delay), s.now) AS at
                        FROM (SELECT clock_timestamp() AS now) AS s) AS t
    ON CONFLICT DO NOTHING
    RETURNING id
)
SELECT array_agg(id) FROM inserted;

-- name: occupant
-- Who occupies a correlation key.
-- Params: key text. Rows: id.
SELECT id FROM {schema}.instances
WHERE correlation_key = %(key)s
  AND CASE WHEN correlation_scope IS NULL THEN status NOT IN ('done', 'failed', 'cancelled')
           ELSE status = ANY (correlation_scope) END;

-- name: notify
-- Wake the pickers of a queue, after the commit that made rows runnable. It does not wait for the disk: notifications
-- end with the server anyway. Only by itself: a transaction that it is part of would not wait for the disk either.
-- Params: channel text, payload text.
SELECT pg_notify(%(channel)s, %(payload)s), set_config('synchronous_commit', 'off', true);

-- name: notify_inside
-- Wake the pickers of a queue once the caller's transaction commits. Params: channel text, payload text.
SELECT pg_notify(%(channel)s, %(payload)s);

-- name: snapshot
-- One instance's status and outcome, live or finished, in one statement.
-- Params: id bigint. Rows: result.Snapshot.
SELECT id, status::text, result_type, result, error, version, machine, step, queue, cancel_requested
FROM {schema}.instances WHERE id = %(id)s::bigint
UNION ALL
SELECT id, status::text, result_type, result, error, version, machine, step, queue, cancel_requested
FROM {schema}.history
WHERE id = %(id)s::bigint AND finished_at < statement_timestamp() + interval '1 hour';

-- name: finished
-- The finished ones among the waited-for ids. The upper bound prunes the partitions made ahead.
-- Params: ids bigint[]. Rows: result.Snapshot.
SELECT id, status::text, result_type, result, error, version, machine, step, queue, cancel_requested
FROM {schema}.history
WHERE id = ANY (%(ids)s::bigint[]) AND finished_at < statement_timestamp() + interval '1 hour'
UNION ALL
SELECT id, status::text, result_type, result, error, version, machine, step, queue, cancel_requested
FROM {schema}.instances WHERE id = ANY (%(ids)s::bigint[]) AND finished_at IS NOT NULL;

-- name: finished_one
-- `finished` for one id. A plan for an array of unknown length looks dearer than one for the array at hand, so that a
-- producer's session would plan every partition at each look: nine tenths of its time. Params: id bigint.
-- Rows: result.Snapshot.
SELECT id, status::text, result_type, result, error, version, machine, step, queue, cancel_requested
FROM {schema}.history
WHERE id = %(id)s::bigint AND finished_at < statement_timestamp() + interval '1 hour'
UNION ALL
SELECT id, status::text, result_type, result, error, version, machine, step, queue, cancel_requested
FROM {schema}.instances WHERE id = %(id)s::bigint AND finished_at IS NOT NULL;

-- name: cancel
-- Cancel a waiting or parked instance at once, or ask the one that executes it; with `cascade` its live descendants too.
-- Nothing happens to what is finished. An outcome that commits first wins: it holds the row's lock.
-- Children of an outcome that commits at this moment are not seen: with `cascade` it is run again. Afterwards there are
-- no others: outcomes that began later see the mark (mark_cascade).
-- Params: id bigint, cascade bool, terminate bool (kill what executes), error jsonb. Rows: id, status.
-- Locks: the rows and the parent that the first reports to, in id order, as a flush does.
WITH RECURSIVE family AS (
    (SELECT id FROM {schema}.instances WHERE id = %(id)s
     UNION ALL
     SELECT id FROM {schema}.history WHERE id = %(id)s AND children_round > 0 AND %(cascade)s)
    UNION ALL
    -- Lateral, so that each generation is read through the children's indexes, whatever the statistics.
    SELECT c.id
    FROM family AS f
    CROSS JOIN LATERAL (
        SELECT i.id FROM {schema}.instances AS i WHERE i.parent_id = f.id
        UNION ALL
        SELECT h.id FROM {schema}.history AS h WHERE h.parent_id = f.id AND h.children_round > 0
    ) AS c
    WHERE %(cascade)s
), relatives AS MATERIALIZED (
    SELECT array_agg(id) AS mine,
           array_agg(id) || ARRAY(SELECT parent_id FROM {schema}.instances WHERE id = %(id)s) AS theirs
    FROM family
), locked AS MATERIALIZED (
    SELECT i.id, i.id = ANY ((SELECT mine FROM relatives)::bigint[]) AS mine FROM {schema}.instances AS i
    WHERE i.id = ANY ((SELECT theirs FROM relatives)::bigint[]) AND i.finished_at IS NULL
    ORDER BY i.id FOR NO KEY UPDATE
)
UPDATE {schema}.instances AS i
SET cancel_requested = true,
    terminate_requested = i.terminate_requested OR %(terminate)s,
    status = CASE WHEN i.status = 'executing' THEN i.status ELSE 'cancelled' END,
    finished_at = CASE WHEN i.status = 'executing' THEN NULL ELSE clock_timestamp() END,
    error = CASE WHEN i.cancel_requested THEN i.error ELSE %(error)s END,
    reason = NULL, lane = NULL
FROM locked WHERE i.id = locked.id AND locked.mine AND i.finished_at IS NULL
RETURNING i.id, i.status::text;

-- name: mark_cascade
-- Note a cascading cancel, in a transaction of its own before the walk. Params: id bigint (the target), terminate bool,
-- error jsonb. Rows: id of the mark.
INSERT INTO {schema}.cascades (target_id, terminate, error) VALUES (%(id)s, %(terminate)s, %(error)s) RETURNING id;

-- name: hold_cascade
-- Lock the mark of a cascading cancel that begins its walk. Params: id bigint (the mark).
SELECT id FROM {schema}.cascades WHERE id = %(id)s FOR UPDATE;

-- name: end_cascade
-- The walk is over, in its transaction: nothing of the tree can go on any more. Params: id bigint (the mark).
DELETE FROM {schema}.cascades WHERE id = %(id)s;

-- name: left_cascade
-- A cascading cancel whose process ended before it was through. Params: age float8 (seconds).
-- Rows: id of the mark, target_id, terminate, error. Locks: cascades FOR UPDATE SKIP LOCKED.
SELECT id, target_id, terminate, error FROM {schema}.cascades
WHERE asked_at < clock_timestamp() - make_interval(secs => %(age)s)
ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED;

-- name: cancel_asked
-- Whether a claim was asked to end. Params: id bigint, token int. Rows: bool; none: the claim is not there any more.
SELECT cancel_requested FROM {schema}.instances WHERE id = %(id)s AND token = %(token)s AND status = 'executing';

-- name: rival
-- A finished instance's correlation key, and who occupies it. Params: id bigint. Rows: correlation_key, id.
SELECT h.correlation_key, i.id
FROM (SELECT id, correlation_key FROM {schema}.history WHERE id = %(id)s
      UNION ALL SELECT id, correlation_key FROM {schema}.instances WHERE id = %(id)s) AS h
LEFT JOIN {schema}.instances AS i
       ON i.correlation_key = h.correlation_key AND i.id <> h.id
      AND CASE WHEN i.correlation_scope IS NULL THEN i.status NOT IN ('done', 'failed', 'cancelled')
               ELSE i.status = ANY (i.correlation_scope) END;

-- name: retry_failed
-- Put a failed instance back under the same id, at its failed step, in one statement: token and version go on, attempt
-- and crashes begin again. Its signals were kept; with the names it awaited its step is shown them again. A barrier that
-- counted it does not count it again (parent_round goes).
-- An occupied correlation key is a unique violation, and nothing is moved. Params: id bigint. Rows: id, queue.
WITH gone AS (
    DELETE FROM {schema}.history WHERE id = %(id)s AND status = 'failed' RETURNING *
), kept AS (
    UPDATE {schema}.instances
    SET status = 'runnable', eligible_at = clock_timestamp(), finished_at = NULL, attempt = 0, crashes = 0,
        result_type = NULL, result = NULL, cancel_requested = false, terminate_requested = false,
        expires_at = NULL, deadline = NULL, parent_round = NULL, reason = NULL
    WHERE id = %(id)s AND status = 'failed'
    RETURNING id, queue
), back AS (
    INSERT INTO {schema}.instances
        (id, eligible_at, created_at, status, token, version, machine_version, priority, max_attempts, queue, machine,
         step, state_type, state, error, correlation_key, correlation_scope, parent_id, children_round, concurrency_key,
         rate_limit, weight, trace, inbox, awaits, shown, signals_seen)
    SELECT id, clock_timestamp(), created_at, 'runnable', token, version, machine_version, priority, max_attempts, queue,
           machine, step, state_type, state, error, correlation_key, correlation_scope, parent_id, children_round,
           concurrency_key, rate_limit, weight, trace, inbox, awaits, shown, signals_seen
    FROM gone
    RETURNING id, queue
)
SELECT id, queue FROM kept UNION ALL SELECT id, queue FROM back;

-- name: archive
-- Move the finished ones among these rows to history, unless they keep a correlation key reserved.
-- Runs in the transaction that finished them. The condition is not on finished_at: its index holds every kept row.
-- Params: ids bigint[].
WITH gone AS (
    DELETE FROM {schema}.instances
    WHERE id = ANY (%(ids)s::bigint[]) AND status IN ('done', 'failed', 'cancelled')
      AND (correlation_scope IS NULL OR status <> ALL (correlation_scope))
    RETURNING *
)
INSERT INTO {schema}.history SELECT * FROM gone;

-- name: show
-- Everything about one instance, payloads as stored, and the process that runs it. Params: id bigint.
-- Rows: inspection.Detail.
SELECT e.id, e.machine, e.machine_version, e.step, e.queue, e.priority, e.status::text, e.attempt, e.crashes, e.version,
       e.token, e.max_attempts, e.created_at, e.eligible_at, e.finished_at, e.expires_at, e.correlation_key,
       e.correlation_scope::text[], e.cancel_requested, e.reason, e.error, e.state_type, e.state, e.result_type, e.result,
       e.worker_id, w.name, w.host, w.pid, e.awaits, e.deadline, e.parent_id, e.concurrency_key, e.rate_limit, e.weight,
       e.lane, e.lane LIKE 'rate %%' AND NOT EXISTS (
           SELECT FROM {schema}.limits AS l WHERE l.kind = 'rate' AND l.name = split_part(e.rate_limit, ':', 1)),
       CASE WHEN e.finished_at IS NOT NULL THEN coalesce(e.signals_seen, 0) END
FROM (SELECT * FROM {schema}.instances WHERE id = %(id)s
      UNION ALL
      SELECT * FROM {schema}.history WHERE id = %(id)s) AS e
LEFT JOIN {schema}.workers AS w ON w.id = e.worker_id;

-- name: list
-- Live and finished instances, newest first.
-- Params: queue, status, machine text|null; before bigint|null (ids below it); limit bigint|null.
SELECT id, queue, priority, status::text, machine, machine_version, step, attempt, crashes, version,
       created_at, eligible_at, finished_at, correlation_key, error, reason, concurrency_key, rate_limit, lane,
       lane LIKE 'rate %%' AND NOT EXISTS (
           SELECT FROM {schema}.limits AS l WHERE l.kind = 'rate' AND l.name = split_part(rate_limit, ':', 1)),
       coalesce(finished_at IS NOT NULL AND inbox > coalesce(signals_seen, 0), false)
FROM (SELECT * FROM {schema}.instances UNION ALL SELECT * FROM {schema}.history) AS every
WHERE (%(queue)s::text IS NULL OR queue = %(queue)s)
  AND (%(status)s::text IS NULL OR status = %(status)s::text::{schema}.status)
  AND (%(machine)s::text IS NULL OR machine = %(machine)s)
  AND (%(before)s::bigint IS NULL OR id < %(before)s)
ORDER BY id DESC
LIMIT %(limit)s;

-- name: lock_purgeable
-- Lock the waiting instances that never started, and the parents they report to, in one order, as a flush and a cascade
-- do. Those that another session holds, or whose parent it holds, are left out: to wait for one, with the whole queue
-- locked, would stop the queue.
-- Params: queue text|null (all). Rows: id. Locks: instances FOR UPDATE SKIP LOCKED, in id order.
WITH waiting AS MATERIALIZED (
    SELECT id, CASE WHEN parent_round IS NOT NULL THEN parent_id END AS parent_id FROM {schema}.instances
    WHERE status IN ('runnable', 'scheduled') AND version = 0
      AND (%(queue)s::text IS NULL OR queue = %(queue)s)
), locked AS MATERIALIZED (
    SELECT id FROM {schema}.instances
    WHERE id = ANY (ARRAY(SELECT id FROM waiting UNION ALL SELECT parent_id FROM waiting))
    ORDER BY id FOR UPDATE SKIP LOCKED
)
SELECT w.id FROM waiting AS w JOIN locked AS l ON l.id = w.id
WHERE w.parent_id IS NULL OR EXISTS (SELECT FROM locked AS p WHERE p.id = w.parent_id)
   OR NOT EXISTS (SELECT FROM {schema}.instances AS p WHERE p.id = w.parent_id);

-- name: purge
-- Delete those of these locked rows that never started. Params: ids bigint[].
-- Rows: id, parent_id, inbox, concurrency_key, rate_limit.
DELETE FROM {schema}.instances
WHERE id = ANY (%(ids)s::bigint[]) AND status IN ('runnable', 'scheduled') AND version = 0
RETURNING id, CASE WHEN parent_round IS NOT NULL THEN parent_id END, inbox, concurrency_key, rate_limit;

-- name: purgeable
-- How many instances `purge` would delete. Params: queue text|null (all). Rows: count.
SELECT count(*) FROM {schema}.instances
WHERE status IN ('runnable', 'scheduled') AND version = 0
  AND (%(queue)s::text IS NULL OR queue = %(queue)s);

-- name: queues
-- Each queue's live counts, the age of its oldest runnable instance in seconds, and what is ordered for it.
SELECT q.queue, coalesce(i.runnable, 0), coalesce(i.scheduled, 0), coalesce(i.executing, 0), coalesce(i.awaiting, 0),
       i.oldest, coalesce(w.workers, 0), k.paused_at, k.reason, k.concurrency, k.ageing
FROM (SELECT queue FROM {schema}.instances
      UNION SELECT queue FROM {schema}.workers
      WHERE kind = 'worker' AND dead_at IS NULL AND queue IS NOT NULL
      UNION SELECT name FROM {schema}.queues
      WHERE paused_at IS NOT NULL OR concurrency IS NOT NULL OR ageing IS NOT NULL) AS q
LEFT JOIN {schema}.queues AS k ON k.name = q.queue
LEFT JOIN (
    SELECT queue, count(*) FILTER (WHERE status = 'runnable') AS runnable,
           count(*) FILTER (WHERE status = 'scheduled') AS scheduled,
           count(*) FILTER (WHERE status = 'executing') AS executing,
           count(*) FILTER (WHERE status IN ('awaiting_signal', 'awaiting_children')) AS awaiting,
           extract(epoch FROM clock_timestamp() - min(eligible_at) FILTER (WHERE status = 'runnable'))::float8 AS oldest
    FROM {schema}.instances GROUP BY queue) AS i USING (queue)
LEFT JOIN (
    SELECT queue, count(*) AS workers FROM {schema}.workers
    WHERE kind = 'worker' AND dead_at IS NULL AND expires_at > clock_timestamp() GROUP BY queue) AS w USING (queue)
ORDER BY q.queue;

-- name: live_totals
-- The live table's instances by status; finished ones that keep a key are among them. Rows: status, count.
SELECT status::text, count(*) FROM {schema}.instances GROUP BY status;

-- name: history_totals
-- The history's instances by status, counted up to a limit: one more than it says that there are more.
-- Params: most bigint. Rows: status, count.
SELECT 'done', count(*)
FROM (SELECT FROM {schema}.history WHERE status = 'done' LIMIT %(most)s::bigint + 1) AS found
UNION ALL
SELECT 'failed', count(*)
FROM (SELECT FROM {schema}.history WHERE status = 'failed' LIMIT %(most)s::bigint + 1) AS found
UNION ALL
SELECT 'cancelled', count(*)
FROM (SELECT FROM {schema}.history WHERE status = 'cancelled' LIMIT %(most)s::bigint + 1) AS found;

-- name: history_estimate
-- How many rows Postgres thinks the history's partitions have; those it has not looked at yet count nothing. Rows: count.
SELECT coalesce(sum(c.reltuples) FILTER (WHERE c.reltuples > 0), 0)::bigint
FROM pg_inherits AS h JOIN pg_class AS c ON c.oid = h.inhrelid
WHERE h.inhparent = '{schema}.history'::regclass;

-- name: recent_failures
-- The latest failures of the last day. Params: limit bigint. Rows: id, machine, queue, finished_at, error.
SELECT id, machine, queue, finished_at, error
FROM (SELECT id, machine, queue, status, finished_at, error FROM {schema}.instances WHERE finished_at IS NOT NULL
      UNION ALL
      SELECT id, machine, queue, status, finished_at, error FROM {schema}.history) AS every
WHERE status = 'failed' AND finished_at > clock_timestamp() - interval '1 day'
ORDER BY finished_at DESC LIMIT %(limit)s;

-- name: history_end
-- The database's clock half a second ago, and where the day's part of the history ends, for `finished_between`.
-- What finished before that moment is committed by now. Rows: moment, day, block.
SELECT moment, day,
       coalesce(pg_relation_size(to_regclass('{schema}.history_' || day)) / current_setting('block_size')::bigint, 0)
FROM (SELECT clock_timestamp() - interval '0.5 s' AS moment,
             to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYYMMDD') AS day) AS now;

-- name: finished_between
-- How many instances finished in a span of one day, by queue. Rows are appended to the history: only its end is read,
-- from the block where it ended at the span's start. Params: since, until timestamptz; block bigint. Rows: queue, count.
SELECT queue, count(*)
FROM (SELECT queue FROM {schema}.history
      WHERE finished_at > %(since)s AND finished_at <= %(until)s
        AND ctid >= ('(' || %(block)s::bigint || ',0)')::tid
      UNION ALL
      SELECT queue FROM {schema}.instances WHERE finished_at > %(since)s AND finished_at <= %(until)s) AS every
GROUP BY queue;

-- name: executions
-- How the finished instances of a queue got there. Params: queue text.
-- Rows: done; with other than one committed outcome; with a crash behind them; handed on unstarted.
SELECT count(*) FILTER (WHERE status = 'done'), count(*) FILTER (WHERE version <> 1),
       count(*) FILTER (WHERE crashes > 0), count(*) FILTER (WHERE token > 1 AND crashes = 0)
FROM {schema}.history WHERE queue = %(queue)s;
