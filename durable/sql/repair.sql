-- What `durable doctor` looks for that no code of ours leaves behind, and how `--fix` mends it: rows changed by hand, or
-- restored in part. Each look is one statement, and so sees every commit whole or not at all.

-- name: lost_parents
-- Live children whose parent is neither live nor in the history, although it can't have been collected yet: a parent
-- that ended after it had this child is kept for `retention` from then on. Params: retention float8 (seconds).
-- Rows: id, parent_id.
SELECT i.id, i.parent_id FROM {schema}.instances AS i
WHERE i.parent_round IS NOT NULL AND i.finished_at IS NULL
  AND i.created_at > clock_timestamp() - make_interval(secs => %(retention)s)
  AND NOT EXISTS (SELECT FROM {schema}.instances AS p WHERE p.id = i.parent_id AND p.id < i.id)
  AND NOT EXISTS (SELECT FROM {schema}.history AS p WHERE p.id = i.parent_id AND p.id < i.id)
ORDER BY i.id;

-- name: wrong_barriers
-- Parents that wait for another number of children than are unfinished in their present round.
-- Rows: id, children_pending, unfinished.
SELECT i.id, i.children_pending, c.count
FROM {schema}.instances AS i
CROSS JOIN LATERAL (
    SELECT count(*)::int FROM {schema}.instances AS k
    WHERE k.parent_id = i.id AND k.parent_round = i.children_round AND k.finished_at IS NULL) AS c
WHERE i.status = 'awaiting_children' AND i.children_pending <> c.count
ORDER BY i.id;

-- name: unheard_signals
-- Live instances with signals that they would never be shown, or asleep on one that they await. Rows: id, signals.
SELECT i.id, count(*)
FROM {schema}.signals AS s JOIN {schema}.instances AS i ON i.id = s.target_id
WHERE NOT s.consumed AND i.finished_at IS NULL
  AND (coalesce(i.inbox, 0) < s.id OR (i.status = 'awaiting_signal' AND s.name = ANY (i.awaits)
                       AND s.id <> ALL (coalesce(i.shown, ARRAY[]::bigint[]))))
GROUP BY i.id ORDER BY i.id;

-- name: dead_letters
-- Signals of instances that are gone or ended without keeping any, which garbage collection should have deleted. Params: slack float8 (seconds).
-- Rows: signals, the lowest target.
SELECT count(*), min(s.target_id) FROM {schema}.signals AS s
WHERE s.created_at < clock_timestamp() - make_interval(secs => %(slack)s)
  AND NOT EXISTS (SELECT FROM {schema}.instances AS i
                  WHERE i.id = s.target_id AND (i.finished_at IS NULL OR i.inbox IS NOT NULL))
  AND NOT EXISTS (SELECT FROM {schema}.history AS h WHERE h.id = s.target_id AND h.inbox IS NOT NULL);

-- name: hold_rows
-- Lock live rows in the order of their ids, so that nothing they wait for is committed meanwhile. Params: ids bigint[].
SELECT id FROM {schema}.instances WHERE id = ANY (%(ids)s::bigint[]) ORDER BY id FOR NO KEY UPDATE;

-- name: detach
-- Have rows report to nobody. Params: ids bigint[]. Rows: id.
UPDATE {schema}.instances SET parent_id = NULL, parent_round = NULL
WHERE id = ANY (%(ids)s::bigint[]) AND finished_at IS NULL
RETURNING id;

-- name: mend_barriers
-- Count again what held parents wait for; with nothing left they go on. Params: ids bigint[]. Rows: id, queue, status.
UPDATE {schema}.instances AS i
SET children_pending = c.count,
    status = CASE WHEN c.count = 0 THEN 'runnable' ELSE i.status END::{schema}.status,
    eligible_at = CASE WHEN c.count = 0 THEN clock_timestamp() ELSE i.eligible_at END
FROM (SELECT p.id, (SELECT count(*)::int FROM {schema}.instances AS k
                    WHERE k.parent_id = p.id AND k.parent_round = p.children_round AND k.finished_at IS NULL) AS count
      FROM {schema}.instances AS p WHERE p.id = ANY (%(ids)s::bigint[])) AS c
WHERE i.id = c.id AND i.status = 'awaiting_children' AND i.children_pending <> c.count
RETURNING i.id, i.queue, i.status::text;

-- name: mend_inboxes
-- Show held rows their signals, and wake those that sleep on one. Params: ids bigint[]. Rows: id, queue, woken.
UPDATE {schema}.instances AS i
SET inbox = h.newest,
    status = CASE WHEN h.woken THEN 'runnable' ELSE i.status END::{schema}.status,
    eligible_at = CASE WHEN h.woken THEN clock_timestamp() ELSE i.eligible_at END,
    deadline = CASE WHEN h.woken THEN NULL ELSE i.deadline END
FROM (SELECT p.id, (SELECT max(s.id) FROM {schema}.signals AS s WHERE s.target_id = p.id) AS newest,
             p.status = 'awaiting_signal'
                   AND EXISTS (SELECT FROM {schema}.signals AS s
                               WHERE s.target_id = p.id AND NOT s.consumed AND s.name = ANY (p.awaits)
                                 AND s.id <> ALL (coalesce(p.shown, ARRAY[]::bigint[]))) AS woken
      FROM {schema}.instances AS p WHERE p.id = ANY (%(ids)s::bigint[])) AS h
WHERE i.id = h.id AND i.finished_at IS NULL
RETURNING i.id, i.queue, h.woken;
