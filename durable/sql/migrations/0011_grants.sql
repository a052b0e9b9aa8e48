-- breaking: no
--
-- grants  the roles that `durable migrate --grant` has given rights to; every migration gives them again

CREATE TABLE {schema}.grants (
    role       text        NOT NULL,
    kind       text        NOT NULL CHECK (kind IN ('producer', 'worker', 'admin')),
    granted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (role, kind)
);
