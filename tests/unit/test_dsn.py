"""Where the database is: what is refused, and that a password is never shown."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from durable import Durable
from durable.dsn import VARIABLE, Database, check
from durable.errors import ConfigError

SECRET = "hunter2"


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://user:pw@host:5432/db",
        "postgres://host/db",
        "postgresql:///db?host=/var/run/postgresql",
        "postgresql://[::1]:5432/db",
        "postgresql://u:p%40%3A%2F@host/db",
        "postgresql://a:1,b:2/db?target_session_attrs=read-write",
        "host=localhost dbname=db password='a b'",
        "service=shop",
    ],
)
def test_every_form_libpq_knows_is_accepted_unchanged(dsn: str) -> None:
    assert check(dsn, "dsn") == dsn
    assert Database(dsn).dsn() == dsn


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        (f"redis://u:{SECRET}@host/0", r"^dsn must start with postgresql://, got redis://\.\.\.$"),
        (f"mysql://u:{SECRET}@host/db", "must start with postgresql://"),
        (f"postgresql+psycopg://u:{SECRET}@host/db", "must start with postgresql://"),
        (f"postgresql://u:{SECRET}%zz@host/db", "no valid Postgres DSN"),
        (f"host=x passwort={SECRET}", "no valid Postgres DSN"),
        (f"{SECRET}", "no valid Postgres DSN"),
        ("", "is empty"),
        ("   ", "is empty"),
        ("postgresql://", "is empty"),
    ],
    ids=lambda value: value[:20],
)
def test_a_wrong_dsn_is_refused_without_showing_its_password(
    dsn: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGSERVICE", "PGHOST", "PGHOSTADDR", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)
    for make in (lambda: check(dsn, "dsn"), lambda: Database(dsn), lambda: Durable("x", dsn=dsn)):
        with pytest.raises(ConfigError, match=message) as caught:
            make()
        printed = "".join(traceback.format_exception(caught.value))
        assert SECRET not in printed.replace(repr(dsn), "")


def test_the_environment_comes_second_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "postgresql://env/db")
    assert Database(None).dsn() == "postgresql://env/db"
    assert not Database(None).embedded
    assert Database("postgresql://given/db").dsn() == "postgresql://given/db"
    monkeypatch.setenv(VARIABLE, f"redis://:{SECRET}@host")
    with pytest.raises(ConfigError, match=f"^{VARIABLE} must start with postgresql://") as caught:
        Database(None).dsn()
    assert SECRET not in str(caught.value)


def test_without_any_the_embedded_server_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Database(None).embedded
    assert not Database("postgresql://given/db").embedded
    monkeypatch.setenv(VARIABLE, "")
    assert Database(None).embedded


def test_an_app_shows_no_dsn() -> None:
    app = Durable("shop", dsn=f"postgresql://u:{SECRET}@host/db")
    shown: list[Any] = [repr(app), str(app), repr(app.task(name="t")(lambda: None)), repr(app.result(1))]
    assert not any(SECRET in text for text in shown)
