-- Signals: delivering them, showing an inbox, consuming; and the ends that a parent or an inbox must hear of.
--
-- Lost wakeups are impossible in both orders. A delivery locks its target's row whatever its status and decides in the
-- new value; a park updates that row first and then looks into the inbox with a fresh snapshot, in a statement of its
-- own. Whoever comes second waits for the other's lock, and sees what the other did.
--
-- A delivery writes the id of its signal into the target's row (`inbox`). An end compares that under the row's lock with
-- the newest signal that the step was shown: so it knows of every signal that was accepted before it.

-- name: deliver
-- Deliver signals to live instances: rows locked in id order, signals stored once per dedup key, sleepers woken.
-- Params: targets bigint[] (ids), names text[], dedup_keys text[], payload_types text[], payloads bytea[],
--         traces text[].
-- Rows:   n (position from 1), stored: whether its key was new (false: duplicate; true for every one of a key that
--         comes twice in the batch), queue, woken. Missing n: no live target.
WITH input AS MATERIALIZED (
    SELECT * FROM unnest(
        %(targets)s::bigint[], %(names)s::text[], %(dedup_keys)s::text[], %(payload_types)s::text[],
        %(payloads)s::bytea[], %(traces)s::text[]
    ) WITH ORDINALITY AS u (target_id, name, dedup_key, payload_type, payload, trace, n)
), live AS MATERIALIZED (
    SELECT i.id FROM {schema}.instances AS i
    WHERE i.id = ANY (%(targets)s::bigint[]) AND i.finished_at IS NULL
    ORDER BY i.id FOR NO KEY UPDATE
), stored AS (
    -- In the order given: an inbox is read by id. Of one dedup key the first counts.
    INSERT INTO {schema}.signals (target_id, name, dedup_key, payload_type, payload, trace)
    SELECT target_id, name, dedup_key, payload_type, payload, trace
    FROM (SELECT DISTINCT ON (input.target_id, coalesce(input.dedup_key, input.n::text), input.dedup_key IS NULL)
                 input.*
          FROM input JOIN live ON live.id = input.target_id
          ORDER BY input.target_id, coalesce(input.dedup_key, input.n::text), input.dedup_key IS NULL, input.n) AS first
    ORDER BY n
    ON CONFLICT (target_id, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING
    RETURNING id, target_id, name, dedup_key
), touched AS (
    UPDATE {schema}.instances AS i
    SET inbox = s.newest,
        status = CASE WHEN i.status = 'awaiting_signal' AND s.names && i.awaits THEN 'runnable' ELSE i.status
                 END::{schema}.status,
        eligible_at = CASE WHEN i.status = 'awaiting_signal' AND s.names && i.awaits THEN clock_timestamp()
                           ELSE i.eligible_at END,
        deadline = CASE WHEN i.status = 'awaiting_signal' AND s.names && i.awaits THEN NULL ELSE i.deadline END
    FROM (SELECT target_id, array_agg(name) AS names, max(id) AS newest FROM stored GROUP BY target_id) AS s
    WHERE i.id = ANY (ARRAY[s.target_id])
    RETURNING i.id, i.queue, i.status = 'runnable' AS woken
)
SELECT input.n, input.dedup_key IS NULL OR stored.target_id IS NOT NULL, touched.queue, coalesce(touched.woken, false)
FROM input
JOIN live ON live.id = input.target_id
LEFT JOIN stored ON stored.target_id = input.target_id AND stored.dedup_key = input.dedup_key
LEFT JOIN touched ON touched.id = input.target_id;

-- name: deliver_one
-- `deliver` for one signal, planned once: see finished_one.
-- Params: target bigint (id), name text, dedup_key text, payload_type text, payload bytea, trace text.
-- Rows:   n (1), stored, queue, woken, as deliver.
WITH live AS MATERIALIZED (
    SELECT i.id FROM {schema}.instances AS i
    WHERE i.id = %(target)s::bigint AND i.finished_at IS NULL FOR NO KEY UPDATE
), stored AS (
    INSERT INTO {schema}.signals (target_id, name, dedup_key, payload_type, payload, trace)
    SELECT live.id, %(name)s::text, %(dedup_key)s::text, %(payload_type)s::text, %(payload)s::bytea, %(trace)s::text
    FROM live
    ON CONFLICT (target_id, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING
    RETURNING id, target_id, name
), touched AS (
    UPDATE {schema}.instances AS i
    SET inbox = s.id,
        status = CASE WHEN i.status = 'awaiting_signal' AND s.name = ANY (i.awaits) THEN 'runnable' ELSE i.status
                 END::{schema}.status,
        eligible_at = CASE WHEN i.status = 'awaiting_signal' AND s.name = ANY (i.awaits) THEN clock_timestamp()
                           ELSE i.eligible_at END,
        deadline = CASE WHEN i.status = 'awaiting_signal' AND s.name = ANY (i.awaits) THEN NULL ELSE i.deadline END
    FROM stored AS s WHERE i.id = ANY (ARRAY[s.target_id])
    RETURNING i.queue, i.status = 'runnable' AS woken
)
SELECT 1, stored.target_id IS NOT NULL, touched.queue, coalesce(touched.woken, false)
FROM live LEFT JOIN stored ON true LEFT JOIN touched ON true;

-- name: occupants
-- Who occupies correlation keys. Params: keys text[]. Rows: correlation_key, id.
SELECT correlation_key, id FROM {schema}.instances
WHERE correlation_key = ANY (%(keys)s::text[])
  AND CASE WHEN correlation_scope IS NULL THEN status NOT IN ('done', 'failed', 'cancelled')
           ELSE status = ANY (correlation_scope) END
  AND finished_at IS NULL;

-- name: inbox
-- Unconsumed signals of instances, oldest first. Params: ids bigint[].
-- Rows:   target_id, id, name, payload_type, payload, created_at, trace.
SELECT target_id, id, name, payload_type, payload, created_at, trace FROM {schema}.signals
WHERE target_id = ANY (%(ids)s::bigint[]) AND NOT consumed ORDER BY target_id, id;

-- name: consume
-- Delete consumed signals; those with a dedup key stay as tombstones. In the outcome's own transaction.
-- Params: ids bigint[] of signals.
WITH kept AS (
    UPDATE {schema}.signals SET consumed = true, payload = NULL, payload_type = NULL
    WHERE id = ANY (%(ids)s::bigint[]) AND dedup_key IS NOT NULL
)
DELETE FROM {schema}.signals WHERE id = ANY (%(ids)s::bigint[]) AND dedup_key IS NULL;

-- name: wake_parked
-- After a park, in the same transaction: make those runnable whose inbox holds an awaited signal not yet shown.
-- Params: ids bigint[]. Rows: id.
UPDATE {schema}.instances AS i
SET status = 'runnable', eligible_at = clock_timestamp(), deadline = NULL
WHERE i.id = ANY (%(ids)s::bigint[]) AND i.status = 'awaiting_signal'
  AND EXISTS (SELECT FROM {schema}.signals AS s
              WHERE s.target_id = i.id AND NOT s.consumed AND s.name = ANY (i.awaits)
                AND s.id <> ALL (coalesce(i.shown, ARRAY[]::bigint[])))
RETURNING i.id;

-- name: settle_inboxes
-- Delete the signals of rows that ended, tombstones too, before they are archived. A failed row keeps all of them for a
-- retry, the others those that no step was shown: they are unread. Params: ids bigint[].
DELETE FROM {schema}.signals AS s USING {schema}.instances AS i
WHERE i.id = ANY (%(ids)s::bigint[]) AND i.status IN ('done', 'cancelled')
  AND s.target_id = ANY (ARRAY[i.id]) AND (s.consumed OR s.id <= i.signals_seen);

-- name: unread_counts
-- How many unread signals of each name finished instances have. Params: ids, seen bigint[] (the newest signal that a
-- step was shown). Rows: target_id, name, count.
SELECT s.target_id, s.name, count(*)
FROM unnest(%(ids)s::bigint[], %(seen)s::bigint[]) AS o (id, seen)
JOIN {schema}.signals AS s ON s.target_id = ANY (ARRAY[o.id]) AND s.id > o.seen
WHERE NOT s.consumed GROUP BY s.target_id, s.name ORDER BY s.target_id, s.name;

-- name: unread
-- The unread signals of a finished instance, oldest first. Params: id bigint. Rows: as inbox, without target_id.
SELECT s.id, s.name, s.payload_type, s.payload, s.created_at, s.trace
FROM (SELECT id, signals_seen FROM {schema}.instances WHERE id = %(id)s AND finished_at IS NOT NULL
      UNION ALL
      SELECT id, signals_seen FROM {schema}.history WHERE id = %(id)s) AS e
JOIN {schema}.signals AS s ON s.target_id = e.id AND s.id > coalesce(e.signals_seen, 0)
WHERE NOT s.consumed ORDER BY s.id;

-- name: clear_inboxes
-- Delete every signal of deleted instances, tombstones too. Params: ids bigint[].
DELETE FROM {schema}.signals WHERE target_id = ANY (%(ids)s::bigint[]);

-- name: time_out
-- Wake parks whose deadline has passed, the longest overdue first. Params: limit bigint. Rows: queue, count.
-- Locks: instances FOR NO KEY UPDATE SKIP LOCKED.
WITH due AS MATERIALIZED (
    SELECT ctid AS row FROM {schema}.instances
    WHERE status = 'awaiting_signal' AND deadline IS NOT NULL AND deadline <= (SELECT clock_timestamp())
    ORDER BY deadline
    LIMIT %(limit)s
    FOR NO KEY UPDATE SKIP LOCKED
), woken AS (
    UPDATE {schema}.instances AS i SET status = 'runnable', eligible_at = clock_timestamp(), deadline = NULL
    FROM due WHERE i.ctid = due.row
    RETURNING i.queue
)
SELECT queue, count(*) FROM woken GROUP BY queue;
