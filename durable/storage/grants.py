"""What a producer's, a worker's and an administrator's role may do in a schema.

producer  insert instances and signals, read where an instance stands and its result. It may not read states and
          payloads of others, claim, cancel, nor change anything but what a signal's delivery does.
worker    read and write every row; and have partitions made and dropped by the schema's functions. No DDL, no TRUNCATE.
admin     owns the schema and everything in it, and so may migrate.

Granting again is harmless, and is to be done after an upgrade of the schema: new tables are granted to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psycopg import sql

from durable.errors import ConfigError
from durable.sql import Statements, quote_identifier
from durable.storage.session import Connection

PRODUCER = """GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT USAGE ON SEQUENCE {schema}.instance_ids TO {role};
GRANT SELECT ON {schema}.migrations, {schema}.limits TO {role};
GRANT INSERT (id, queue, priority, status, eligible_at, expires_at, machine, machine_version, step, state_type, state,
              max_attempts, correlation_key, correlation_scope, parent_id, parent_round, concurrency_key, rate_limit,
              weight, lane, trace)
    ON {schema}.instances TO {role};
GRANT SELECT (id, status, queue, machine, step, version, eligible_at, finished_at, cancel_requested, correlation_key,
              correlation_scope, result_type, result, error, inbox, awaits, deadline)
    ON {schema}.instances TO {role};
GRANT UPDATE (inbox, status, eligible_at, deadline) ON {schema}.instances TO {role};
GRANT SELECT (id, status, queue, machine, step, version, finished_at, cancel_requested, result_type, result, error)
    ON {schema}.history TO {role};
GRANT INSERT (target_id, name, dedup_key, payload_type, payload, trace) ON {schema}.signals TO {role};
GRANT SELECT (target_id, name, dedup_key) ON {schema}.signals TO {role};
"""

WORKER = """GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE
    ON {schema}.instances, {schema}.history, {schema}.signals, {schema}.workers, {schema}.duties, {schema}.schedules,
       {schema}.limits, {schema}.gates, {schema}.buckets, {schema}.queues
    TO {role};
GRANT SELECT ON {schema}.migrations, {schema}.instance_view, {schema}.signal_view TO {role};
GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {role};
GRANT EXECUTE ON FUNCTION {schema}.make_partition(date), {schema}.drop_partition(date),
    {schema}.thin_partition(date, bigint[]) TO {role};
"""

KINDS = ("producer", "worker", "admin")
LOCK_TIMEOUT = "2s"

_OURS = """
SELECT CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.relname::text, ''
FROM pg_catalog.pg_class AS c
WHERE c.relnamespace = %(schema)s::text::regnamespace AND c.relkind IN ('r', 'p', 'v', 'S') AND c.relowner <> %(role)s
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend AS d
                  WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('a', 'i')
                    AND c.relkind = 'S')
UNION ALL
SELECT 'TYPE', t.typname::text, '' FROM pg_catalog.pg_type AS t
WHERE t.typnamespace = %(schema)s::text::regnamespace AND t.typtype = 'e' AND t.typowner <> %(role)s
UNION ALL
SELECT 'FUNCTION', p.proname::text, pg_catalog.pg_get_function_identity_arguments(p.oid) FROM pg_catalog.pg_proc AS p
WHERE p.pronamespace = %(schema)s::text::regnamespace AND p.proowner <> %(role)s
"""


def script(schema: str, kind: str, role: str) -> str:
    """Return the SQL that grants a producer's or a worker's rights."""
    text = {"producer": PRODUCER, "worker": WORKER}[kind]
    return Statements(schema).render(text).replace("{role}", quote_identifier(role))


def grant(connection: Connection, schema: str, roles: Sequence[tuple[str, str]]) -> None:
    """Grant each (kind, role), all or none. Raises ConfigError for a role that does not exist, psycopg.Error."""
    with connection.transaction():
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        oids = _oids(connection, [role for _, role in roles])
        for kind, role in roles:
            if kind == "admin":
                _give_ownership(connection, schema, role, oids[role])
            else:
                connection.execute(script(schema, kind, role).encode())


def _oids(connection: Connection, roles: Sequence[str]) -> Mapping[str, int]:
    rows = connection.execute(
        "SELECT rolname::text, oid::bigint FROM pg_catalog.pg_roles WHERE rolname = ANY (%s::text[])", (list(roles),)
    ).fetchall()
    found = dict(rows)
    for role in roles:
        if role not in found:
            raise ConfigError(f"there is no role {role!r}; CREATE ROLE {quote_identifier(role)} LOGIN")
    return found


def _give_ownership(connection: Connection, schema: str, role: str, oid: int) -> None:
    owner = sql.Identifier(role)
    connection.execute(sql.SQL("ALTER SCHEMA {} OWNER TO {}").format(sql.Identifier(schema), owner))
    rows = connection.execute(_OURS, {"schema": quote_identifier(schema), "role": oid}).fetchall()
    for kind, name, arguments in rows:
        # Kinds are three words of ours, arguments are Postgres' own text of type names.
        what = sql.SQL(kind) + sql.SQL(" ") + sql.Identifier(schema, name)
        if kind == "FUNCTION":
            what += sql.SQL("(") + sql.SQL(arguments) + sql.SQL(")")
        connection.execute(sql.SQL("ALTER {} OWNER TO {}").format(what, owner))
