-- What `durable doctor` asks. Looks only: takes no lock beyond that of reading. Not for hot paths: some read every
-- runnable row. What a role may not see of others' sessions comes back as null, and counts.

-- name: horizon_holders
-- What keeps vacuum from removing dead rows of this database, the oldest first. Seconds are null where Postgres keeps no
-- time; xids is how many transactions began since. Our own session is left out.
-- Rows: doctor.Holder.
SELECT 'session', a.pid::text, a.application_name, a.usename::text, a.state, a.client_addr::text,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8,
       greatest(age(a.backend_xmin), age(a.backend_xid))
FROM pg_catalog.pg_stat_activity AS a
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_type = 'client backend'
  AND (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL)
UNION ALL
SELECT 'standby', r.pid::text, r.application_name, r.usename::text, r.state, r.client_addr::text, NULL,
       age(r.backend_xmin)
FROM pg_catalog.pg_stat_replication AS r WHERE r.backend_xmin IS NOT NULL
UNION ALL
SELECT 'slot', s.slot_name::text, s.plugin::text, NULL, CASE WHEN s.active THEN 'active' ELSE 'inactive' END, NULL, NULL,
       age(s.xmin)
FROM pg_catalog.pg_replication_slots AS s WHERE s.xmin IS NOT NULL
UNION ALL
SELECT 'prepared', p.gid, NULL, p.owner::text, 'prepared', NULL,
       extract(epoch FROM clock_timestamp() - p.prepared)::float8, age(p.transaction)
FROM pg_catalog.pg_prepared_xacts AS p WHERE p.database = current_database()
ORDER BY 8 DESC;

-- name: dead_rows
-- Dead rows of our tables, as Postgres has counted them. Params: schema text. Rows: table, live, dead, seconds since a vacuum (null: never).
SELECT relname::text, n_live_tup, n_dead_tup,
       extract(epoch FROM clock_timestamp() - greatest(last_vacuum, last_autovacuum))::float8
FROM pg_catalog.pg_stat_user_tables WHERE schemaname = %(schema)s ORDER BY n_dead_tup DESC;

-- name: stuck_leases
-- Executing rows whose worker process is gone for so long that a reaper should have taken them back.
-- Params: slack float8 (seconds). Rows: worker_id, its name, host, pid, seconds since its lease ended (all null: no such
--         lease), rows, the lowest id.
SELECT i.worker_id, w.name, w.host, w.pid,
       extract(epoch FROM clock_timestamp() - least(w.dead_at, w.expires_at))::float8, count(*), min(i.id)
FROM {schema}.instances AS i LEFT JOIN {schema}.workers AS w ON w.id = i.worker_id
WHERE i.status = 'executing'
  AND (w.id IS NULL OR least(w.dead_at, w.expires_at) < clock_timestamp() - make_interval(secs => %(slack)s))
GROUP BY i.worker_id, w.id
ORDER BY i.worker_id;

-- name: unknown_waiting
-- Runnable instances that no live worker of their queue can run. Rows: queue, name, version, rows, the lowest id.
SELECT g.queue, g.machine, g.machine_version, g.count, g.id
FROM (SELECT queue, machine, machine_version, count(*), min(id) AS id FROM {schema}.instances
      WHERE status = 'runnable' GROUP BY queue, machine, machine_version) AS g
WHERE EXISTS (SELECT FROM {schema}.workers AS w
              WHERE w.kind = 'worker' AND w.queue = g.queue AND w.dead_at IS NULL AND w.expires_at > clock_timestamp())
  AND NOT EXISTS (SELECT FROM {schema}.workers AS w
                  WHERE w.kind = 'worker' AND w.queue = g.queue AND w.dead_at IS NULL
                    AND w.expires_at > clock_timestamp()
                    AND (w.tasks IS NULL OR g.machine || ':' || g.machine_version = ANY (w.tasks)))
ORDER BY g.count DESC, g.queue, g.machine, g.machine_version;

-- name: limits_missing
-- Rate limits that parked rows wait for and that nobody has defined. Rows: name, rows, the lowest id.
SELECT split_part(i.rate_limit, ':', 1), count(*), min(i.id)
FROM {schema}.instances AS i
WHERE i.status = 'runnable' AND i.rate_limit IS NOT NULL
  AND NOT EXISTS (SELECT FROM {schema}.limits AS l WHERE l.kind = 'rate' AND l.name = split_part(i.rate_limit, ':', 1))
GROUP BY 1 ORDER BY 1;

-- name: beat_wanted
-- What a beat would see to: enabled schedules; rows and deadlines that wait for their time, counted up to a hundred.
-- Rows: schedules, rows.
SELECT (SELECT count(*) FROM {schema}.schedules WHERE enabled AND next_at IS NOT NULL),
       (SELECT count(*) FROM (SELECT FROM {schema}.instances WHERE status = 'scheduled' LIMIT 100) AS s)
       + (SELECT count(*) FROM (SELECT FROM {schema}.instances
                                WHERE status = 'awaiting_signal' AND deadline IS NOT NULL LIMIT 100) AS d);

