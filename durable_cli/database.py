"""`durable migrate`: the schema."""

from __future__ import annotations

from collections.abc import Iterable

import click

from durable import Durable
from durable.storage import grants, migrations
from durable.storage.session import Connection, run_repeatedly
from durable_cli.exits import FAILED, USAGE, CommandError
from durable_cli.output import print_json, print_table, say
from durable_cli.session import Session, connected, database_options
from durable_cli.values import GRANT


@click.command()
@click.option("--status", is_flag=True, help="Show applied and pending migrations; exit 1 if any is pending.")
@click.option("--sql", is_flag=True, help="Print the SQL of the whole schema; connects to nothing.")
@click.option(
    "--grant", "granted", type=GRANT, multiple=True, metavar="KIND=ROLE",
    help="Then let a database role do what a producer, a worker or an admin must; may be given several times.",
)  # fmt: skip
@click.option(
    "--revoke", "revoked", type=GRANT, multiple=True, metavar="KIND=ROLE",
    help="Withdraw what --grant gave, and forget the role; may be given several times.",
)  # fmt: skip
@database_options
@click.pass_context
def migrate(
    ctx: click.Context,
    status: bool,
    sql: bool,
    granted: tuple[tuple[str, str], ...],
    revoked: tuple[tuple[str, str], ...],
) -> None:
    """Create or upgrade the schema. Any number may run at once; workers may go on meanwhile.

    --grant producer=ROLE lets a role insert, signal and read results; worker=ROLE also claim, commit, beat; admin=ROLE
    owns the schema from then on, and so may migrate. The schema records these roles: each migrate makes their rights
    whole again, on new tables too and after a restore without privileges.
    """
    session: Session = ctx.obj
    if status and (sql or granted or revoked):
        raise CommandError("give --status alone", USAGE)
    if sql and any(kind == "admin" for kind, _ in granted):
        raise CommandError("--sql can't tell what an admin is to own: it connects to nothing", USAGE)
    if sql and revoked:
        raise CommandError(
            "--sql prints no --revoke: REVOKE by hand, and delete the role's row from the table grants", USAGE
        )
    app = session.database()
    if sql:
        _print_script(session, app, granted)
        return
    # Not app.dsn(), which makes the schema of an embedded server by itself.
    with connected(app, app.database.dsn(), schema_needed=False) as connection:
        if status:
            ctx.exit(_print_status(session, app, connection))
        applied = [f"{migration.id:04}_{migration.name}" for migration in migrations.migrate(connection, app.schema)]
        run_repeatedly(connection, app.sql, lambda: app.limit_rows.declare())
        if revoked:
            grants.revoke(connection, app.schema, revoked)
        if granted:
            grants.grant(connection, app.schema, granted)
    if session.as_json:
        found = {"schema": app.schema, "applied": applied}
        print_json(found | {"granted": [list(pair) for pair in granted], "revoked": [list(pair) for pair in revoked]})
    else:
        for name in applied:
            say(f"applied {name}")
        for kind, role in revoked:
            say(f"revoked {kind} from {role}")
        for kind, role in granted:
            say(f"granted {kind} to {role}")
        say(f"schema {app.schema!r} is up to date")


def _print_script(session: Session, app: Durable, granted: Iterable[tuple[str, str]]) -> None:
    script = "\n".join(
        [migrations.script(app.schema), *(grants.script(app.schema, kind, role) for kind, role in granted)]
    )
    if session.as_json:
        print_json({"schema": app.schema, "sql": script})
    else:
        say(script)


def _print_status(session: Session, app: Durable, connection: Connection) -> int:
    have = migrations.applied(connection, app.schema)
    rows = []
    for migration in migrations.known():
        state = "pending"
        if migration.id in have:
            state = "applied" if have[migration.id][0] == migration.checksum else "applied with another text"
        rows.append({"id": migration.id, "name": migration.name, "state": state, "breaking": migration.breaking})
    known = {migration.id for migration in migrations.known()}
    rows += [
        {"id": number, "name": None, "state": "applied by newer code", "breaking": breaking}
        for number, (_, breaking) in sorted(have.items())
        if number not in known
    ]
    pending = sum(row["state"] == "pending" for row in rows)
    if session.as_json:
        print_json({"schema": app.schema, "pending": pending, "migrations": rows})
    else:
        print_table(("id", "migration", "state"), [(row["id"], row["name"], row["state"]) for row in rows], ("id",))
        if pending:
            say(f"schema {app.schema!r}: {pending} pending; run `durable migrate`")
    return FAILED if pending else 0
