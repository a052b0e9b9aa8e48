-- Children: the barrier that their parent waits at. The barrier counts ends, not successes.

-- name: lock_family
-- Lock rows and the parents they report to in one order (a parent's id is smaller than its children's), so that a
-- flush and a cascading cancel cannot deadlock. Params: ids bigint[].
SELECT id FROM {schema}.instances WHERE id = ANY (%(ids)s::bigint[]) ORDER BY id FOR NO KEY UPDATE;

-- name: lock_parents
-- The same for ends outside of a flush: lock the parents that these rows report to, before the rows themselves.
-- Params: ids bigint[].
SELECT id FROM {schema}.instances
WHERE id = ANY (ARRAY(SELECT parent_id FROM {schema}.instances WHERE id = ANY (%(ids)s::bigint[])))
ORDER BY id FOR NO KEY UPDATE;

-- name: lock_free
-- Lock those of these rows, and of the parents they report to, that no other session holds; wait for none. What a batch
-- does when its own statement had to wait: the rows that come back are left out, for a later turn.
-- Params: ids bigint[]. Rows: id, parent_id: of rows that another session holds (parent_id null) or whose parent it holds.
-- Locks: instances FOR UPDATE SKIP LOCKED, in id order: what an end does to a row needs as much.
WITH family AS MATERIALIZED (
    SELECT id, CASE WHEN parent_round IS NOT NULL THEN parent_id END AS parent_id FROM {schema}.instances
    WHERE id = ANY (%(ids)s::bigint[])
), locked AS MATERIALIZED (
    SELECT id FROM {schema}.instances
    WHERE id = ANY (ARRAY(SELECT id FROM family UNION SELECT parent_id FROM family)) ORDER BY id FOR UPDATE SKIP LOCKED
), ours AS MATERIALIZED (
    SELECT array_agg(id) AS ids FROM locked
), held AS MATERIALIZED (
    SELECT f.id, f.parent_id, f.id = ANY ((SELECT ids FROM ours)::bigint[]) IS NOT TRUE AS itself FROM family AS f
)
SELECT h.id, CASE WHEN NOT h.itself THEN h.parent_id END FROM held AS h
WHERE h.itself OR (h.parent_id = ANY ((SELECT ids FROM ours)::bigint[])) IS NOT TRUE
                  AND EXISTS (SELECT FROM {schema}.instances AS p WHERE p.id = ANY (ARRAY[h.parent_id]));

-- name: raise_barrier
-- Set how many children a parent waits for, in the transaction that inserted them; none: it goes on at once.
-- Params: ids bigint[], counts int[]. Rows: id, queue, status, whether any cascading cancel is under way.
UPDATE {schema}.instances AS i
SET children_pending = c.count,
    status = CASE WHEN c.count = 0 THEN 'runnable' ELSE 'awaiting_children' END::{schema}.status,
    eligible_at = clock_timestamp()
FROM unnest(%(ids)s::bigint[], %(counts)s::int[]) AS c (id, count)
WHERE i.id = ANY (ARRAY[c.id]) AND i.status = 'awaiting_children'
RETURNING i.id, i.queue, i.status::text, EXISTS (SELECT FROM {schema}.cascades);

-- name: under_cascade
-- Which of these parents are the target of a cascading cancel, or below one. Params: ids bigint[]. Rows: id, error.
WITH RECURSIVE upwards (parent, id) AS (
    SELECT p.id, p.id FROM unnest(%(ids)s::bigint[]) AS p (id)
    UNION ALL
    SELECT u.parent, a.parent_id
    FROM upwards AS u
    CROSS JOIN LATERAL (SELECT i.parent_id FROM {schema}.instances AS i WHERE i.id = ANY (ARRAY[u.id])
                        UNION ALL
                        SELECT h.parent_id FROM {schema}.history AS h WHERE h.id = ANY (ARRAY[u.id])) AS a
    WHERE a.parent_id < u.id
)
SELECT DISTINCT ON (u.parent) u.parent, c.error
FROM upwards AS u JOIN {schema}.cascades AS c ON c.target_id = u.id
ORDER BY u.parent, c.id;

-- name: cancel_locked
-- Cancel a parent and the children that its outcome has just inserted, all of them locked. Params: ids bigint[],
-- error jsonb.
UPDATE {schema}.instances
SET cancel_requested = true, status = 'cancelled', finished_at = clock_timestamp(), error = %(error)s, reason = NULL,
    lane = NULL
WHERE id = ANY (%(ids)s::bigint[]) AND finished_at IS NULL;

-- name: join_children
-- Lower barriers by the number of children that ended in this transaction; at zero the parent goes on. One that was
-- lower already (somebody changed it) must not refuse the children's outcomes.
-- Params: ids bigint[] (parents), counts int[]. Rows: id, queue, status.
UPDATE {schema}.instances AS i
SET children_pending = greatest(i.children_pending - c.count, 0),
    status = CASE WHEN i.children_pending <= c.count THEN 'runnable' ELSE i.status END::{schema}.status,
    eligible_at = CASE WHEN i.children_pending <= c.count THEN clock_timestamp() ELSE i.eligible_at END
FROM unnest(%(ids)s::bigint[], %(counts)s::int[]) AS c (id, count)
WHERE i.id = ANY (ARRAY[c.id]) AND i.status = 'awaiting_children'
RETURNING i.id, i.queue, i.status::text;

-- name: ended_families
-- Whom the finished ones among these rows report to, and who of them may have signals. Params: ids bigint[].
-- Rows:   id, parent_id, inbox, concurrency_key, rate_limit.
SELECT id, CASE WHEN parent_round IS NOT NULL THEN parent_id END, inbox, concurrency_key, rate_limit
FROM {schema}.instances WHERE id = ANY (%(ids)s::bigint[]) AND finished_at IS NOT NULL;

-- name: children_by_status
-- How many children of every round an instance has, live and finished. Params: parent bigint. Rows: status, count.
SELECT status::text, count(*)
FROM (SELECT status FROM {schema}.instances WHERE parent_id = %(parent)s
      UNION ALL
      SELECT status FROM {schema}.history WHERE parent_id = %(parent)s) AS family
GROUP BY family.status ORDER BY family.status;

-- name: children
-- A page of an instance's children, live or finished, by id. Params: parent bigint, round int|null (all rounds),
--         after bigint, limit bigint. Rows: id, machine, status, state_type, state, result_type, result, error.
SELECT id, machine, status::text, state_type, state, result_type, result, error
FROM (
    (SELECT id, machine, status, state_type, state, result_type, result, error FROM {schema}.instances
     WHERE parent_id = %(parent)s AND (%(round)s::int IS NULL OR parent_round = %(round)s) AND id > %(after)s
     ORDER BY id LIMIT %(limit)s)
    UNION ALL
    (SELECT id, machine, status, state_type, state, result_type, result, error FROM {schema}.history
     WHERE parent_id = %(parent)s AND (%(round)s::int IS NULL OR parent_round = %(round)s) AND id > %(after)s
     ORDER BY id LIMIT %(limit)s)
) AS family
ORDER BY id LIMIT %(limit)s;
