-- Priority ageing: a row that has waited too long joins the best priority that waits beside it, where it is the oldest
-- and so goes first. Agents and beats do it now and then; claims and their indexes know nothing of it.

-- name: set_ageing
-- After how many seconds rows of a queue age. Params: name text, ageing float8|null (never).
-- Rows: name, unless it was so already.
INSERT INTO {schema}.queues AS q (name, ageing) VALUES (%(name)s, %(ageing)s)
ON CONFLICT (name) DO UPDATE SET ageing = excluded.ageing, updated_at = clock_timestamp()
WHERE q.ageing IS DISTINCT FROM excluded.ageing
RETURNING q.name;

-- name: ageing_queues
-- Queues in which rows age. Rows: name, ageing.
SELECT name, ageing FROM {schema}.queues WHERE ageing IS NOT NULL ORDER BY name;

-- name: age_queue
-- Give rows of a queue that pickers see, and that have waited that long, the best priority that waits in it. From one
-- priority to the next by index, the oldest of each first.
-- Params: queue text, ageing float8, limit bigint (of each priority and kind). Rows: id.
-- Locks: instances FOR NO KEY UPDATE SKIP LOCKED.
WITH RECURSIVE unlimited (priority) AS (
    (SELECT i.priority FROM {schema}.instances AS i
     WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes = 0
       AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
     ORDER BY i.priority, i.eligible_at, i.id LIMIT 1)
    UNION ALL
    SELECT n.priority FROM unlimited AS p CROSS JOIN LATERAL (
        SELECT i.priority FROM {schema}.instances AS i
        WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes = 0
          AND i.concurrency_key IS NULL AND i.rate_limit IS NULL AND i.priority > p.priority
        ORDER BY i.priority, i.eligible_at, i.id LIMIT 1) AS n
), limited (priority) AS (
    (SELECT i.priority FROM {schema}.instances AS i
     WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.lane IS NULL
       AND (i.concurrency_key IS NOT NULL OR i.rate_limit IS NOT NULL)
     ORDER BY i.priority, i.eligible_at, i.id LIMIT 1)
    UNION ALL
    SELECT n.priority FROM limited AS p CROSS JOIN LATERAL (
        SELECT i.priority FROM {schema}.instances AS i
        WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.lane IS NULL
          AND (i.concurrency_key IS NOT NULL OR i.rate_limit IS NOT NULL) AND i.priority > p.priority
        ORDER BY i.priority, i.eligible_at, i.id LIMIT 1) AS n
), best AS MATERIALIZED (
    SELECT least((SELECT min(priority) FROM unlimited), (SELECT min(priority) FROM limited)) AS priority,
           clock_timestamp() - make_interval(secs => %(ageing)s) AS before
), late AS MATERIALIZED (
    SELECT l.row FROM unlimited AS p CROSS JOIN LATERAL (
        SELECT i.ctid AS row FROM {schema}.instances AS i
        WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes = 0
          AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
          AND i.priority = p.priority AND i.eligible_at < (SELECT before FROM best)
        ORDER BY i.priority, i.eligible_at, i.id LIMIT %(limit)s FOR NO KEY UPDATE SKIP LOCKED) AS l
    WHERE p.priority > (SELECT priority FROM best)
    UNION ALL
    SELECT l.row FROM limited AS p CROSS JOIN LATERAL (
        SELECT i.ctid AS row FROM {schema}.instances AS i
        WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.lane IS NULL
          AND (i.concurrency_key IS NOT NULL OR i.rate_limit IS NOT NULL)
          AND i.priority = p.priority AND i.eligible_at < (SELECT before FROM best)
        ORDER BY i.priority, i.eligible_at, i.id LIMIT %(limit)s FOR NO KEY UPDATE SKIP LOCKED) AS l
    WHERE p.priority > (SELECT priority FROM best)
)
UPDATE {schema}.instances AS i SET priority = (SELECT priority FROM best) FROM late WHERE i.ctid = late.row
RETURNING i.id;

-- name: age_lanes
-- Give rows parked in lanes, of queues in which they age, the best priority that waits in their lane. Of each lane and
-- priority the first rows are looked at: what is behind them in one lane has its turn after them anyhow.
-- Params: lanes text[], limit bigint (of each lane and priority). Rows: id. Locks: as age_queue.
WITH RECURSIVE heads (lane, best, priority) AS (
    SELECT l.lane, h.priority, h.priority FROM unnest(%(lanes)s::text[]) AS l (lane) CROSS JOIN LATERAL (
        SELECT i.priority FROM {schema}.instances AS i
        WHERE i.status = 'runnable' AND i.lane = l.lane COLLATE "C"
        ORDER BY i.priority, i.eligible_at, i.id LIMIT 1) AS h
    UNION ALL
    SELECT p.lane, p.best, n.priority FROM heads AS p CROSS JOIN LATERAL (
        SELECT i.priority FROM {schema}.instances AS i
        WHERE i.status = 'runnable' AND i.lane = p.lane COLLATE "C" AND i.priority > p.priority
        ORDER BY i.priority, i.eligible_at, i.id LIMIT 1) AS n
), late AS MATERIALIZED (
    SELECT l.row, p.best FROM heads AS p CROSS JOIN LATERAL (
        SELECT i.ctid AS row, i.queue, i.eligible_at FROM {schema}.instances AS i
        WHERE i.status = 'runnable' AND i.lane = p.lane COLLATE "C" AND i.priority = p.priority
        ORDER BY i.priority, i.eligible_at, i.id LIMIT %(limit)s FOR NO KEY UPDATE SKIP LOCKED) AS l
    WHERE p.priority > p.best
      AND l.eligible_at < (SELECT clock_timestamp() - make_interval(secs => q.ageing)
                           FROM {schema}.queues AS q WHERE q.name = l.queue)
)
UPDATE {schema}.instances AS i SET priority = late.best FROM late WHERE i.ctid = late.row
RETURNING i.id;
