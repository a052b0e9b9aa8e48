-- Periodic work. A schedule's row is locked while it is fired: its instances, and the move of next_at, are one transaction.

-- name: put_schedule
-- Declare a schedule. One that is there keeps next_at unless its timing changed, and is enabled or not as it was; one of
-- another app is left alone. Params: name, app, schedule, tz, misfire, overlap text; next_at timestamptz|null;
--         template jsonb; state_type text; state bytea. Rows: name, none when the name is another app's.
INSERT INTO {schema}.schedules AS s (name, app, schedule, tz, misfire, overlap, next_at, template, state_type, state)
VALUES (%(name)s, %(app)s, %(schedule)s, %(tz)s, %(misfire)s, %(overlap)s, %(next_at)s, %(template)s, %(state_type)s,
        %(state)s)
ON CONFLICT (name) DO UPDATE
SET next_at = CASE WHEN (s.schedule, s.tz) IS DISTINCT FROM (excluded.schedule, excluded.tz) THEN excluded.next_at
                   ELSE s.next_at END,
    schedule = excluded.schedule, tz = excluded.tz, misfire = excluded.misfire, overlap = excluded.overlap,
    template = excluded.template, state_type = excluded.state_type, state = excluded.state,
    updated_at = clock_timestamp()
WHERE s.app = excluded.app
RETURNING name;

-- name: drop_schedules
-- Forget an app's schedules that it declares no longer. Params: app text, names text[] (those it does). Rows: name.
DELETE FROM {schema}.schedules WHERE app = %(app)s AND name <> ALL (%(names)s::text[]) RETURNING name;

-- name: due_schedules
-- Lock due schedules, the longest due first. The transaction of a process that freezes with them is ended by the server,
-- so that others get them. Params: unreadable text[] (names this process can't read), limit bigint.
-- Rows:   name, schedule, tz, misfire, overlap, next_at, template, state_type, state, the database's now, and whether
--         the instance of the last occurrence is not finished. Locks: schedules FOR NO KEY UPDATE SKIP LOCKED.
SELECT s.name, s.schedule, s.tz, s.misfire, s.overlap, s.next_at, s.template, s.state_type, s.state, clock_timestamp(),
       EXISTS (SELECT FROM {schema}.instances AS i WHERE i.id = s.last_id AND i.finished_at IS NULL),
       set_config('idle_in_transaction_session_timeout', '10s', true)
FROM {schema}.schedules AS s
WHERE s.enabled AND s.next_at <= (SELECT clock_timestamp()) AND s.name <> ALL (%(unreadable)s::text[])
ORDER BY s.next_at
LIMIT %(limit)s
FOR NO KEY UPDATE SKIP LOCKED;

-- name: move_schedule
-- After its occurrences were inserted, in the same transaction. Params: name text; next_at, last_at timestamptz|null;
--         last_id bigint|null; fired, skipped bigint.
UPDATE {schema}.schedules
SET next_at = %(next_at)s, last_at = coalesce(%(last_at)s, last_at), last_id = coalesce(%(last_id)s, last_id),
    fired = fired + %(fired)s, skipped = skipped + %(skipped)s
WHERE name = %(name)s;

-- name: lock_schedule
-- One schedule, to be run by hand. Params: name text. Rows: template, state_type, state.
SELECT template, state_type, state FROM {schema}.schedules WHERE name = %(name)s FOR NO KEY UPDATE;

-- name: ran_schedule
-- Note the instance that was inserted by hand. Params: name text, id bigint.
UPDATE {schema}.schedules SET last_id = %(id)s, fired = fired + 1 WHERE name = %(name)s;

-- name: enable_schedule
-- Switch a schedule on or off; one that is switched on begins with the next occurrence.
-- Params: name text, enabled bool, next_at timestamptz|null. Rows: whether that changed anything.
UPDATE {schema}.schedules AS s
SET enabled = %(enabled)s,
    next_at = CASE WHEN %(enabled)s AND NOT s.enabled THEN %(next_at)s ELSE s.next_at END, updated_at = clock_timestamp()
FROM (SELECT name, enabled FROM {schema}.schedules WHERE name = %(name)s FOR NO KEY UPDATE) AS before
WHERE s.name = before.name
RETURNING before.enabled <> s.enabled;

-- name: schedules
-- Every schedule. Rows: storage.schedules.Listed.
SELECT name, app, schedule, tz, misfire, overlap, enabled, next_at, last_at, last_id, fired, skipped,
       template ->> 'machine', template ->> 'queue'
FROM {schema}.schedules ORDER BY name;

-- name: beat_lives
-- Whether a beat's lease has not run out. Rows: bool.
SELECT EXISTS (SELECT FROM {schema}.workers
               WHERE kind = 'beat' AND dead_at IS NULL AND expires_at >= clock_timestamp());

-- name: overdue_schedules
-- Whether a schedule is due for so long that no beat can be there. Params: seconds float8. Rows: bool.
SELECT EXISTS (SELECT FROM {schema}.schedules
               WHERE enabled AND next_at < clock_timestamp() - make_interval(secs => %(seconds)s));
