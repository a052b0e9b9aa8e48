-- breaking: no
--
-- What the cluster is asked to do, kept where it also reaches workers that are down.
--
-- queues       settings of a queue, whoever serves it; a queue without a row is neither paused nor set
-- entered      [[id, token, seconds before heartbeat_at], ...]: the claims whose step was running then
-- tasks        "name:version" of what the process can run
-- asked        what its command is asked to do next: stop, reload
--
-- Workers that do not know these go on claiming from a paused queue.

CREATE TABLE {schema}.queues (
    name        text        PRIMARY KEY,
    paused_at   timestamptz,
    reason      text,
    concurrency integer     CHECK (concurrency BETWEEN 1 AND 1000),
    updated_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);

COMMENT ON COLUMN {schema}.queues.paused_at IS 'since when nothing is claimed from it';
COMMENT ON COLUMN {schema}.queues.concurrency IS 'worker processes per command, instead of what each was started with';

ALTER TABLE {schema}.workers
    ADD COLUMN entered jsonb,
    ADD COLUMN tasks text[],
    ADD COLUMN asked text CHECK (asked IN ('stop', 'reload'));
