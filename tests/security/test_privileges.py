"""What each kind of role may do on each table, column, sequence and function, held against the list written here."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from durable import Durable
from durable.errors import ConfigError
from durable.storage import grants, migrations
from tests import fix_db
from tests.cli.conftest import Ran

schema = fix_db.schema  # one of its own for each test, since these change it
Connection = psycopg.Connection[Any]

TABLES = {
    "instances", "history", "signals", "workers", "duties", "schedules", "limits", "gates", "buckets", "queues",
    "cascades", "migrations", "grants",
}  # fmt: skip
VIEWS = {"instance_view", "signal_view"}
SEQUENCES = {"instance_ids", "workers_id_seq", "signals_id_seq", "cascades_id_seq"}
FUNCTIONS = {"make_partition(day date)", "drop_partition(day date)", "thin_partition(day date, wanted bigint[])"}
PARTITIONS = "history_*"

PRODUCER_COLUMNS = {
    ("instances", "INSERT"): "id queue priority status eligible_at expires_at machine machine_version step state_type"
    " state max_attempts correlation_key correlation_scope parent_id parent_round concurrency_key rate_limit weight"
    " lane trace",
    ("instances", "SELECT"): "id status queue machine step version eligible_at finished_at cancel_requested"
    " correlation_key correlation_scope result_type result error inbox awaits deadline",
    ("instances", "UPDATE"): "inbox status eligible_at deadline",
    ("history", "SELECT"): "id status queue machine step version finished_at cancel_requested result_type result error",
    ("signals", "INSERT"): "target_id name dedup_key payload_type payload trace",
    ("signals", "SELECT"): "id target_id name dedup_key",
}
PRODUCER = {
    "schema USAGE",
    "sequence instance_ids USAGE",
    "migrations SELECT",
    "limits SELECT",
} | {f"{table}({column}) {right}" for (table, right), text in PRODUCER_COLUMNS.items() for column in text.split()}
WORKER = (
    {"schema USAGE", "migrations SELECT", *(f"{view} SELECT" for view in VIEWS)}
    | {f"sequence {name} USAGE" for name in SEQUENCES}
    | {f"function {name} EXECUTE" for name in FUNCTIONS}
    | {
        f"{table} {right}"
        for table in TABLES - {"migrations", "grants"}
        for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
    }
)
ADMIN = (
    {"schema USAGE", "schema CREATE"}
    | {f"sequence {name} {right}" for name in SEQUENCES for right in ("USAGE", "SELECT", "UPDATE")}
    | {f"function {name} EXECUTE" for name in FUNCTIONS}
    | {
        f"{table} {right}"
        for table in TABLES | VIEWS | {PARTITIONS}
        for right in ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
    }
)
EXPECTED = {"producer": PRODUCER, "worker": WORKER, "admin": ADMIN, "public": set[str]()}

PRIVILEGES = """
WITH tables AS (
    SELECT c.oid, CASE WHEN c.relispartition THEN 'history_*' ELSE c.relname::text END AS name FROM pg_class AS c
    WHERE c.relnamespace = %(schema)s::regnamespace AND c.relkind IN ('r', 'p', 'v')
)
SELECT 'schema ' || r FROM unnest(ARRAY['USAGE', 'CREATE']) AS r WHERE has_schema_privilege(%(role)s, %(schema)s, r)
UNION
SELECT name || ' ' || r FROM tables,
    unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS r
WHERE has_table_privilege(%(role)s, oid, r)
UNION
SELECT name || '(' || a.attname || ') ' || r FROM tables JOIN pg_attribute AS a ON a.attrelid = oid AND a.attnum > 0,
    unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS r
WHERE NOT a.attisdropped AND NOT has_table_privilege(%(role)s, oid, r)
  AND has_column_privilege(%(role)s, oid, a.attnum, r)
