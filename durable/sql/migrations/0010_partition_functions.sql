-- breaking: no
--
-- Partitions are made, dropped and thinned out by functions that run as the schema's owner, so that a role that may
-- only read and write rows can run workers. A day is all they are told: they touch no other table.

CREATE FUNCTION {schema}.make_partition(day date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    child text := '{schema}.' || quote_ident('history_' || to_char(day, 'YYYYMMDD'));
    since text := quote_literal(to_char(day, 'YYYY-MM-DD') || ' 00:00:00+00');
    until text := quote_literal(to_char(day + 1, 'YYYY-MM-DD') || ' 00:00:00+00');
BEGIN
    EXECUTE 'CREATE TABLE ' || child || ' (LIKE {schema}.history INCLUDING COMMENTS, CHECK (finished_at >= ' || since
            || ' AND finished_at < ' || until || '))';
    EXECUTE 'ALTER TABLE {schema}.history ATTACH PARTITION ' || child
            || ' FOR VALUES FROM (' || since || ') TO (' || until || ')';
END
$function$;

CREATE FUNCTION {schema}.drop_partition(day date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    EXECUTE 'DROP TABLE {schema}.' || quote_ident('history_' || to_char(day, 'YYYYMMDD'));
END
$function$;

-- Leave only the wanted rows in a partition. Takes no lock on its parent: commits go on.
CREATE FUNCTION {schema}.thin_partition(day date, wanted bigint[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    child text := '{schema}.' || quote_ident('history_' || to_char(day, 'YYYYMMDD'));
BEGIN
    -- Before they are copied: a row that is retried moves back to the live table, and must not come back here.
    EXECUTE 'LOCK TABLE ' || child || ' IN ACCESS EXCLUSIVE MODE';
    EXECUTE 'CREATE UNLOGGED TABLE {schema}.history_wanted AS SELECT * FROM ' || child || ' WHERE id = ANY ($1)'
        USING wanted;
    EXECUTE 'TRUNCATE ' || child;
    EXECUTE 'INSERT INTO ' || child || ' SELECT * FROM {schema}.history_wanted';
    EXECUTE 'DROP TABLE {schema}.history_wanted';
END
$function$;

REVOKE ALL ON FUNCTION {schema}.make_partition(date), {schema}.drop_partition(date),
    {schema}.thin_partition(date, bigint[]) FROM PUBLIC;
