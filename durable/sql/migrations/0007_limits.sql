-- breaking: yes
--
-- Limits: concurrency keys, gates, rate limits. A worker that does not know them would leave limited rows alone, and
-- would not open what its own outcomes free.
--
-- concurrency_key  at most one instance of a key executes, or as many as the gate of the key's name has slots
-- rate_limit       the token bucket it draws from at its claim: a limit's name, or name:partition
-- gate_shard       the part of the gate it drew its slot from; overwritten by each claim
-- lane             where it is parked ("key K", "rate B"); null: pickers see it
--
-- limits           what each name means
-- gates            slots of each key of a named gate, in shards: `wanted` is its share of the limit, `capacity` falls to
--                  that with each slot given back when the limit was lowered meanwhile
-- buckets          tokens of each bucket, in shards: full_at is when it is full again (a token costs period / allowed);
--                  opens_at, on shard 0, when the first row parked in its lane may go

ALTER TABLE {schema}.instances
    ADD COLUMN concurrency_key text CHECK (octet_length(concurrency_key) BETWEEN 1 AND 255),
    ADD COLUMN rate_limit text CHECK (octet_length(rate_limit) BETWEEN 1 AND 255),
    ADD COLUMN weight integer NOT NULL DEFAULT 1 CHECK (weight >= 1),
    ADD COLUMN gate_shard smallint,
    ADD COLUMN lane text COLLATE "C",
    ADD CHECK (lane IS NULL OR status = 'runnable');

ALTER TABLE {schema}.history
    ADD COLUMN concurrency_key text,
    ADD COLUMN rate_limit text,
    ADD COLUMN weight integer NOT NULL DEFAULT 1,
    ADD COLUMN gate_shard smallint,
    ADD COLUMN lane text COLLATE "C";

-- Unlimited work keeps the pick index to itself; limited rows wait outside of it, at any depth.
DROP INDEX {schema}.instances_pick;
CREATE INDEX instances_pick ON {schema}.instances (queue, priority, eligible_at, id)
    WHERE status = 'runnable' AND crashes = 0 AND concurrency_key IS NULL AND rate_limit IS NULL;
DROP INDEX {schema}.instances_suspect;
CREATE INDEX instances_suspect ON {schema}.instances (queue, priority, eligible_at, id)
    WHERE status = 'runnable' AND crashes > 0 AND concurrency_key IS NULL AND rate_limit IS NULL;
CREATE INDEX instances_limited ON {schema}.instances (queue, priority, eligible_at, id)
    WHERE status = 'runnable' AND lane IS NULL AND (concurrency_key IS NOT NULL OR rate_limit IS NOT NULL);
CREATE INDEX instances_lane ON {schema}.instances (lane, priority, eligible_at, id)
    WHERE status = 'runnable' AND lane IS NOT NULL;
-- One executing instance per key without a gate: a second one cannot be committed.
CREATE UNIQUE INDEX instances_exclusive ON {schema}.instances (concurrency_key)
    WHERE status = 'executing' AND concurrency_key IS NOT NULL AND gate_shard IS NULL;
CREATE INDEX instances_slots ON {schema}.instances (concurrency_key, gate_shard)
    WHERE status = 'executing' AND gate_shard IS NOT NULL;

CREATE TABLE {schema}.limits (
    kind       text        NOT NULL CHECK (kind IN ('concurrency', 'rate')),
    name       text        NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 100 AND position(':' IN name) = 0),
    allowed    integer     NOT NULL CHECK (allowed >= 1),
    period     interval    CHECK (period > interval '0'),
    burst      integer     CHECK (burst >= 1),
    shards     smallint    NOT NULL DEFAULT 1 CHECK (shards BETWEEN 1 AND 64),
    pinned     boolean     NOT NULL DEFAULT false,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (kind, name),
    CHECK ((kind = 'rate') = (period IS NOT NULL)),
    CHECK ((kind = 'rate') = (burst IS NOT NULL))
);
COMMENT ON COLUMN {schema}.limits.allowed IS 'executing instances per key, or tokens per period';
COMMENT ON COLUMN {schema}.limits.pinned IS 'set by hand: the app leaves it alone';

CREATE TABLE {schema}.gates (
    key      text     NOT NULL,
    shard    smallint NOT NULL,
    wanted   integer  NOT NULL CHECK (wanted >= 0),
    capacity integer  NOT NULL,
    used     integer  NOT NULL,
    PRIMARY KEY (key, shard),
    CHECK (used BETWEEN 0 AND capacity)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0);

CREATE TABLE {schema}.buckets (
    bucket   text        NOT NULL,
    shard    smallint    NOT NULL,
    full_at  timestamptz NOT NULL,
    opens_at timestamptz,
    PRIMARY KEY (bucket, shard)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0);
CREATE INDEX buckets_opens ON {schema}.buckets (opens_at) WHERE opens_at IS NOT NULL;

INSERT INTO {schema}.duties (name) VALUES ('limits');

DROP VIEW {schema}.instance_view;
CREATE VIEW {schema}.instance_view AS
SELECT id, queue, priority, status, machine, machine_version, step, attempt, crashes, version, token, worker_id,
       created_at, eligible_at, finished_at, expires_at, correlation_key, cancel_requested, reason, error,
       CASE WHEN state_type = 'json' THEN convert_from(state, 'UTF8')::jsonb END AS state,
       CASE WHEN result_type = 'json' THEN convert_from(result, 'UTF8')::jsonb END AS result,
       awaits, deadline, parent_id, children_pending, concurrency_key, rate_limit, weight, lane
FROM (SELECT * FROM {schema}.instances UNION ALL SELECT * FROM {schema}.history) AS every;
COMMENT ON VIEW {schema}.instance_view IS 'live and finished instances, JSON payloads as jsonb, for people';