UNION
SELECT 'sequence ' || c.relname || ' ' || r FROM pg_class AS c, unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS r
WHERE c.relnamespace = %(schema)s::regnamespace AND c.relkind = 'S' AND has_sequence_privilege(%(role)s, c.oid, r)
UNION
SELECT 'function ' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ') EXECUTE' FROM pg_proc AS p
WHERE p.pronamespace = %(schema)s::regnamespace AND has_function_privilege(%(role)s, p.oid, 'EXECUTE')"""


@pytest.fixture
def connection(database: str) -> Iterator[Connection]:
    with psycopg.connect(database, autocommit=True) as made:
        yield made


@pytest.fixture
def roles(connection: Connection, schema: str) -> Iterator[dict[str, str]]:
    """A role of each kind on a migrated schema, by kind."""
    with made_roles(connection, ["producer", "worker", "admin"]) as made:
        migrations.migrate(connection, schema)
        grants.grant(connection, schema, list(made.items()))
        yield made


@contextmanager
def made_roles(connection: Connection, kinds: list[str]) -> Iterator[dict[str, str]]:
    """Roles that can log in, by kind; dropped afterwards."""
    names = {kind: f"{kind}_{uuid.uuid4().hex[:10]}" for kind in kinds}
    for name in names.values():
        connection.execute(f"CREATE ROLE {name} LOGIN")
    try:
        yield dict(names)
    finally:
        for name in names.values():
            if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (name,)).fetchone():
                connection.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER")
                connection.execute(f"DROP OWNED BY {name}")
                connection.execute(f"DROP ROLE {name}")


def privileges(connection: Connection, schema: str, role: str) -> set[str]:
    rows = connection.execute(PRIVILEGES, {"schema": schema, "role": role}).fetchall()
    return {row[0] for row in rows}


def assert_whole(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    for kind, role in (*roles.items(), ("public", "public")):
        found, expected = privileges(connection, schema, role), EXPECTED[kind]
        assert (sorted(found - expected), sorted(expected - found)) == ([], []), (
            f"{kind}: too much, too little. A new table, column, sequence or function: say in durable/storage/grants.py"
            " (WITHDRAW, PRODUCER, WORKER) what each kind may do with it, and write it into the lists of this file"
        )


def lost(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    """Leave the privileges of a restore with --no-owner --no-acl."""
    connection.execute("UPDATE pg_class SET relacl = NULL WHERE relnamespace = %s::regnamespace", (schema,))
    connection.execute("UPDATE pg_proc SET proacl = NULL WHERE pronamespace = %s::regnamespace", (schema,))
    connection.execute("UPDATE pg_namespace SET nspacl = NULL WHERE nspname = %s", (schema,))
    connection.execute(
        "UPDATE pg_attribute SET attacl = NULL FROM pg_class AS c"
        " WHERE attrelid = c.oid AND relnamespace = %s::regnamespace",
        (schema,),
    )
    connection.execute(f"REASSIGN OWNED BY {roles['admin']} TO CURRENT_USER")
    assert "function drop_partition(day date) EXECUTE" in privileges(connection, schema, "public")


def too_much(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    """Give away everything, partitions and single columns included, as default privileges may do."""
    everyone = f"PUBLIC, {roles['producer']}, {roles['worker']}"
    for what in ("TABLES", "SEQUENCES", "FUNCTIONS"):
        connection.execute(f"GRANT ALL ON ALL {what} IN SCHEMA {schema} TO {everyone}")
    connection.execute(f"GRANT SELECT (state) ON {schema}.instances TO {everyone}")
    connection.execute(f"GRANT CREATE ON SCHEMA {schema} TO {roles['producer']}")


def handed_on(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    """Let the producer grant on what it should not have."""
    connection.execute(f"GRANT SELECT ON {schema}.workers TO {roles['producer']} WITH GRANT OPTION")
    connection.execute(f"SET ROLE {roles['producer']}")
    connection.execute(f"GRANT SELECT ON {schema}.workers TO PUBLIC")
    connection.execute("RESET ROLE")


def nothing(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    """Leave everything as it was granted."""


DAMAGES = [nothing, lost, too_much, handed_on]


@pytest.mark.parametrize("damage", DAMAGES)
def test_migrate_makes_all_rights_whole(
    connection: Connection, schema: str, roles: dict[str, str], damage: Callable[..., None]
) -> None:
    damage(connection, schema, roles)
    assert migrations.migrate(connection, schema) == []
    assert_whole(connection, schema, roles)


@pytest.mark.parametrize("damage", DAMAGES[1:])
def test_each_grant_makes_all_rights_whole(
    connection: Connection, schema: str, roles: dict[str, str], damage: Callable[..., None]
) -> None:
    damage(connection, schema, roles)
    grants.grant(connection, schema, [("producer", roles["producer"])])
    assert_whole(connection, schema, roles)


def test_public_loses_functions_without_a_record(connection: Connection, schema: str) -> None:
    migrations.migrate(connection, schema)
    connection.execute("UPDATE pg_proc SET proacl = NULL WHERE pronamespace = %s::regnamespace", (schema,))
    migrations.migrate(connection, schema)
    assert privileges(connection, schema, "public") == set()


def test_migration_grants_in_its_transaction(
    connection: Connection, schema: str, roles: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that is made anew belongs to everybody, and to the workers no longer."""
    text = connection.execute(f"SELECT pg_get_functiondef('{schema}.drop_partition(date)'::regprocedure)").fetchone()[0]  # type: ignore[index]
    anew = f"DROP FUNCTION {{schema}}.drop_partition(date); {text};"
    known = migrations.known()
    failing = migrations.Migration(9998, "bad", anew + "SELECT 1 / 0", False)
    monkeypatch.setattr(migrations, "known", lambda: (*known, failing))
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrations.migrate(connection, schema)
    assert_whole(connection, schema, roles)
    monkeypatch.setattr(migrations, "known", lambda: (*known, migrations.Migration(9998, "good", anew, False)))
    assert [one.id for one in migrations.migrate(connection, schema)] == [9998]
    assert_whole(connection, schema, roles)


