"""Every form of libpq's connection strings leads to the server: producers, coroutines and workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from durable import Durable
from tests.fix_app import Command
from tests.fix_proxy import CountingProxy

ODD = "u@:/ %"
Parts = dict[str, str]


@pytest.fixture
def tcp(database: str) -> Iterator[Parts]:
    """Where the database is, by TCP."""
    proxy = CountingProxy(database)
    parts = {key: str(value) for key, value in conninfo_to_dict(proxy.dsn).items() if value}
    yield {key: parts[key] for key in ("host", "port", "user", "dbname", "password") if key in parts}
    proxy.close()


def _uri(hosts: str, parts: Parts, *query: str, scheme: str = "postgresql") -> str:
    who = quote(parts["user"], safe="") + (f":{quote(parts['password'], safe='')}" if "password" in parts else "")
    database = quote(parts["dbname"], safe="")
    return f"{scheme}://{who}@{hosts}/{database}?" + "&".join(("sslmode=prefer", *query))


def _hosts(parts: Parts) -> str:
    return f"{parts['host']}:{parts['port']}"


FORMS: dict[str, Callable[[Parts], str]] = {
    "uri": lambda p: _uri(_hosts(p), p),
    "postgres": lambda p: _uri(_hosts(p), p, scheme="postgres"),
    "localhost": lambda p: _uri(f"localhost:{p['port']}", p),
    "key value": lambda p: make_conninfo(**p),
    "query": lambda p: "postgresql:///?" + "&".join(f"{key}={quote(value, safe='')}" for key, value in p.items()),
    "hosts": lambda p: _uri(f"127.0.0.1:1,{_hosts(p)}", p),
    "primary": lambda p: _uri(f"127.0.0.1:1,{_hosts(p)}", p, "target_session_attrs=primary"),
    "read-write": lambda p: _uri(f"127.0.0.1:1,{_hosts(p)}", p, "target_session_attrs=read-write"),
    "prefer-standby": lambda p: _uri(_hosts(p), p, "target_session_attrs=prefer-standby"),
    "load balancing": lambda p: _uri(f"{_hosts(p)},{_hosts(p)}", p, "load_balance_hosts=random"),
    "hostaddr": lambda p: make_conninfo(**{**p, "host": "db.invalid", "hostaddr": p["host"]}),
    "options": lambda p: _uri(_hosts(p), p, "options=-c%20work_mem%3D5MB", "connect_timeout=3", "application_name=x"),
    "service": lambda p: "service=shop",
    "service uri": lambda p: "postgresql://?service=shop",
    "service hosts": lambda p: "service=hosts",
    "environment": lambda p: "postgresql://",
    "environment service": lambda p: "postgresql:///",
}


@pytest.fixture
def environment(tcp: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The DSN of a form, and around it what libpq reads."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    form = request.param
    services = {"shop": tcp, "hosts": {**tcp, "host": f"127.0.0.1,{tcp['host']}", "port": f"1,{tcp['port']}"}}
    lines = [f"[{name}]\n" + "".join(f"{key}={value}\n" for key, value in of.items()) for name, of in services.items()]
    (tmp_path / "services").write_text("".join(lines))
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    if form == "environment":
        names = {"dbname": "DATABASE"}
        for key, value in tcp.items():
            monkeypatch.setenv(f"PG{names.get(key, key.upper())}", value)
    elif form == "environment service":
        monkeypatch.setenv("PGSERVICE", "shop")
    return FORMS[form](tcp)


@pytest.mark.parametrize("environment", FORMS, indirect=True)
def test_a_producer_connects_by(environment: str, app: Durable) -> None:
    other = Durable("other", dsn=environment, schema=app.schema, connect_timeout=5)
    task = other.task(name="task")(lambda: None)

    async def main() -> str:
        status = await (await task.adelay()).astatus()
        await other.aclose()
        return status

    assert task.delay().status == asyncio.run(main()) == "runnable"
    other.close()


def test_a_unix_socket_is_a_host(database: str, app: Durable) -> None:
    parts = {key: str(value) for key, value in conninfo_to_dict(database).items() if value}
    if not parts.get("host", "").startswith("/"):
        pytest.skip("the server of this run has no socket that is known")
    encoded = _uri(f"{quote(parts['host'], safe='')}:{parts.get('port', 5432)}", {"dbname": "", "user": "", **parts})
    query = f"postgresql:///{parts['dbname']}?host={parts['host']}&user={parts.get('user', '')}"
    for dsn in (encoded, make_conninfo(database), query):
        other = Durable("other", dsn=dsn, schema=app.schema)
        assert other.task(name="task")(lambda: None).delay().status == "runnable"
        other.close()


def test_percent_encoding_reaches_odd_names(tcp: Parts, app: Durable, connection: psycopg.Connection[object]) -> None:
    names = sql.Identifier(ODD), sql.Identifier(app.schema)
    connection.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN").format(names[0]))
    try:
        other = Durable("other", dsn=_uri(_hosts(tcp), {**tcp, "user": ODD}), schema=app.schema)
        assert other.task(name="task")(lambda: None).delay().status == "runnable"
        other.close()
    finally:
        connection.execute(sql.SQL("DROP ROLE {}").format(names[0]))


@pytest.mark.parametrize("environment", ["service hosts"], indirect=True)
def test_a_worker_connects_by(
    environment: str, app: Durable, durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    (tmp_path / "tasks.py").write_text(
        f"from durable import Durable\napp = Durable('test', dsn={environment!r}, schema={app.schema!r})\n"
        "@app.task(name='task')\ndef task(): return 'ran'\n"
    )
    result = app.task(name="task")(lambda: None).delay()
    worker = durable_worker("worker", "-c", "1", "-B")
    assert result.get(timeout=20) == "ran"
    assert "service hosts, " in worker.output()
