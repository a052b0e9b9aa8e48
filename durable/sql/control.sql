-- What the cluster is asked to do: queues paused or given another number of processes, commands asked to end.

-- name: pause_queue
-- Have nothing claimed from a queue any more. Params: name text, reason text|null. Rows: name, unless it was paused.
INSERT INTO {schema}.queues AS q (name, paused_at, reason) VALUES (%(name)s, clock_timestamp(), %(reason)s)
ON CONFLICT (name) DO UPDATE SET paused_at = clock_timestamp(), reason = excluded.reason, updated_at = clock_timestamp()
WHERE q.paused_at IS NULL
RETURNING q.name;

-- name: resume_queue
-- Have a queue claimed from again. Params: name text. Rows: name, if it was paused.
UPDATE {schema}.queues SET paused_at = NULL, reason = NULL, updated_at = clock_timestamp()
WHERE name = %(name)s AND paused_at IS NOT NULL
RETURNING name;

-- name: set_concurrency
-- How many worker processes a queue gets from each command. Params: name text, concurrency int|null (as started).
-- Rows: name, unless it was so already.
INSERT INTO {schema}.queues AS q (name, concurrency) VALUES (%(name)s, %(concurrency)s)
ON CONFLICT (name) DO UPDATE SET concurrency = excluded.concurrency, updated_at = clock_timestamp()
WHERE q.concurrency IS DISTINCT FROM excluded.concurrency
RETURNING q.name;

-- name: concurrencies
-- Queues with a number of processes of their own. Rows: name, concurrency.
SELECT name, concurrency FROM {schema}.queues WHERE concurrency IS NOT NULL;

-- name: oldest_waiting
-- How long the oldest unlimited runnable row of a queue has waited: from one priority's first to the next's, by index.
-- Params: queue text. Rows: seconds, null when none waits.
WITH RECURSIVE heads (priority, eligible_at) AS (
    (SELECT i.priority, i.eligible_at FROM {schema}.instances AS i
     WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes = 0
       AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
     ORDER BY i.priority, i.eligible_at, i.id LIMIT 1)
    UNION ALL
    SELECT n.priority, n.eligible_at FROM heads AS h CROSS JOIN LATERAL (
        SELECT i.priority, i.eligible_at FROM {schema}.instances AS i
        WHERE i.queue = %(queue)s AND i.status = 'runnable' AND i.crashes = 0 AND i.priority > h.priority
          AND i.concurrency_key IS NULL AND i.rate_limit IS NULL
        ORDER BY i.priority, i.eligible_at, i.id LIMIT 1) AS n
)
SELECT extract(epoch FROM clock_timestamp() - min(eligible_at))::float8 FROM heads;

-- name: queue_orders
-- What is ordered for the queues of a command, and what it is itself asked to do.
-- Params: queues text[]; host, boot_id, command_start text; command_pid int. Rows: name, paused, concurrency, asked.
SELECT n.name, q.paused_at IS NOT NULL, q.concurrency,
       (SELECT max(w.asked) FROM {schema}.workers AS w
        WHERE w.asked IS NOT NULL
          AND (w.host, w.boot_id, w.command_pid, w.command_start)
              = (%(host)s, %(boot_id)s, %(command_pid)s::int, %(command_start)s))
FROM unnest(%(queues)s::text[]) AS n (name) LEFT JOIN {schema}.queues AS q ON q.name = n.name;

-- name: ask_command
-- Ask the live worker commands of a name for something. Params: name, asked text. Rows: host, command_pid of each process.
UPDATE {schema}.workers SET asked = %(asked)s
WHERE name = %(name)s AND kind = 'worker' AND dead_at IS NULL AND expires_at > clock_timestamp()
RETURNING host, command_pid;

-- name: forget_asked
-- A command has heard what it was asked: the same program may go on under the same pid.
-- Params: host, boot_id, command_start text; command_pid int.
UPDATE {schema}.workers SET asked = NULL
WHERE asked IS NOT NULL
  AND (host, boot_id, command_pid, command_start)
      = (%(host)s, %(boot_id)s, %(command_pid)s::int, %(command_start)s);
