"""What a producer's, a worker's and an administrator's role may do in a schema.

producer  insert instances and signals, read where an instance stands and its result. It may not read states and
          payloads of others, claim, cancel, nor change anything but what a signal's delivery does.
worker    read and write every row; and have partitions made and dropped by the schema's functions. No DDL, no TRUNCATE.
admin     owns the schema and everything in it, and so may migrate.

The schema records who was granted what (`grants`). Each `migrate` and each grant makes the rights of every recorded
role whole in one transaction: everything is withdrawn from the role and from PUBLIC, then granted. So new tables and
functions have the rights that they should have, and the next `migrate` repairs a restore without privileges
(`--no-acl`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psycopg import sql

from durable.errors import ConfigError
from durable.sql import Statements, quote_identifier, quote_literal
from durable.storage.session import Connection

log = logging.getLogger(__name__)

RELATIONS = (
    "instances", "history", "signals", "workers", "duties", "schedules", "limits", "gates", "buckets", "queues",
    "cascades", "migrations", "grants", "instance_view", "signal_view",
)  # fmt: skip
SEQUENCES = ("instance_ids", "workers_id_seq", "signals_id_seq", "cascades_id_seq")
FUNCTIONS = ("make_partition(date)", "drop_partition(date)", "thin_partition(date, bigint[])")


def _ours(names: Sequence[str]) -> str:
    return ", ".join(f"{{schema}}.{name}" for name in names)


WITHDRAW = f"""REVOKE ALL ON {_ours(RELATIONS)} FROM {{role}} CASCADE;
REVOKE ALL ON SEQUENCE {_ours(SEQUENCES)} FROM {{role}} CASCADE;
REVOKE ALL ON FUNCTION {_ours(FUNCTIONS)} FROM {{role}} CASCADE;
"""
WITHDRAW_SCHEMA = "REVOKE ALL ON SCHEMA {schema} FROM {role} CASCADE;\n"
RECORD = """INSERT INTO {schema}.grants (role, kind) VALUES ({name}, '{kind}') ON CONFLICT DO NOTHING;
"""

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
GRANT SELECT (id, target_id, name, dedup_key) ON {schema}.signals TO {role};
"""

WORKER = """GRANT USAGE ON SCHEMA {schema} TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE
    ON {schema}.instances, {schema}.history, {schema}.signals, {schema}.workers, {schema}.duties, {schema}.schedules,
       {schema}.limits, {schema}.gates, {schema}.buckets, {schema}.queues, {schema}.cascades
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
    """Return the SQL that grants a producer's or a worker's rights, and records that it did."""
    text = WITHDRAW_SCHEMA + WITHDRAW + {"producer": PRODUCER, "worker": WORKER}[kind]
    granted = _rendered(schema, WITHDRAW, "PUBLIC") + _rendered(schema, text, quote_identifier(role))
    return granted + Statements(schema).render(RECORD).replace("{kind}", kind).replace("{name}", quote_literal(role))


def _rendered(schema: str, text: str, role: str) -> str:
    return Statements(schema).render(text).replace("{role}", role)


def lock_schema(connection: Connection, schema: str) -> None:
    """Wait, in a transaction, until no other process migrates the schema or grants in it."""
    connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s), 10)", (f"durable.{schema}",))


def grant(connection: Connection, schema: str, roles: Sequence[tuple[str, str]]) -> None:
    """Record each (kind, role), and make the rights of all recorded roles whole; all or none.

    Raises:
        ConfigError: A role does not exist.
        psycopg.Error: The session's role may not grant.
    """
    statements = Statements(schema)
    with connection.transaction():
        lock_schema(connection, schema)
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        oids = _oids(connection, [role for _, role in roles])
        for kind, role in roles:
            if kind == "admin":
                # A schema has one owner.
                connection.execute(statements.render("DELETE FROM {schema}.grants WHERE kind = 'admin'").encode())
                _give_ownership(connection, schema, role, oids[role])
            recorded = RECORD.replace("{name}", "%s").replace("'{kind}'", "%s")
            connection.execute(statements.render(recorded).encode(), (role, kind))
        _restore(connection, statements)


def revoke(connection: Connection, schema: str, roles: Sequence[tuple[str, str]]) -> None:
    """Withdraw each (kind, role) and forget it, whether the role still exists or not; all or none.

    Raises:
        ConfigError: A role was not granted that, or the kind is admin: a schema always has an owner.
        psycopg.Error: The session's role may not revoke.
    """
    statements = Statements(schema)
    with connection.transaction():
        lock_schema(connection, schema)
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        for kind, role in roles:
            if kind == "admin":
                raise ConfigError(f"{role!r} owns schema {schema!r}; make another role its owner by --grant admin=ROLE")
            forget = statements.render("DELETE FROM {schema}.grants WHERE kind = %s AND role = %s").encode()
            if not connection.execute(forget, (kind, role)).rowcount:
                raise ConfigError(f"role {role!r} is not recorded as {kind} of schema {schema!r}")
            known = connection.execute(
                "SELECT FROM pg_catalog.pg_roles AS r, pg_catalog.pg_namespace AS n"
                " WHERE r.rolname = %s AND n.nspname = %s AND n.nspowner <> r.oid",
                (role, schema),
            ).fetchone()
            if known is not None:  # an owner would lose what it owns
                _withdraw(connection, statements, quote_identifier(role))
        _restore(connection, statements)


def restore(connection: Connection, statements: Statements) -> None:
    """Make the rights of all recorded roles whole again, in the caller's transaction.

    Does nothing when the session's role does not own everything in the schema: only an owner may grant.
    """
    row = connection.execute(
        "SELECT bool_and(pg_catalog.pg_has_role(current_user, relowner, 'USAGE')) FROM pg_catalog.pg_class"
        " WHERE relnamespace = %s::text::regnamespace AND relname = ANY (%s::text[])",
        (quote_identifier(statements.schema), [*RELATIONS, *SEQUENCES]),
    ).fetchone()
    if row is not None and row[0]:
        _restore(connection, statements)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One row of `grants`.

    Attributes:
        oid: The role's; None when the role does not exist.
        owner: Whether it owns the schema.
        reachable: Whether the session's role may make it the owner.
    """

    kind: str
    role: str
    oid: int | None
    owner: bool
    reachable: bool


