-- Claiming rows, giving them back, and committing outcomes. These are the hot statements: their sessions pin generic
-- plans and index access (storage.session.PINNED_PLANS), and each is one round trip whatever its size.
--
-- The fence is written as one row comparison with IS NOT DISTINCT FROM, which no index serves: with plain equalities
-- the planner takes instances_claimed and compares every executing row of the worker with every outcome (80 us a row
-- instead of 15).
--
-- A row is joined with its entry of an array by `i.id = ANY (ARRAY[o.id])`, here and in the other files. That can only
-- be looked up in the index, entry by entry and in the array's order; for `i.id = o.id` a plan made beside an empty table,
-- and kept, walks the whole primary key and compares every row with every entry (decision 46).

-- name: claim
-- Flip at most `limit` runnable, unlimited rows of one queue to executing, best first, from a position in the
-- pick order.
-- Nothing is claimed from a paused queue, nor unless the worker's own lease is live; the key share lock on it makes a
-- reaper wait for us.
-- `me` is compared with something of the row, so that it is evaluated with the first row that qualifies: a claim that
-- finds nothing locks nothing, writes nothing, and has no transaction id.
-- A lost claim costs nothing (worker, token and version fence what follows), so its commit does not wait for the disk.
-- Params: worker bigint, queue text, from_priority int, from_time timestamptz, to_priority int, unknown text[]
--         ("name:version" of machines this worker does not know), limit bigint.
-- Rows:   instance.Claimed. Locks: workers row FOR KEY SHARE; instances FOR NO KEY UPDATE SKIP LOCKED.
WITH me AS MATERIALIZED (
    SELECT w.id, set_config('synchronous_commit', 'off', true) FROM {schema}.workers AS w
    WHERE w.id = %(worker)s AND w.dead_at IS NULL AND w.expires_at > clock_timestamp()
      AND NOT EXISTS (SELECT FROM {schema}.queues AS q WHERE q.name = %(queue)s AND q.paused_at IS NOT NULL)
    FOR KEY SHARE
), picked AS MATERIALIZED (
    SELECT i.ctid AS row FROM {schema}.instances AS i
    WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes = 0
      AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
      AND (i.priority, i.eligible_at) >= (%(from_priority)s::smallint, %(from_time)s::timestamptz)
      AND i.priority <= %(to_priority)s::smallint
      AND (cardinality(%(unknown)s::text[]) = 0
           OR i.machine || ':' || i.machine_version <> ALL (%(unknown)s::text[]))
      AND (SELECT true FROM me) = (i.crashes = i.crashes)  -- needs the row: see above
    ORDER BY i.priority, i.eligible_at, i.id
    LIMIT %(limit)s
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.instances AS i
SET status = 'executing', worker_id = %(worker)s, token = i.token + 1, reason = NULL
FROM picked WHERE i.ctid = picked.row
RETURNING i.id, i.token, i.version, i.priority, i.eligible_at, i.machine, i.machine_version, i.step, i.attempt,
          i.crashes, i.state_type, i.state, i.max_attempts, i.correlation_key, i.correlation_scope IS NOT NULL,
          CASE WHEN i.version = 0 THEN i.expires_at <= clock_timestamp() END, i.queue, i.parent_id, i.children_round,
          i.inbox, i.awaits, i.parent_round, i.trace;

-- name: claim_suspect
-- Claim one unlimited row that has a crash behind it, for a worker process that holds nothing else.
-- Params: worker bigint, queue text, unknown text[]. Rows: instance.Claimed. Locks: as claim.
WITH me AS MATERIALIZED (
    SELECT w.id, set_config('synchronous_commit', 'off', true) FROM {schema}.workers AS w
    WHERE w.id = %(worker)s AND w.dead_at IS NULL AND w.expires_at > clock_timestamp()
      AND NOT EXISTS (SELECT FROM {schema}.queues AS q WHERE q.name = %(queue)s AND q.paused_at IS NOT NULL)
    FOR KEY SHARE
), picked AS MATERIALIZED (
    SELECT i.ctid AS row FROM {schema}.instances AS i
    WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes > 0
      AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
      AND (cardinality(%(unknown)s::text[]) = 0
           OR i.machine || ':' || i.machine_version <> ALL (%(unknown)s::text[]))
      AND (SELECT true FROM me) = (i.crashes = i.crashes)  -- needs the row: see above
    ORDER BY i.priority, i.eligible_at, i.id
    LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.instances AS i
SET status = 'executing', worker_id = %(worker)s, token = i.token + 1, reason = NULL
FROM picked WHERE i.ctid = picked.row
RETURNING i.id, i.token, i.version, i.priority, i.eligible_at, i.machine, i.machine_version, i.step, i.attempt,
          i.crashes, i.state_type, i.state, i.max_attempts, i.correlation_key, i.correlation_scope IS NOT NULL,
          CASE WHEN i.version = 0 THEN i.expires_at <= clock_timestamp() END, i.queue, i.parent_id, i.children_round,
          i.inbox, i.awaits, i.parent_round, i.trace;

-- name: held
-- What a worker id holds. Params: worker bigint. Rows: id, token.
SELECT id, token FROM {schema}.instances WHERE worker_id = %(worker)s AND status = 'executing';

-- name: release
-- Give claimed rows back unchanged (their place in the order included), or as cancelled if that was asked meanwhile.
-- Params: worker bigint, ids bigint[] in order, tokens int[], reason text|null.
-- Rows: id, queue, status, concurrency_key, gate_shard.
UPDATE {schema}.instances AS i
SET status = CASE WHEN i.cancel_requested THEN 'cancelled' ELSE 'runnable' END::{schema}.status,
    finished_at = CASE WHEN i.cancel_requested THEN clock_timestamp() END,
    worker_id = NULL, reason = %(reason)s
FROM unnest(%(ids)s::bigint[], %(tokens)s::int[]) AS r (id, token)
WHERE i.id = ANY (ARRAY[r.id])
  AND (i.worker_id, i.token, i.status) IS NOT DISTINCT FROM (%(worker)s::bigint, r.token, 'executing'::{schema}.status)
RETURNING i.id, i.queue, i.status::text, i.concurrency_key, i.gate_shard;

-- name: expire
-- End claimed rows whose `expires` passed before they started.
-- Params: worker bigint, ids bigint[] in order, tokens int[], error jsonb. Rows: id, concurrency_key, gate_shard.
UPDATE {schema}.instances AS i
SET status = 'cancelled', finished_at = clock_timestamp(), worker_id = NULL, error = %(error)s
FROM unnest(%(ids)s::bigint[], %(tokens)s::int[]) AS r (id, token)
WHERE i.id = ANY (ARRAY[r.id])
  AND (i.worker_id, i.token, i.status) IS NOT DISTINCT FROM (%(worker)s::bigint, r.token, 'executing'::{schema}.status)
RETURNING i.id, i.concurrency_key, i.gate_shard;

-- name: finish
-- Commit terminal outcomes: each owned row moves to history; a requested cancel makes any of them `cancelled`.
-- An outcome commits only where worker, token and version are those of the claim and the row is executing.
-- A failed row takes its inbox and its wait along, for a retry. Others lose the signals that a step was shown; newer
-- ones stay as unread. A delivery that commits meanwhile has written its id into the row, which this statement then
-- sees under the row's lock.
-- Params: worker bigint, and per outcome, in id order: ids, tokens, versions, statuses, result_types, results, errors,
--         seen (id of the newest signal that the step was shown; an empty array when no row of the batch has signals).
-- Rows:   id, unread of the committed ones; the others are stale.
WITH gone AS (
    DELETE FROM {schema}.instances AS i
    USING unnest(
        %(ids)s::bigint[], %(tokens)s::int[], %(versions)s::int[], %(statuses)s::text[],
        %(result_types)s::text[], %(results)s::bytea[], %(errors)s::text[], %(seen)s::bigint[]
    ) AS o (id, token, version, status, result_type, result, error, seen)
    WHERE i.id = ANY (ARRAY[o.id])
      AND (i.worker_id, i.token, i.version, i.status)
          IS NOT DISTINCT FROM (%(worker)s::bigint, o.token, o.version, 'executing'::{schema}.status)
    RETURNING i.*, CASE WHEN i.cancel_requested THEN 'cancelled' ELSE o.status END AS o_status,
              o.result_type AS o_type, o.result AS o_result, o.error AS o_error,
              greatest(i.signals_seen, o.seen) AS o_seen
), cleared AS (
    DELETE FROM {schema}.signals AS s USING gone
    WHERE gone.inbox IS NOT NULL AND gone.o_status <> 'failed'
      AND s.target_id = ANY (ARRAY[gone.id]) AND (s.consumed OR s.id <= gone.o_seen)
)
INSERT INTO {schema}.history
    (id, eligible_at, created_at, finished_at, expires_at, worker_id, status, token, version, attempt,
     machine_version, priority, crashes, cancel_requested, max_attempts, queue, machine, step, state_type, state,
     result_type, result, error, correlation_key, correlation_scope, reason, parent_id, parent_round, children_round,
     trace, concurrency_key, rate_limit, weight, gate_shard, inbox, awaits, shown, signals_seen)
SELECT id, eligible_at, created_at, clock_timestamp(), expires_at, worker_id, o_status::{schema}.status, token,
       version + 1, attempt,
       machine_version, priority, crashes, cancel_requested, max_attempts, queue, machine, step, state_type, state,
       CASE WHEN NOT cancel_requested THEN o_type END, CASE WHEN NOT cancel_requested THEN o_result END,
       CASE WHEN cancel_requested THEN error ELSE o_error::jsonb END, correlation_key, correlation_scope, NULL,
       parent_id, parent_round, children_round, trace, concurrency_key, rate_limit, weight, gate_shard, inbox,
       CASE WHEN o_status = 'failed' THEN awaits END, CASE WHEN o_status = 'failed' THEN shown END, o_seen
FROM gone
RETURNING id, inbox > coalesce(signals_seen, 0);

-- name: advance
-- Commit outcomes that keep their row: every outcome but the end, and the ends of rows that keep a correlation key.
-- Fenced as finish. A requested cancel makes any of them `cancelled`; the ends are archived afterwards.
-- A retry and a failure keep what was awaited, a park replaces it, progress clears it. An inline hop stays claimed. An
-- end keeps attempt and crashes, as finish does.
-- Params: worker bigint, and per outcome, in id order: ids, tokens, versions, kinds (retry next await children end),
--         statuses (the new ones), steps, state_types, states (null: kept), attempts, delays and timeouts in seconds,
--         awaits (JSON arrays), shown (JSON: [ids to add, ids to remove], or []), result_types, results, errors, seen
--         (as for finish).
-- Rows:   id, status, queue, children_round, inbox, unread of the committed ones; the others are stale.
UPDATE {schema}.instances AS i
SET status = CASE WHEN i.cancel_requested THEN 'cancelled' ELSE o.status END::{schema}.status,
    worker_id = CASE WHEN o.status = 'executing' AND NOT i.cancel_requested THEN i.worker_id END,
    version = i.version + 1, attempt = CASE WHEN i.cancel_requested OR o.kind = 'end' THEN i.attempt ELSE o.attempt END,
    crashes = CASE WHEN i.cancel_requested OR o.kind = 'end' THEN i.crashes ELSE 0 END,
    step = coalesce(o.step, i.step),
    state_type = coalesce(o.state_type, i.state_type), state = coalesce(o.state, i.state),
    eligible_at = CASE WHEN o.delay IS NULL THEN i.eligible_at
                       ELSE clock_timestamp() + make_interval(secs => o.delay) END,
    awaits = CASE o.kind WHEN 'retry' THEN i.awaits
                         WHEN 'end' THEN CASE WHEN o.status = 'failed' THEN i.awaits END
                         WHEN 'await' THEN ARRAY(SELECT jsonb_array_elements_text(o.awaits::jsonb)) END,
    shown = CASE o.kind WHEN 'retry' THEN i.shown
                        WHEN 'end' THEN CASE WHEN o.status = 'failed' THEN i.shown END
                        WHEN 'await' THEN ARRAY(SELECT unnest(i.shown)
                                                UNION SELECT jsonb_array_elements_text(o.shown::jsonb -> 0)::bigint
                                                EXCEPT SELECT jsonb_array_elements_text(o.shown::jsonb -> 1)::bigint)
            END,
    signals_seen = greatest(i.signals_seen, o.seen),
    deadline = CASE WHEN o.kind = 'await' AND NOT i.cancel_requested
                    THEN clock_timestamp() + make_interval(secs => o.timeout) END,
    children_round = i.children_round + (o.kind = 'children')::int,
    finished_at = CASE WHEN i.cancel_requested OR o.kind = 'end' THEN clock_timestamp() END,
    result_type = CASE WHEN NOT i.cancel_requested THEN o.result_type END,
    result = CASE WHEN NOT i.cancel_requested THEN o.result END,
    error = CASE WHEN i.cancel_requested THEN i.error ELSE o.error::jsonb END
FROM unnest(
    %(ids)s::bigint[], %(tokens)s::int[], %(versions)s::int[], %(kinds)s::text[], %(statuses)s::text[],
    %(steps)s::text[], %(state_types)s::text[], %(states)s::bytea[], %(attempts)s::int[], %(delays)s::float8[],
    %(timeouts)s::float8[], %(awaits)s::text[], %(shown)s::text[],
    %(result_types)s::text[], %(results)s::bytea[], %(errors)s::text[], %(seen)s::bigint[]
) AS o (id, token, version, kind, status, step, state_type, state, attempt, delay, timeout, awaits, shown,
        result_type, result, error, seen)
WHERE i.id = ANY (ARRAY[o.id])
  AND (i.worker_id, i.token, i.version, i.status)
      IS NOT DISTINCT FROM (%(worker)s::bigint, o.token, o.version, 'executing'::{schema}.status)
RETURNING i.id, i.status::text, i.queue, i.children_round, i.inbox, i.inbox > coalesce(i.signals_seen, 0);

-- name: hold
-- Lock a claimed row and the parent it reports to, and say whether the claim stands.
-- Params: ids bigint[] (both), worker bigint, token int, version int. Rows: id, owned, cancel_requested, inbox.
-- Locks: instances FOR NO KEY UPDATE, in id order.
SELECT id, (worker_id, token, version, status)
           IS NOT DISTINCT FROM (%(worker)s::bigint, %(token)s::int, %(version)s::int, 'executing'::{schema}.status),
       cancel_requested, inbox
FROM {schema}.instances WHERE id = ANY (%(ids)s::bigint[]) ORDER BY id FOR NO KEY UPDATE;

-- name: sent_meanwhile
-- Which of these locked rows were sent signals that their step was not shown, and how many.
-- Params: ids, seen bigint[]. Rows: id, count.
SELECT i.id, (SELECT count(*) FROM {schema}.signals AS s
              WHERE s.target_id = ANY (ARRAY[o.id]) AND s.id > o.seen AND NOT s.consumed)
FROM unnest(%(ids)s::bigint[], %(seen)s::bigint[]) AS o (id, seen)
JOIN {schema}.instances AS i ON i.id = ANY (ARRAY[o.id])
WHERE i.inbox > o.seen;

-- name: committed
-- After a lost COMMIT answer: where these instances stand now. Params: ids bigint[].
-- Rows: id, token, version, status, inbox.
SELECT id, token, version, status::text, inbox FROM {schema}.instances WHERE id = ANY (%(ids)s::bigint[])
UNION ALL
SELECT id, token, version, status::text, NULL FROM {schema}.history WHERE id = ANY (%(ids)s::bigint[]);
