"""The database's own history: every row version of our tables in commit order, by logical decoding.

Costs the code under test nothing, and survives a crash of the server. (A trigger that keeps a ledger slows the
statements down, and may hide the very race it looks for.)
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.chaos.application import SCHEMA

SLOT = "chaos"
PUBLISHED = {
    "instances": "id, status, token, version, attempt, crashes, worker_id, concurrency_key, rate_limit, weight,"
    " gate_shard, cancel_requested, parent_id, parent_round, children_pending, children_round, machine, step,"
    " eligible_at, finished_at, awaits, shown",
    "history": "id, finished_at, status, token, version, crashes, worker_id, parent_id, parent_round, machine",
    "signals": "id, target_id, name, dedup_key, consumed",
    "schedules": "name, next_at, fired, skipped",
    "buckets": "bucket, shard, full_at",
    "workers": "id, pid",
}
"""What the checker reads of each table."""
SECONDS = 5.0
"""Between two looks: each decodes again what has been written since the slot's last restart point."""
_EPOCH = 946_684_800.0  # 2000-01-01, from which Postgres counts

Row = dict[str, Any]


@dataclass(slots=True)
class Transaction:
    """One commit: where it lies in the log, when it was (seconds since 1970), and (I, U or D; table; row) in order."""

    lsn: int
    at: float
    changes: list[tuple[str, str, Row]]


class Decoder:
    """Reads messages of the pgoutput protocol, version 1."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[str, list[str]]] = {}
        self._open: Transaction | None = None
        self.end = 0

    def feed(self, data: bytes) -> Transaction | None:
        """Take one message; return the transaction that it ends, if it does."""
        kind = data[:1]
        if kind == b"B":
            lsn, micros = struct.unpack_from("!QQ", data, 1)
            self._open = Transaction(lsn, _EPOCH + micros / 1e6, [])
        elif kind == b"C":
            self.end = struct.unpack_from("!xBQQ", data)[2]
            done, self._open = self._open, None
            return done
        elif kind == b"R":
            self._relation(data)
        elif kind in b"IUD":
            table, columns = self._tables[struct.unpack_from("!I", data, 1)[0]]
            at = 5
            row: Row = {}
            while at < len(data):
                at, row = self._tuple(data, at + 1, columns)  # of an update the last one is the new one
            assert self._open is not None
            self._open.changes.append((kind.decode(), table, row))
        return None

    def _relation(self, data: bytes) -> None:
        (oid,) = struct.unpack_from("!I", data, 1)
        _, at = _text(data, 5)
        table, at = _text(data, at)
        (count,) = struct.unpack_from("!H", data, at + 1)
        at += 3
        columns = []
        for _ in range(count):
            name, at = _text(data, at + 1)
            columns.append(name)
            at += 8
        self._tables[oid] = table, columns

    def _tuple(self, data: bytes, at: int, columns: list[str]) -> tuple[int, Row]:
        (count,) = struct.unpack_from("!H", data, at)
        at += 2
        row: Row = {}
        for name in columns[:count]:
            kind = data[at : at + 1]
            at += 1
            if kind == b"t":
                (length,) = struct.unpack_from("!I", data, at)
                row[name] = data[at + 4 : at + 4 + length].decode()
                at += 4 + length
            elif kind == b"n":
                row[name] = None
        return at, row


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(b"\0", at)
    return data[at:end].decode(), end + 1


def publish(connection: psycopg.Connection[Any]) -> None:
    """Begin to keep the history. After the schema was made; the server has wal_level=logical."""
    tables = ", ".join(f"TABLE {SCHEMA}.{table} ({columns})" for table, columns in PUBLISHED.items())
    connection.execute(f"CREATE PUBLICATION {SLOT} FOR {tables} WITH (publish_via_partition_root = true)")
    connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [SLOT])


class Recorder:
    """A thread that reads the history as it grows."""

    def __init__(self, dsn: str, trouble: Path) -> None:
        self.transactions: list[Transaction] = []
        self._dsn = dsn
        self._trouble = trouble
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="recorder")
        self._thread.start()

    def finish(self) -> list[Transaction]:
        """Read to the present end; return everything."""
        self._stop.set()
        self._thread.join(60)
        with psycopg.connect(self._dsn, autocommit=True, application_name="chaos recorder") as connection:
            while self._read(connection):
                pass
        return self.transactions

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True, application_name="chaos recorder") as connection:
                    while not self._stop.wait(SECONDS):
                        while self._read(connection):
                            pass
            except psycopg.Error as error:
                with self._trouble.open("a") as file:
                    file.write(f"{error}\n")
                self._stop.wait(0.2)

    def _read(self, connection: psycopg.Connection[Any]) -> bool:
        """Peek, keep, and only then move on: what is lost with a connection is read again."""
        decoder = Decoder()
        seen = self.transactions[-1].lsn if self.transactions else 0
        rows = connection.execute(
            "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, 100000,"
            " 'proto_version', '1', 'publication_names', %s)",
            [SLOT, SLOT], binary=True,
        ).fetchall()  # fmt: skip
        for (data,) in rows:
            done = decoder.feed(bytes(data))
            if done is not None and done.lsn > seen:
                self.transactions.append(done)
        if decoder.end:
            high, low = divmod(decoder.end, 2**32)
            connection.execute("SELECT pg_replication_slot_advance(%s, %s)", [SLOT, f"{high:X}/{low:X}"])
        return len(rows) >= 100000
