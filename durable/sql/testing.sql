-- What durable.testing needs besides the production statements: looking without claiming, and moving the clock.

-- name: next_claimable
-- The queue of the row that comes next, whether it has a crash behind it (those come last), and whether it is limited.
-- Rows parked for a limit are left out. Params: queue text|null (any), unknown text[] ("name:version" to leave alone).
-- Rows: queue, suspect, limited.
SELECT queue, crashes > 0, concurrency_key IS NOT NULL OR rate_limit IS NOT NULL FROM {schema}.instances
WHERE status = 'runnable' AND lane IS NULL AND (%(queue)s::text IS NULL OR queue = %(queue)s)
  AND machine || ':' || machine_version <> ALL (%(unknown)s::text[])
ORDER BY crashes > 0, priority, eligible_at, id LIMIT 1;

-- name: earliest_scheduled
-- The scheduled row that is due first, and whether it is due now. Params: queue text|null (any). Rows: id, due.
SELECT id, eligible_at <= clock_timestamp() FROM {schema}.instances
WHERE status = 'scheduled' AND (%(queue)s::text IS NULL OR queue = %(queue)s)
ORDER BY eligible_at, id LIMIT 1;

-- name: make_due
-- Let a scheduled row be due now, if it is not. Params: id bigint.
UPDATE {schema}.instances SET eligible_at = clock_timestamp()
WHERE id = %(id)s AND status = 'scheduled' AND eligible_at > clock_timestamp();

-- name: awaits_tokens
-- Whether rows wait for tokens. Rows: bool.
SELECT EXISTS (SELECT FROM {schema}.buckets WHERE opens_at IS NOT NULL);

-- name: refill
-- Let the time have passed that rows wait for their tokens. Rows: bucket.
UPDATE {schema}.buckets SET full_at = clock_timestamp(), opens_at = clock_timestamp() - interval '1 s'
WHERE opens_at IS NOT NULL RETURNING bucket;

-- name: make_overdue
-- Let deadlines of parks have passed, their order kept. Params: id bigint|null (all). Rows: id.
WITH parked AS (
    SELECT id, max(deadline) OVER () - clock_timestamp() AS distance FROM {schema}.instances
    WHERE status = 'awaiting_signal' AND deadline IS NOT NULL AND (%(id)s::bigint IS NULL OR id = %(id)s::bigint)
)
UPDATE {schema}.instances AS i SET deadline = least(i.deadline, i.deadline - parked.distance)
FROM parked WHERE i.id = parked.id
RETURNING i.id;

-- name: travel
-- Move what live rows wait for back in time. Params: seconds float8. Rows: id.
UPDATE {schema}.instances
SET eligible_at = CASE WHEN status = 'scheduled' THEN eligible_at - make_interval(secs => %(seconds)s)
                       ELSE eligible_at END,
    deadline = deadline - make_interval(secs => %(seconds)s),
    expires_at = expires_at - make_interval(secs => %(seconds)s)
WHERE finished_at IS NULL AND (status = 'scheduled' OR deadline IS NOT NULL OR expires_at IS NOT NULL)
RETURNING id;

-- name: newest_of_key
-- Who occupies a correlation key, else who had it last. Params: key text. Rows: id.
SELECT id
FROM (SELECT id, finished_at FROM {schema}.instances WHERE correlation_key = %(key)s
      UNION ALL
      SELECT id, finished_at FROM {schema}.history WHERE correlation_key = %(key)s) AS every
ORDER BY finished_at IS NULL DESC, id DESC LIMIT 1;

-- name: picture
-- Every instance, live and finished, in the order of their ids. Rows: storage.testing.Pictured.
SELECT id, parent_id, parent_round, correlation_key, machine, machine_version, status::text, step, state_type, state,
       result_type, result, error ->> 'type'
FROM (SELECT * FROM {schema}.instances UNION ALL SELECT * FROM {schema}.history) AS every
ORDER BY id;

-- name: history_ready
-- Whether the history has a partition for today. Rows: bool.
SELECT EXISTS (
    SELECT FROM pg_inherits AS h JOIN pg_class AS c ON c.oid = h.inhrelid
    WHERE h.inhparent = '{schema}.history'::regclass
      AND c.relname = 'history_' || to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYYMMDD'));

-- name: in_use
-- Whether a schema holds instances, and whether processes with a live lease work on it. Rows: bool, bool.
SELECT EXISTS (SELECT FROM {schema}.instances) OR EXISTS (SELECT FROM {schema}.history),
       EXISTS (SELECT FROM {schema}.workers WHERE dead_at IS NULL AND expires_at > clock_timestamp());

-- name: wipe
-- Delete everything but the schema itself and begin to count from 1 again. For a few rows deleting is much faster than
-- TRUNCATE, which makes new files for every partition.
WITH i AS (DELETE FROM {schema}.instances),
     h AS (DELETE FROM {schema}.history),
     s AS (DELETE FROM {schema}.signals),
     w AS (DELETE FROM {schema}.workers),
     p AS (DELETE FROM {schema}.schedules),
     g AS (DELETE FROM {schema}.gates),
     b AS (DELETE FROM {schema}.buckets),
     c AS (DELETE FROM {schema}.cascades),
     d AS (UPDATE {schema}.duties SET ran_at = '-infinity')
SELECT setval('{schema}.instance_ids', 1, false),
       setval(pg_get_serial_sequence('{schema}.signals', 'id'), 1, false),
       setval(pg_get_serial_sequence('{schema}.workers', 'id'), 1, false);