def test_rights_of_others_are_left_alone(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    with made_roles(connection, ["report"]) as made:
        connection.execute(f"GRANT SELECT ON {schema}.history TO {made['report']}")
        migrations.migrate(connection, schema)
        assert privileges(connection, schema, made["report"]) == {"history SELECT"}


def test_role_of_two_kinds_has_the_rights_of_both(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    grants.grant(connection, schema, [("worker", roles["producer"])])
    migrations.migrate(connection, schema)
    assert privileges(connection, schema, roles["producer"]) == {
        right for right in PRODUCER | WORKER if "(" not in right or right.startswith("function")
    }
    grants.revoke(connection, schema, [("worker", roles["producer"])])
    assert_whole(connection, schema, roles)


def test_owner_keeps_its_rights_as_a_worker(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    grants.grant(connection, schema, [("worker", roles["admin"])])
    migrations.migrate(connection, schema)
    assert_whole(connection, schema, roles)
    grants.revoke(connection, schema, [("worker", roles["admin"])])
    assert_whole(connection, schema, roles)


def test_missing_role_is_named_and_skipped(
    connection: Connection, schema: str, roles: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    gone = roles.pop("producer")
    connection.execute(f"DROP OWNED BY {gone}")
    connection.execute(f"DROP ROLE {gone}")
    lost(connection, schema, roles)
    with caplog.at_level(logging.WARNING, "durable"):
        migrations.migrate(connection, schema)
    assert f"role '{gone}' is recorded as producer of schema '{schema}', but does not exist" in caplog.text
    assert f"--revoke producer={gone}" in caplog.text
    assert_whole(connection, schema, roles)
    caplog.clear()
    grants.revoke(connection, schema, [("producer", gone)])
    migrations.migrate(connection, schema)
    assert caplog.text == ""


def test_revoke_withdraws_and_forgets(
    connection: Connection, database: str, schema: str, roles: dict[str, str], durable: Callable[..., Ran]
) -> None:
    ran = durable("migrate", "--dsn", database, "--schema", schema, "--revoke", f"worker={roles['worker']}")
    assert (ran.code, f"revoked worker from {roles['worker']}\n" in ran.out) == (0, True), ran.err
    migrations.migrate(connection, schema)
    assert privileges(connection, schema, roles["worker"]) == set()
    with pytest.raises(ConfigError, match="is not recorded as worker"):
        grants.revoke(connection, schema, [("worker", roles["worker"])])
    with pytest.raises(ConfigError, match="owns schema"):
        grants.revoke(connection, schema, [("admin", roles["admin"])])


def test_last_admin_owns_the_schema(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    with made_roles(connection, ["admin"]) as made:
        grants.grant(connection, schema, [("admin", made["admin"])])
        migrations.migrate(connection, schema)
        assert_whole(connection, schema, {**roles, "admin": made["admin"]})
        assert "schema CREATE" not in privileges(connection, schema, roles["admin"])
        grants.grant(connection, schema, [("admin", roles["admin"])])
    assert_whole(connection, schema, roles)


def test_admin_restores_rights_by_itself(
    connection: Connection, database: str, schema: str, roles: dict[str, str]
) -> None:
    too_much(connection, schema, roles)
    with psycopg.connect(make_conninfo(database, user=roles["admin"]), autocommit=True) as admin:
        migrations.migrate(admin, schema)
    assert_whole(connection, schema, roles)


def test_worker_role_may_still_call_migrate(
    connection: Connection, database: str, schema: str, roles: dict[str, str]
) -> None:
    """It applies nothing, and leaves rights alone: only the owner may grant."""
    with psycopg.connect(make_conninfo(database, user=roles["worker"]), autocommit=True) as worker:
        assert migrations.migrate(worker, schema) == []
    assert_whole(connection, schema, roles)


def test_printed_grants_give_the_same_rights(connection: Connection, schema: str, roles: dict[str, str]) -> None:
    grants.revoke(connection, schema, [("producer", roles["producer"]), ("worker", roles["worker"])])
    too_much(connection, schema, roles)
    for kind in ("producer", "worker"):
        connection.execute(grants.script(schema, kind, roles[kind]).encode())
    for kind in ("producer", "worker"):
        rights = privileges(connection, schema, roles[kind])
        found = {right for right in rights if not right.startswith("history_")}
        assert found == EXPECTED[kind]
    migrations.migrate(connection, schema)  # knows both, and withdraws the partitions too
    assert_whole(connection, schema, roles)


@pytest.mark.parametrize("owned", [True, False], ids=["owner", "create"])
def test_migrate_needs_no_create_on_the_database(
    connection: Connection, database: str, schema: str, owned: bool
) -> None:
    with made_roles(connection, ["deploy"]) as made:
        name = made["deploy"]
        if owned:
            connection.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {name}")
        else:
            connection.execute(f"CREATE SCHEMA {schema}")
            connection.execute(f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {name}")
        app = Durable("shop", dsn=make_conninfo(database, user=name), schema=schema)
        try:
            assert len(app.migrate()) == len(migrations.known())
            assert app.migrate() == []
        finally:
            app.close()


def test_script_needs_no_create_on_the_database(connection: Connection, database: str, schema: str) -> None:
    with made_roles(connection, ["deploy"]) as made:
        connection.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {made['deploy']}")
        with psycopg.connect(make_conninfo(database, user=made["deploy"]), autocommit=True) as deploy:
            deploy.execute(migrations.script(schema).encode())
            assert migrations.migrate(deploy, schema) == []


def test_missing_schema_still_needs_create(connection: Connection, database: str, schema: str) -> None:
    with made_roles(connection, ["deploy"]) as made:
        deploy = psycopg.connect(make_conninfo(database, user=made["deploy"]), autocommit=True)
        with deploy, pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for database"):
            migrations.migrate(deploy, schema)