-- name: connections_used
-- Client sessions of the whole server by application, and how many there may be for ordinary roles.
-- Rows: application, sessions, room.
SELECT coalesce(nullif(application_name, ''), 'without a name'), count(*),
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
       - coalesce(current_setting('reserved_connections', true), '0')::int
FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend' OR backend_type IS NULL
GROUP BY 1 ORDER BY 2 DESC, 1;

-- name: notification_queue
-- How full the server's notification queue is, from 0 to 1: when it is full, commits that notify fail. Rows: float8.
SELECT pg_notification_queue_usage();

-- name: sees_others
-- Whether this role may see the sessions of others. Rows: bool.
SELECT pg_has_role('pg_read_all_stats', 'USAGE');

-- name: backend_pid
-- The server process behind this transaction; not the one that was connected to, when there is a pooler. Rows: int.
SELECT pg_backend_pid();

-- name: settings_for_us
-- What the server and our role are set to, as far as it matters to us; times are in milliseconds. Rows: name, setting.
-- reset_val: a session of ours sets some of these for itself.
SELECT name, reset_val FROM pg_catalog.pg_settings
WHERE name IN ('server_version', 'server_version_num', 'server_encoding', 'standard_conforming_strings',
               'default_transaction_read_only', 'synchronous_commit', 'statement_timeout', 'lock_timeout',
               'idle_in_transaction_session_timeout', 'transaction_timeout');

-- name: live_page
-- A page of live instances by id, with what their step begins from. Each page is a statement of its own: no snapshot is
-- held while payloads are decoded. Params: queue text|null (any), after bigint, limit bigint. Rows: doctor.LiveRow.
SELECT id, queue, machine, machine_version, step, state_type, state FROM {schema}.instances
WHERE id > %(after)s AND finished_at IS NULL AND (%(queue)s::text IS NULL OR queue = %(queue)s)
ORDER BY id LIMIT %(limit)s;

-- name: inbox_page
-- A page of the unconsumed signals of live instances by id. Params: after bigint, limit bigint.
-- Rows: id, target_id, name, payload_type, payload.
SELECT s.id, s.target_id, s.name, s.payload_type, s.payload FROM {schema}.signals AS s
WHERE s.id > %(after)s AND NOT s.consumed
  AND EXISTS (SELECT FROM {schema}.instances AS i WHERE i.id = s.target_id AND i.finished_at IS NULL)
ORDER BY s.id LIMIT %(limit)s;

-- name: table_holders
-- The other sessions whose transactions use our tables, the oldest first, three at most. Params: schema text.
-- Rows: pid, application_name, seconds.
SELECT a.pid, a.application_name, extract(epoch FROM clock_timestamp() - a.xact_start)::float8
FROM pg_catalog.pg_stat_activity AS a
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.xact_start IS NOT NULL
  AND EXISTS (SELECT FROM pg_catalog.pg_locks AS l
              JOIN pg_catalog.pg_class AS c ON c.oid = l.relation
              JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
              WHERE l.pid = a.pid AND l.granted AND n.nspname = %(schema)s)
ORDER BY a.xact_start LIMIT 3;

-- name: row_holders
-- Which other sessions hold rows of live instances locked. A row's xmax is the transaction that has changed or locked it,
-- and each running transaction holds a lock on its own id. Rows that several sessions share are not found.
-- Params: ids bigint[]|null (every live row). Rows: maintenance.RowHolder, the oldest transaction first.
SELECT i.id, a.pid, a.application_name, a.usename::text, a.state,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8
FROM {schema}.instances AS i
JOIN pg_catalog.pg_locks AS l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = i.xmax
JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
WHERE (%(ids)s::bigint[] IS NULL OR i.id = ANY (%(ids)s::bigint[])) AND a.pid <> pg_backend_pid()
ORDER BY a.xact_start, a.pid, i.id;

-- name: lock_holders
-- The other sessions whose transactions hold row or table locks in our tables, the oldest first. A role that may not see
-- others' sessions gets null for state and seconds. Params: schema text. Rows: doctor.LockHolder.
SELECT a.pid, a.application_name, a.usename::text, a.state,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8, array_agg(DISTINCT c.relname::text ORDER BY c.relname::text)
FROM pg_catalog.pg_locks AS l
JOIN pg_catalog.pg_class AS c ON c.oid = l.relation
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
WHERE l.granted AND l.locktype = 'relation' AND n.nspname = %(schema)s AND c.relkind IN ('r', 'p')
  AND l.mode NOT IN ('AccessShareLock', 'ShareUpdateExclusiveLock')
  AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND a.pid <> pg_backend_pid() AND coalesce(a.backend_type, 'client backend') = 'client backend'
GROUP BY a.pid, a.application_name, a.usename, a.state, a.xact_start
ORDER BY a.xact_start, a.pid;
