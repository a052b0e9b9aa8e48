-- breaking: no
--
-- terminate_requested  whether the process that runs the present claim is to be killed for a cancel. Workers that do not
--                      know it cancel the instance when its step ends, as without it.

ALTER TABLE {schema}.instances ADD COLUMN terminate_requested boolean NOT NULL DEFAULT false;
ALTER TABLE {schema}.history ADD COLUMN terminate_requested boolean NOT NULL DEFAULT false;
