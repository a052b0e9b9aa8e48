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

-- name: queue_orders
-- What is ordered for the queues of a command. Params: queues text[]. Rows: name, paused, concurrency.
SELECT q.name, q.paused_at IS NOT NULL, q.concurrency FROM {schema}.queues AS q WHERE q.name = ANY (%(queues)s::text[]);
