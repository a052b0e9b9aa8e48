-- breaking: no
--
-- instances   every live instance, and finished ones only while they keep a correlation key reserved.
-- history     every other finished instance, with the same columns, one partition per UTC day of finished_at.
-- workers     one narrow row per worker process or beat: its lease. Heartbeats touch nothing else.
-- duties      when each periodic duty last ran, so that any number of beats share them.
--
-- No foreign key touches instances: its trigger per deleted row would cost more than the move to history.

CREATE TYPE {schema}.status AS ENUM (
    'scheduled', 'runnable', 'executing', 'awaiting_signal', 'awaiting_children', 'done', 'failed', 'cancelled'
);

CREATE SEQUENCE {schema}.instance_ids AS bigint;

CREATE TABLE {schema}.instances (
    id                bigint      NOT NULL DEFAULT nextval('{schema}.instance_ids') PRIMARY KEY,
    eligible_at       timestamptz NOT NULL CHECK (isfinite(eligible_at)),
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at       timestamptz,
    expires_at        timestamptz,
    worker_id         bigint,
    status            {schema}.status NOT NULL,
    token             integer     NOT NULL DEFAULT 0 CHECK (token >= 0),
    version           integer     NOT NULL DEFAULT 0 CHECK (version >= 0),
    attempt           integer     NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    machine_version   integer     NOT NULL DEFAULT 1 CHECK (machine_version >= 1),
    priority          smallint    NOT NULL DEFAULT 0,
    crashes           smallint    NOT NULL DEFAULT 0 CHECK (crashes >= 0),
    cancel_requested  boolean     NOT NULL DEFAULT false,
    max_attempts      integer     CHECK (max_attempts >= 1),
    queue             text        NOT NULL,
    machine           text        NOT NULL,
    step              text        NOT NULL,
    state_type        text        NOT NULL,
    state             bytea       NOT NULL,
    result_type       text,
    result            bytea,
    error             jsonb,
    correlation_key   text        CHECK (octet_length(correlation_key) BETWEEN 1 AND 255),
    correlation_scope {schema}.status[],
    reason            text,
    CHECK ((status = 'executing') = (worker_id IS NOT NULL)),
    CHECK ((status IN ('done', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0,
        autovacuum_analyze_scale_factor = 0.2, autovacuum_analyze_threshold = 20000);

COMMENT ON COLUMN {schema}.instances.token IS 'counts claims; the fence every outcome is compared with';
COMMENT ON COLUMN {schema}.instances.version IS 'counts committed outcomes';
COMMENT ON COLUMN {schema}.instances.machine_version IS 'generation of the task or machine that started the instance';
COMMENT ON COLUMN {schema}.instances.crashes IS 'worker processes that died in the current step';
COMMENT ON COLUMN {schema}.instances.correlation_scope IS 'statuses in which the key is occupied; null: the live ones';
COMMENT ON COLUMN {schema}.instances.reason IS 'why a waiting instance was handed back';

-- Suspects (a crash behind them) have a lane of their own: they are claimed alone.
CREATE INDEX instances_pick ON {schema}.instances (queue, priority, eligible_at, id)
    WHERE status = 'runnable' AND crashes = 0;
CREATE INDEX instances_suspect ON {schema}.instances (queue, priority, eligible_at, id)
    WHERE status = 'runnable' AND crashes > 0;
CREATE INDEX instances_due ON {schema}.instances (eligible_at) WHERE status = 'scheduled';
CREATE INDEX instances_claimed ON {schema}.instances (worker_id) WHERE status = 'executing';
CREATE UNIQUE INDEX instances_key ON {schema}.instances (correlation_key)
    WHERE correlation_key IS NOT NULL
      AND CASE WHEN correlation_scope IS NULL THEN status NOT IN ('done', 'failed', 'cancelled')
               ELSE status = ANY (correlation_scope) END;
CREATE INDEX instances_kept ON {schema}.instances (finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE {schema}.history (
    LIKE {schema}.instances INCLUDING COMMENTS,
    PRIMARY KEY (id, finished_at)
) PARTITION BY RANGE (finished_at);

CREATE TABLE {schema}.workers (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind         text        NOT NULL CHECK (kind IN ('worker', 'beat')),
    name         text        NOT NULL,
    host         text        NOT NULL,
    boot_id      text        NOT NULL,
    pid          integer     NOT NULL,
    command_pid  integer     NOT NULL,
    command_start text       NOT NULL,
    queue        text,
    slots        integer     NOT NULL DEFAULT 1,
    started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at   timestamptz NOT NULL,
    dead_at      timestamptz
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);

COMMENT ON COLUMN {schema}.workers.command_pid IS 'the supervisor, which reports its dead children itself';
COMMENT ON COLUMN {schema}.workers.command_start IS 'when the kernel started that process, so that a recycled pid is not taken for it';

CREATE TABLE {schema}.duties (
    name   text        PRIMARY KEY,
    ran_at timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO {schema}.duties (name) VALUES ('gc');

CREATE VIEW {schema}.instance_view AS
SELECT id, queue, priority, status, machine, machine_version, step, attempt, crashes, version, token, worker_id,
       created_at, eligible_at, finished_at, expires_at, correlation_key, cancel_requested, reason, error,
       CASE WHEN state_type = 'json' THEN convert_from(state, 'UTF8')::jsonb END AS state,
       CASE WHEN result_type = 'json' THEN convert_from(result, 'UTF8')::jsonb END AS result
FROM (SELECT * FROM {schema}.instances UNION ALL SELECT * FROM {schema}.history) AS every;

COMMENT ON VIEW {schema}.instance_view IS 'live and finished instances, JSON payloads as jsonb, for people';
