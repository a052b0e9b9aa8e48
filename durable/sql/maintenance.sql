-- What agents and beats do on a clock. Any number of them may run these at once.

-- name: probe
-- An agent's one idle query: for each of its queues how many rows wait (unlimited ones and limited ones no more than
-- it has idle children), whether a suspect does, whether anything is due, any lease has run out, a token lane may open.
-- Params: queues text[], idle bigint[], known text[] ("name:version"). Rows: queue, waiting, suspect, due, expired,
--         opens.
SELECT q.queue,
       (SELECT count(*) FROM (
            SELECT FROM {schema}.instances AS i
            WHERE i.queue = q.queue AND i.status = 'runnable' AND i.crashes = 0
              AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
              AND i.machine || ':' || i.machine_version = ANY (%(known)s::text[])
            LIMIT q.idle) AS w)
       + (SELECT count(*) FROM (
            SELECT FROM {schema}.instances AS i
            WHERE i.queue = q.queue AND i.status = 'runnable' AND i.lane IS NULL
              AND (i.concurrency_key IS NOT NULL OR i.rate_limit IS NOT NULL)
              AND i.machine || ':' || i.machine_version = ANY (%(known)s::text[])
            LIMIT q.idle) AS l),
       EXISTS (SELECT FROM {schema}.instances AS i
               WHERE i.queue = q.queue AND i.status = 'runnable' AND i.crashes > 0
                 AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
                 AND i.machine || ':' || i.machine_version = ANY (%(known)s::text[])),
       EXISTS (SELECT FROM {schema}.instances
               WHERE status = 'scheduled' AND eligible_at <= (SELECT clock_timestamp()))
       OR EXISTS (SELECT FROM {schema}.instances
                  WHERE status = 'awaiting_signal' AND deadline IS NOT NULL
                    AND deadline <= (SELECT clock_timestamp())),
       EXISTS (SELECT FROM {schema}.workers WHERE dead_at IS NULL AND expires_at < clock_timestamp()),
       EXISTS (SELECT FROM {schema}.buckets WHERE opens_at IS NOT NULL AND opens_at <= (SELECT clock_timestamp()))
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
-- Seconds until the next scheduled row, deadline, schedule or token lane is due; null when there is none. Idle workers
-- open token lanes to the moment, so that a beat gives them 20 ms. Params: left text[] (names of schedules that do not
-- count).
SELECT extract(epoch FROM least(
    (SELECT min(eligible_at) FROM {schema}.instances WHERE status = 'scheduled'),
    (SELECT min(deadline) FROM {schema}.instances WHERE status = 'awaiting_signal' AND deadline IS NOT NULL),
    (SELECT min(next_at) FROM {schema}.schedules WHERE enabled AND next_at IS NOT NULL
       AND name <> ALL (%(left)s::text[])),
    (SELECT min(opens_at) + interval '20 ms' FROM {schema}.buckets WHERE opens_at IS NOT NULL)
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
-- Delete finished rows that kept their key reserved, once retention has passed and no live parent may ask for them.
-- Params: retention float8, limit bigint. Rows: id.
DELETE FROM {schema}.instances WHERE id = ANY (ARRAY(
    SELECT k.id FROM {schema}.instances AS k
    WHERE k.finished_at < (SELECT clock_timestamp() - make_interval(secs => %(retention)s))
      AND NOT EXISTS (SELECT FROM {schema}.instances AS p WHERE p.id = ANY (ARRAY[k.parent_id]) AND p.finished_at IS NULL)
    ORDER BY k.finished_at LIMIT %(limit)s FOR UPDATE OF k SKIP LOCKED))
RETURNING id;

-- name: wanted_children
-- Rows of a range of the history whose parent is live. From one parent to the next by index, each looked up in the live
-- table: children of parents that are over cost a step per parent, not one per child.
-- Params: since, until timestamptz; limit bigint. Rows: id.
WITH RECURSIVE parents (id) AS (
    (SELECT h.parent_id FROM {schema}.history AS h
     WHERE h.finished_at >= %(since)s AND h.finished_at < %(until)s AND h.parent_id IS NOT NULL
     ORDER BY h.parent_id LIMIT 1)
    UNION ALL
    SELECT (SELECT h.parent_id FROM {schema}.history AS h
            WHERE h.finished_at >= %(since)s AND h.finished_at < %(until)s AND h.parent_id > p.id
            ORDER BY h.parent_id LIMIT 1)
    FROM parents AS p WHERE p.id IS NOT NULL
)
SELECT c.id
FROM parents AS p
CROSS JOIN LATERAL (SELECT i.id FROM {schema}.instances AS i WHERE i.id = p.id AND i.finished_at IS NULL LIMIT 1) AS live
CROSS JOIN LATERAL (
    SELECT h.id FROM {schema}.history AS h
    WHERE h.finished_at >= %(since)s AND h.finished_at < %(until)s AND h.parent_id = live.id
    LIMIT %(limit)s) AS c
LIMIT %(limit)s;

-- name: more_than
-- Whether a range of the history holds more than so many rows. Params: since, until timestamptz; count bigint. Rows: bool.
SELECT EXISTS (SELECT FROM {schema}.history
               WHERE finished_at >= %(since)s AND finished_at < %(until)s OFFSET %(count)s);

-- name: sweep_workers
-- Forget leases that have been dead for an hour and hold nothing. Rows: id. Locks: workers FOR UPDATE SKIP LOCKED.
DELETE FROM {schema}.workers WHERE id = ANY (ARRAY(
    SELECT w.id FROM {schema}.workers AS w
    WHERE w.dead_at < clock_timestamp() - interval '1 hour'
      AND NOT EXISTS (SELECT FROM {schema}.instances AS i WHERE i.worker_id = w.id AND i.status = 'executing')
    FOR UPDATE OF w SKIP LOCKED))
RETURNING id;

-- name: signal_targets
-- Between which ids the targets of signals lie; nulls when there are no signals. Rows: lowest, highest.
SELECT min(target_id), max(target_id) FROM {schema}.signals;

-- name: sweep_signals
-- Delete the signals of instances that are gone or ended without keeping any, among the next targets of a range. From
-- one target to the next by index. A retry moves an instance from the history in one statement: one snapshot finds it in
-- one of both places.
-- Params: since, until bigint (targets from, up to); limit bigint (targets looked at). Rows: targets, deleted.
-- Locks: signals FOR UPDATE SKIP LOCKED.
WITH RECURSIVE targets (id, n) AS (
    (SELECT s.target_id, 1 FROM {schema}.signals AS s
     WHERE s.target_id >= %(since)s::bigint AND s.target_id <= %(until)s::bigint
     ORDER BY s.target_id LIMIT 1)
    UNION ALL
    SELECT (SELECT s.target_id FROM {schema}.signals AS s
            WHERE s.target_id > t.id AND s.target_id <= %(until)s::bigint
            ORDER BY s.target_id LIMIT 1), t.n + 1
    FROM targets AS t WHERE t.id IS NOT NULL AND t.n < %(limit)s::bigint
), gone AS MATERIALIZED (
    SELECT t.id FROM targets AS t
    WHERE t.id IS NOT NULL
      AND NOT EXISTS (SELECT FROM {schema}.instances AS i
                      WHERE i.id = ANY (ARRAY[t.id]) AND (i.finished_at IS NULL OR i.inbox IS NOT NULL))
      AND NOT EXISTS (SELECT FROM {schema}.history AS h
                      WHERE h.id = ANY (ARRAY[t.id]) AND h.inbox IS NOT NULL
                        AND h.finished_at < statement_timestamp() + interval '1 hour')
), deleted AS (
    DELETE FROM {schema}.signals WHERE id = ANY (ARRAY(
        SELECT s.id FROM gone JOIN {schema}.signals AS s ON s.target_id = ANY (ARRAY[gone.id])
        FOR UPDATE OF s SKIP LOCKED))
    RETURNING id
)
SELECT (SELECT count(id) FROM targets), (SELECT count(*) FROM deleted);

-- name: now
-- The database's clock.
SELECT clock_timestamp();

-- name: partitions
-- The history's partitions. Params: parent text. Rows: table name.
SELECT c.relname FROM pg_inherits AS h JOIN pg_class AS c ON c.oid = h.inhrelid
WHERE h.inhparent = %(parent)s::regclass ORDER BY c.relname;

-- name: make_partition
-- Make and attach a day's partition of the history. Params: day date.
SELECT {schema}.make_partition(%(day)s);

-- name: drop_partition
-- Drop a day's partition with every row in it. Params: day date.
SELECT {schema}.drop_partition(%(day)s);

-- name: thin_partition
-- Leave only the wanted rows in a day's partition. Params: day date, wanted bigint[] (ids).
SELECT {schema}.thin_partition(%(day)s, %(wanted)s::bigint[]);
