-- breaking: no
--
-- Failed and cancelled instances among the finished ones: `status` counts them and shows the latest.

CREATE INDEX history_unsuccessful ON {schema}.history (status, finished_at) WHERE status IN ('failed', 'cancelled');
