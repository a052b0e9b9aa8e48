"""A session of ours sets what it depends on, and no wait for its server is endless."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from durable.storage.bounded import NoAnswerError
from durable.storage.session import connect
from tests.fix_proxy import CountingProxy

HOSTILE = {
    "statement_timeout": ("'1ms'", "6s"),
    "lock_timeout": ("'1ms'", "250ms"),
    "idle_in_transaction_session_timeout": ("'1ms'", "6s"),
    "idle_session_timeout": ("'1h'", "0"),
    "default_transaction_isolation": ("serializable", "read committed"),
    "default_transaction_deferrable": ("on", "off"),
    "DateStyle": ("'German'", "ISO, MDY"),
    "IntervalStyle": ("sql_standard", "postgres"),
    "standard_conforming_strings": ("off", "on"),
    "search_path": ("public", "pg_catalog, pg_temp"),
    "client_encoding": ("latin1", "UTF8"),
}
"""Setting -> what the role says, what a session of ours has."""


@pytest.fixture
def hostile_role(database: str, connection: psycopg.Connection[tuple[object, ...]]) -> Iterator[str]:
    """The DSN of a role whose every default is another than ours."""
    role = f"hostile_{uuid4().hex[:8]}"
    connection.execute(f"CREATE ROLE {role} LOGIN")
    for name, (value, _) in HOSTILE.items():
        connection.execute(f"ALTER ROLE {role} SET {name} = {value}")
    yield make_conninfo(database, user=role)
    connection.execute(f"DROP ROLE {role}")


def test_session_overrides_defaults_of_role(hostile_role: str) -> None:
    own = connect(hostile_role, "test", patience=5.0, lock_timeout=0.25)
    assert {name: own.execute(f"SHOW {name}").fetchone() for name in HOSTILE} == {
        name: (expected,) for name, (_, expected) in HOSTILE.items()
    }
    own.close()


def test_pooled_transaction_overrides_role(hostile_role: str) -> None:
    patient = "-c statement_timeout=0 -c idle_in_transaction_session_timeout=0"
    own = connect(make_conninfo(hostile_role, options=patient), "test", pooler=True)
    with own.transaction():
        assert own.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
    own.close()


def test_silent_connection_is_closed(counting_proxy: CountingProxy) -> None:
    own = connect(counting_proxy.dsn, "test", patience=0.5)
    own.execute("SELECT 1")
    counting_proxy.silence()
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"did not answer within 0\.[56]"):
        own.execute("SELECT 1")
    assert 0.4 < time.monotonic() - began < 2
    assert own.closed
    assert own.broken


def test_silent_commit_is_given_up(counting_proxy: CountingProxy) -> None:
    own = connect(counting_proxy.dsn, "test", patience=0.5)
    transaction = own.transaction()
    transaction.__enter__()
    own.execute("SELECT 1")
    counting_proxy.silence()
    with pytest.raises(NoAnswerError):
        transaction.__exit__(None, None, None)


def test_silent_copy_is_given_up(counting_proxy: CountingProxy) -> None:
    own = connect(counting_proxy.dsn, "test", patience=0.5)
    own.execute("CREATE TEMP TABLE copied (a text)")

    def copying() -> None:
        with own.cursor().copy("COPY copied FROM STDIN") as copy:
            counting_proxy.silence()
            for _ in range(200):
                copy.write(b"x" * 100_000 + b"\n")

    with pytest.raises(NoAnswerError):
        copying()


def test_silent_server_ends_connecting(counting_proxy: CountingProxy) -> None:
    counting_proxy.silence(new=True)
    twice = f"{counting_proxy.dsn} host=127.0.0.1,127.0.0.1"
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="connection timeout"):
        connect(twice, "test", timeout=0.5, patience=0.5)
    assert time.monotonic() - began < 2, "both hosts together"


def test_deadline_can_be_set_during_a_wait(database: str) -> None:
    own = connect(database, "test")

    def alarm(*_: object) -> None:
        own.deadline = 0.0

    before = signal.signal(signal.SIGUSR2, alarm)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGUSR2])
    timer.start()
    try:
        began = time.monotonic()
        with pytest.raises(NoAnswerError):
            own.execute("SELECT pg_sleep(20)")
        assert time.monotonic() - began < 5
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, before)


def test_server_ends_abandoned_statement(database: str) -> None:
    own = connect(database, "test", patience=0.5)
    own.patience = 20.0
    with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
        own.execute("SELECT pg_sleep(60)")
    own.close()