_RECORDED = """
SELECT g.kind, g.role, r.oid::bigint, coalesce(r.oid = n.nspowner, false),
       coalesce(pg_catalog.pg_has_role(current_user, r.oid, 'MEMBER'), false)
FROM {schema}.grants AS g LEFT JOIN pg_catalog.pg_roles AS r ON r.rolname = g.role
JOIN pg_catalog.pg_namespace AS n ON n.oid = %(schema)s::text::regnamespace
ORDER BY g.kind = 'admin' DESC, g.role, g.kind"""

# What PUBLIC has on one of our tables, columns, sequences and functions.
_PUBLIC = """
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_class AS c, pg_catalog.aclexplode(c.relacl) AS a
    WHERE c.relnamespace = %(schema)s::text::regnamespace AND a.grantee = 0
    UNION ALL
    SELECT FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_attribute AS t ON t.attrelid = c.oid,
                pg_catalog.aclexplode(t.attacl) AS a
    WHERE c.relnamespace = %(schema)s::text::regnamespace AND a.grantee = 0
    UNION ALL
    SELECT FROM pg_catalog.pg_proc AS p,
                pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) AS a
    WHERE p.pronamespace = %(schema)s::text::regnamespace AND p.proname = ANY (%(functions)s::text[])
      AND a.grantee = 0)"""

# Rights are those on the parent; nobody needs one on a partition.
_PARTITIONS = """
SELECT c.relname::text FROM pg_catalog.pg_inherits AS h JOIN pg_catalog.pg_class AS c ON c.oid = h.inhrelid
WHERE h.inhparent = pg_catalog.to_regclass(%(parent)s)
  AND (c.relacl IS NOT NULL
       OR EXISTS (SELECT FROM pg_catalog.pg_attribute AS t WHERE t.attrelid = c.oid AND t.attacl IS NOT NULL))"""


def _restore(connection: Connection, statements: Statements) -> None:
    schema = statements.schema
    quoted = quote_identifier(schema)
    rows = connection.execute(statements.render(_RECORDED).encode(), {"schema": quoted}).fetchall()
    found = connection.execute(
        _PUBLIC, {"schema": quoted, "functions": [name.partition("(")[0] for name in FUNCTIONS]}
    ).fetchone()
    if found is not None and found[0]:
        _withdraw(connection, statements, "PUBLIC")
    recorded = [_Recorded(*row) for row in rows]
    for one in recorded:
        if one.oid is None:
            log.warning(
                "role %r is recorded as %s of schema %r, but does not exist; make it and run `durable migrate` again,"
                " or forget it by `durable migrate --revoke %s=%s`",
                one.role, one.kind, schema, one.kind, one.role,
            )  # fmt: skip
        elif one.kind == "admin" and not one.reachable:
            log.warning(
                "role %r is recorded as admin of schema %r, but this role may not make it the owner", one.role, schema
            )
        elif one.kind == "admin":
            _give_ownership(connection, schema, one.role, one.oid)
    owners = {one.role for one in recorded if one.owner or one.kind == "admin"}
    # Withdrawn from an owner, its own rights would be gone too.
    present = [one for one in recorded if one.oid is not None and one.role not in owners]
    for role in sorted({one.role for one in present}):
        _withdraw(connection, statements, quote_identifier(role))
    for one in present:
        text = {"producer": PRODUCER, "worker": WORKER}[one.kind]
        connection.execute(_rendered(schema, text, quote_identifier(one.role)).encode())


def _withdraw(connection: Connection, statements: Statements, role: str) -> None:
    schema = statements.schema
    text = WITHDRAW if role == "PUBLIC" else WITHDRAW_SCHEMA + WITHDRAW
    connection.execute(_rendered(schema, text, role).encode())
    parent = f"{quote_identifier(schema)}.history"
    for (name,) in connection.execute(_PARTITIONS, {"parent": parent}).fetchall():
        connection.execute(
            _rendered(schema, f"REVOKE ALL ON {{schema}}.{quote_identifier(name)} FROM {{role}}", role).encode()
        )


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
    there = connection.execute(
        "SELECT FROM pg_catalog.pg_namespace WHERE nspname = %s AND nspowner = %s", (schema, oid)
    ).fetchone()
    if there is None:
        connection.execute(sql.SQL("ALTER SCHEMA {} OWNER TO {}").format(sql.Identifier(schema), owner))
    rows = connection.execute(_OURS, {"schema": quote_identifier(schema), "role": oid}).fetchall()
    for kind, name, arguments in rows:
        # Kinds are three words of ours, arguments are Postgres' own text of type names.
        what = sql.SQL(kind) + sql.SQL(" ") + sql.Identifier(schema, name)
        if kind == "FUNCTION":
            what += sql.SQL("(") + sql.SQL(arguments) + sql.SQL(")")
        connection.execute(sql.SQL("ALTER {} OWNER TO {}").format(what, owner))
