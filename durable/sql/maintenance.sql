-- What agents and beats do on a clock. Any number of them may run these at once.

-- name: probe
-- An agent's one idle query: for each of its queues how many rows wait (no more than it has idle children), whether
-- a suspect does, and whether anything is due or any lease has run out.
-- Params: queues text[], idle bigint[], known text[] ("name:version"). Rows: queue, waiting, suspect, due, expired.
SELECT q.queue,
       (SELECT count(*) FROM (
            SELECT FROM {schema}.instances AS i
            WHERE i.queue = q.queue AND i.status = 'runnable' AND i.crashes = 0
              AND i.machine || ':' || i.machine_version = ANY (%(known)s::text[])
            LIMIT q.idle) AS w),
       EXISTS (SELECT FROM {schema}.instances AS i
               WHERE i.queue = q.queue AND i.status = 'runnable' AND i.crashes > 0
                 AND i.machine || ':' || i.machine_version = ANY (%(known)s::text[])),
       EXISTS (SELECT FROM {schema}.instances
               WHERE status = 'scheduled' AND eligible_at <= (SELECT clock_timestamp()))
       OR EXISTS (SELECT FROM {schema}.instances
                  WHERE status = 'awaiting_signal' AND deadline IS NOT NULL
                    AND deadline <= (SELECT clock_timestamp())),
       EXISTS (SELECT FROM {schema}.workers WHERE dead_at IS NULL AND expires_at < clock_timestamp())
FROM unnest(%(queues)s::text[], %(idle)s::bigint[]) AS q (queue, idle);

-- name: promote
-- Make due rows runnable, the longest due first. Params: limit bigint. Rows: queue, count.
-- Locks: instances FOR NO KEY UPDATE SKIP LOCKED.
WITH due AS MATERIALIZED (
    SELECT ctid AS row FROM {schema}.instances
    WHERE status = 'scheduled' AND eligible_at <= (SELECT clock_timestamp())
    ORDER BY eligible_at
    LIMIT %(limit)s
    FOR NO KEY UPDATE SKIP LOCKED
), promoted AS (
    UPDATE {schema}.instances AS i SET status = 'runnable', eligible_at = clock_timestamp()
    FROM due WHERE i.ctid = due.row
    RETURNING i.queue
)
SELECT queue, count(*) FROM promoted GROUP BY queue;

-- name: next_due
-- Seconds until the next scheduled row or deadline is due; null when there is none.
SELECT extract(epoch FROM least(
    (SELECT min(eligible_at) FROM {schema}.instances WHERE status = 'scheduled'),
    (SELECT min(deadline) FROM {schema}.instances WHERE status = 'awaiting_signal' AND deadline IS NOT NULL)
) - clock_timestamp())::float8;

-- name: take_duty
-- Claim a duty when its interval has passed; any number of beats may ask. Params: name text, interval float8. Rows: name.
WITH due AS (
    SELECT name FROM {schema}.duties
    WHERE name = %(name)s AND ran_at < clock_timestamp() - make_interval(secs => %(interval)s)
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.duties AS d SET ran_at = clock_timestamp() FROM due WHERE d.name = due.name
RETURNING d.name;

-- name: sweep_kept
-- Delete finished rows that kept their key reserved, once retention has passed. Params: retention float8, limit bigint.
-- Rows: id.
DELETE FROM {schema}.instances WHERE id IN (
    SELECT id FROM {schema}.instances
    WHERE finished_at < (SELECT clock_timestamp() - make_interval(secs => %(retention)s))
    ORDER BY finished_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
RETURNING id;

-- name: sweep_workers
-- Forget leases that have been dead for an hour and hold nothing. Rows: id.
DELETE FROM {schema}.workers AS w
WHERE w.dead_at < clock_timestamp() - interval '1 hour'
  AND NOT EXISTS (SELECT FROM {schema}.instances AS i WHERE i.worker_id = w.id AND i.status = 'executing')
RETURNING w.id;

-- name: sweep_signals
-- Delete signals of instances that are finished: those that were delivered while their target's end committed.
-- Rows: id.
DELETE FROM {schema}.signals AS s
WHERE s.created_at < clock_timestamp() - interval '1 minute'
  AND NOT EXISTS (SELECT FROM {schema}.instances AS i WHERE i.id = s.target_id AND i.finished_at IS NULL)
RETURNING s.id;

-- name: now
-- The database's clock.
SELECT clock_timestamp();

-- name: partitions
-- The history's partitions. Params: parent text. Rows: table name.
SELECT c.relname FROM pg_inherits AS h JOIN pg_class AS c ON c.oid = h.inhrelid
WHERE h.inhparent = %(parent)s::regclass ORDER BY c.relname;
