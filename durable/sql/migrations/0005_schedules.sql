-- breaking: no
--
-- schedules  periodic work: when it is due next, and the row to insert then. Any number of beats fire it; whoever locks
--            the row inserts and moves next_at on in one transaction.

CREATE TABLE {schema}.schedules (
    name       text        PRIMARY KEY CHECK (octet_length(name) BETWEEN 1 AND 255),
    app        text        NOT NULL,
    schedule   text        NOT NULL,
    tz         text        NOT NULL,
    misfire    text        NOT NULL CHECK (misfire IN ('once', 'skip', 'all')),
    overlap    text        NOT NULL CHECK (overlap IN ('allow', 'skip')),
    enabled    boolean     NOT NULL DEFAULT true,
    next_at    timestamptz CHECK (isfinite(next_at)),
    last_at    timestamptz,
    last_id    bigint,
    fired      bigint      NOT NULL DEFAULT 0,
    skipped    bigint      NOT NULL DEFAULT 0,
    template   jsonb       NOT NULL,
    state_type text        NOT NULL,
    state      bytea       NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

COMMENT ON COLUMN {schema}.schedules.next_at IS 'the occurrence that is fired next; null: there is none';
COMMENT ON COLUMN {schema}.schedules.last_at IS 'the occurrence that was fired last, whenever that was';
COMMENT ON COLUMN {schema}.schedules.template IS 'the row to insert but for its payload, as durable.periodic writes it';

CREATE INDEX schedules_due ON {schema}.schedules (next_at) WHERE enabled AND next_at IS NOT NULL;
