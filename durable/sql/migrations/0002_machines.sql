-- breaking: yes
--
-- Machines: signals with an inbox, awaits with deadlines, children with a barrier.
--
-- inbox            whether the signals table may hold rows of this instance
-- awaits, shown    names it awaits (kept after a wake until it progresses); ids of awaited signals it has been shown
-- deadline         when a park on signals ends by itself
-- parent_id        whom it reports its end to
-- children_pending children of the present round that are not finished yet
-- children_round   how many rounds of children it has scheduled; in a child: which round it belongs to

ALTER TABLE {schema}.instances
    ADD COLUMN inbox boolean NOT NULL DEFAULT false,
    ADD COLUMN awaits text[],
    ADD COLUMN shown bigint[],
    ADD COLUMN deadline timestamptz CHECK (isfinite(deadline)),
    ADD COLUMN parent_id bigint,
    ADD COLUMN parent_round integer,
    ADD COLUMN children_pending integer NOT NULL DEFAULT 0 CHECK (children_pending >= 0),
    ADD COLUMN children_round integer NOT NULL DEFAULT 0,
    ADD CHECK (status <> 'awaiting_signal' OR awaits IS NOT NULL),
    ADD CHECK (status <> 'awaiting_children' OR children_round > 0);

ALTER TABLE {schema}.history
    ADD COLUMN inbox boolean NOT NULL DEFAULT false,
    ADD COLUMN awaits text[],
    ADD COLUMN shown bigint[],
    ADD COLUMN deadline timestamptz,
    ADD COLUMN parent_id bigint,
    ADD COLUMN parent_round integer,
    ADD COLUMN children_pending integer NOT NULL DEFAULT 0,
    ADD COLUMN children_round integer NOT NULL DEFAULT 0;

CREATE INDEX instances_deadline ON {schema}.instances (deadline)
    WHERE status = 'awaiting_signal' AND deadline IS NOT NULL;
CREATE INDEX instances_children ON {schema}.instances (parent_id, id) WHERE parent_id IS NOT NULL;
CREATE INDEX history_children ON {schema}.history (parent_id, id) WHERE parent_id IS NOT NULL;

-- A consumed signal with a dedup key stays as a tombstone until its instance is finished, so that a redelivery after
-- the consumption is still a duplicate.
CREATE TABLE {schema}.signals (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    target_id    bigint      NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    consumed     boolean     NOT NULL DEFAULT false,
    name         text        NOT NULL,
    dedup_key    text,
    payload_type text,
    payload      bytea,
    CHECK (NOT consumed OR dedup_key IS NOT NULL)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0);

CREATE UNIQUE INDEX signals_dedup ON {schema}.signals (target_id, dedup_key) WHERE dedup_key IS NOT NULL;
CREATE INDEX signals_inbox ON {schema}.signals (target_id, id) WHERE NOT consumed;

DROP VIEW {schema}.instance_view;
CREATE VIEW {schema}.instance_view AS
SELECT id, queue, priority, status, machine, machine_version, step, attempt, crashes, version, token, worker_id,
       created_at, eligible_at, finished_at, expires_at, correlation_key, cancel_requested, reason, error,
       CASE WHEN state_type = 'json' THEN convert_from(state, 'UTF8')::jsonb END AS state,
       CASE WHEN result_type = 'json' THEN convert_from(result, 'UTF8')::jsonb END AS result,
       awaits, deadline, parent_id, children_pending
FROM (SELECT * FROM {schema}.instances UNION ALL SELECT * FROM {schema}.history) AS every;
COMMENT ON VIEW {schema}.instance_view IS 'live and finished instances, JSON payloads as jsonb, for people';

CREATE VIEW {schema}.signal_view AS
SELECT id, target_id, name, dedup_key, consumed, created_at,
       CASE WHEN payload_type = 'json' THEN convert_from(payload, 'UTF8')::jsonb END AS payload
FROM {schema}.signals;
COMMENT ON VIEW {schema}.signal_view IS 'inboxes of live instances, JSON payloads as jsonb, for people';
