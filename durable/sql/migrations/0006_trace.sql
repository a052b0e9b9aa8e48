-- breaking: no
--
-- trace  where an instance was inserted, or a signal sent: a W3C traceparent, null unless something traces.

ALTER TABLE {schema}.instances ADD COLUMN trace text;
ALTER TABLE {schema}.history ADD COLUMN trace text;
ALTER TABLE {schema}.signals ADD COLUMN trace text;
