"""A LISTEN connection that notices its own death.

It does nothing else and stays outside of transactions, since a listener inside one makes Postgres keep every
notification. Every PING_EVERY seconds its owner sends it a ping over another connection; a ping that does not come
back within as long means the connection is dead, whatever TCP says, and it is replaced.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import psycopg

from durable.app import Durable
from durable.dsn import check
from durable.errors import DurableError
from durable.runtime.backoff import Backoff
from durable.sql import quote_identifier
from durable.storage.session import PATIENCE, Connection, Operation, connect, describe, single

log = logging.getLogger(__name__)

PING_EVERY = 5.0
_PING = "ping "


def listening_dsn(app: Durable) -> Callable[[], str] | None:
    """Return what gives a DSN to LISTEN on; None behind a transaction pooler, where only polling is left."""
    dsn = app.conf.listen_dsn
    if dsn is not None:
        dsn = check(dsn, "listen_dsn")
        return lambda: dsn
    return None if app.conf.pooler else app.dsn


class Listener:
    """One LISTEN connection on one channel; lost is late, never wrong: the poll finds everything.

    dsn       gives the DSN; None: never connect
    patience  seconds that connecting, and LISTEN itself, may take
    """

    def __init__(self, dsn: Callable[[], str] | None, channel: str, name: str, patience: float = PATIENCE) -> None:
        self._dsn = dsn
        self._channel = channel
        self._name = name
        self._patience = patience
        self._connection: Connection | None = None
        self._backoff = Backoff(first=0.5, most=10.0)
        self._try_at = 0.0
        self._ping_at = 0.0
        self._ping = f"{_PING}{os.getpid()}"
        self._pinged_at: float | None = None

    def fileno(self) -> int | None:
        """The socket to poll, or None while there is no connection."""
        return None if self._connection is None or self._connection.closed else self._connection.fileno()

    def tend(self) -> bool:
        """Connect if it is time to; return whether it did, for then anything may have been missed."""
        now = time.monotonic()
        if self._pinged_at is not None and now - self._pinged_at > PING_EVERY:
            log.warning("%s: the LISTEN connection is silent; it is replaced", self._name)
            self._close()
        if self._dsn is None or self.fileno() is not None or now < self._try_at:
            return False
        try:
            self._connection = connect(self._dsn(), self._name, patience=self._patience)
            self._connection.execute(f"LISTEN {quote_identifier(self._channel)}")
        except (psycopg.Error, DurableError) as error:
            log.info("%s: no LISTEN connection, polling meanwhile: %s", self._name, describe(error))
            self._close()
            self._try_at = now + self._backoff.next()
            return False
        self._backoff.reset()
        self._ping_at = now + PING_EVERY
        return True

    def ping(self) -> Operation[object] | None:
        """Return the ping to send over another connection when one is due, else None."""
        now = time.monotonic()
        if self.fileno() is None or now < self._ping_at:
            return None
        self._ping_at = now + PING_EVERY
        self._pinged_at = self._pinged_at or now
        return single("notify", {"channel": self._channel, "payload": self._ping})

    def ping_failed(self) -> None:
        """Take back a ping that was not sent: no answer to it will come."""
        self._pinged_at = None

    def messages(self) -> list[str]:
        """Return the payloads that have arrived, without waiting; pings excluded."""
        if self._connection is None:
            return []
        payloads: list[str] = []
        try:
            pgconn = self._connection.pgconn
            pgconn.consume_input()
            while (notification := pgconn.notifies()) is not None:
                payloads.append(notification.extra.decode("utf-8", "replace"))
        except psycopg.Error as error:
            log.info("%s: the LISTEN connection broke: %s", self._name, describe(error))
            self._close()
        if self._ping in payloads:
            self._pinged_at = None
        return [payload for payload in payloads if not payload.startswith(_PING)]

    def _close(self) -> None:
        self._pinged_at = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    close = _close
