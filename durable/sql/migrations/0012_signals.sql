-- breaking: yes
--
-- Signals are kept with a failed instance, and those that arrive while the last step runs beside any finished one.
--
-- inbox         was whether there may be signals; now the id of the newest one delivered, null when there was none. A
--               delivery locks its target's row before it draws the id, so ids of one target rise in order of commit.
-- signals_seen  id of the newest signal that a step whose outcome committed was shown. Signals of a finished instance
--               with higher ids are unread.

DROP VIEW {schema}.instance_view;

ALTER TABLE {schema}.instances ALTER COLUMN inbox DROP DEFAULT, ALTER COLUMN inbox DROP NOT NULL;
ALTER TABLE {schema}.instances ALTER COLUMN inbox TYPE bigint USING CASE WHEN inbox THEN 0 END,
    ADD COLUMN signals_seen bigint;
ALTER TABLE {schema}.history ALTER COLUMN inbox DROP DEFAULT, ALTER COLUMN inbox DROP NOT NULL;
ALTER TABLE {schema}.history ALTER COLUMN inbox TYPE bigint USING NULL::bigint, ADD COLUMN signals_seen bigint;

-- One index for every signal of a target: the ends of instances delete consumed ones too.
DROP INDEX {schema}.signals_inbox;
CREATE INDEX signals_target ON {schema}.signals (target_id, id);

UPDATE {schema}.instances AS i SET inbox = (SELECT max(s.id) FROM {schema}.signals AS s WHERE s.target_id = i.id)
WHERE i.inbox IS NOT NULL;

CREATE VIEW {schema}.instance_view AS
SELECT id, queue, priority, status, machine, machine_version, step, attempt, crashes, version, token, worker_id,
       created_at, eligible_at, finished_at, expires_at, correlation_key, cancel_requested, reason, error,
       CASE WHEN state_type = 'json' THEN convert_from(state, 'UTF8')::jsonb END AS state,
       CASE WHEN result_type = 'json' THEN convert_from(result, 'UTF8')::jsonb END AS result,
       awaits, deadline, parent_id, children_pending, concurrency_key, rate_limit, weight, lane,
       finished_at IS NOT NULL AND inbox > coalesce(signals_seen, 0) AS unread
FROM (SELECT * FROM {schema}.instances UNION ALL SELECT * FROM {schema}.history) AS every;
COMMENT ON VIEW {schema}.instance_view IS 'live and finished instances, JSON payloads as jsonb, for people';
COMMENT ON VIEW {schema}.signal_view IS
    'signals of live and failed instances, unread ones of all; JSON payloads as jsonb, for people';

-- Cascading cancels under way. One is committed before its tree is walked: an outcome that inserts children looks here,
-- and cancels itself and them when one of its ancestors is the target. So a tree that grows is walked once.
CREATE TABLE {schema}.cascades (
    id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    target_id bigint      NOT NULL,
    asked_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    terminate boolean     NOT NULL,
    error     jsonb       NOT NULL
);
