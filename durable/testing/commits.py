"""Counting a process's commits, and dying at one of them: psycopg is wrapped for good, in a forked child only.

A commit is a writing statement on an idle autocommit connection, the end of an outermost transaction block, a
`connection.commit()` with something to commit, or a COMMIT written by hand; on every connection, sync or async.
Notifications, COPY, and functions that write behind a SELECT do not count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from psycopg import sql

from durable.testing.journal import Journal

CRASHED = 77
"""Exit code of a process that died where it was told to."""
_STATUS = psycopg.pq.TransactionStatus
_HEAD = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*([a-z]+)", re.IGNORECASE | re.DOTALL)
_WRITES = re.compile(r"\b(?:INSERT\s+INTO|DELETE\s+FROM|MERGE\s+INTO|(?<!FOR )(?<!KEY )UPDATE)\b", re.IGNORECASE)
_WRITING = {"INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE", "CREATE", "ALTER", "DROP", "GRANT", "REVOKE", "COMMENT"}
_WRITING |= {"CALL", "DO", "REFRESH"}
_COMMITS = frozenset({"COMMIT", "END"})


class Commits:
    """The commits of this process, from its making on.

    names   text of a statement -> its name, for labels
    die_at  (number from 1, "before" or "after")
    labels  what each one was
    """

    def __init__(self, names: Mapping[str, str], journal: Journal, die_at: tuple[int, str] | None = None) -> None:
        self.labels: list[str] = []
        self._names = names
        self._journal = journal
        self._die_at = die_at
        self._inside: dict[int, list[str]] = {}

    def wrap_psycopg(self) -> None:
        """Let every connection of this process report its commits here."""
        for cursor in (psycopg.Cursor, psycopg.AsyncCursor):
            for method in ("execute", "executemany"):
                wrap = _statement if cursor is psycopg.Cursor else _astatement
                setattr(cursor, method, wrap(self, getattr(cursor, method)))
        psycopg.Transaction.__exit__ = _exit(self, psycopg.Transaction.__exit__)  # type: ignore[method-assign]
        psycopg.AsyncTransaction.__aexit__ = _aexit(  # type: ignore[method-assign]
            self, psycopg.AsyncTransaction.__aexit__
        )
        psycopg.Connection.commit = _commit(self, psycopg.Connection.commit)  # type: ignore[method-assign]
        psycopg.AsyncConnection.commit = _acommit(  # type: ignore[method-assign]
            self, psycopg.AsyncConnection.commit
        )
        psycopg.Connection.rollback = _rollback(self, psycopg.Connection.rollback)  # type: ignore[method-assign]
        psycopg.AsyncConnection.rollback = _arollback(  # type: ignore[method-assign]
            self, psycopg.AsyncConnection.rollback
        )

    def label_of(self, connection: Any, query: Any) -> str | None:
        """Return what a statement is called if it commits; else note it for the commit that will."""
        text = _text(query, connection)
        head = _HEAD.match(text)
        word = head[1].upper() if head else ""
        status = connection.pgconn.transaction_status
        if word in _COMMITS:
            return self.label_of_end(connection) if status == _STATUS.INTRANS else None
        if not (word in _WRITING or (word == "WITH" and _WRITES.search(text))):
            return None
        name = self._names.get(text) or " ".join(text.split())[:100]
        if status == _STATUS.IDLE and connection.autocommit:
            return name
        self._inside.setdefault(id(connection), []).append(name)
        return None

    def label_of_end(self, connection: Any) -> str:
        """Return what the COMMIT of a connection's transaction is called."""
        return f"COMMIT of {', '.join(self._inside.get(id(connection), ())) or 'nothing written'}"

    def before(self, label: str) -> None:
        """A commit is about to happen."""
        if self._die_at == (len(self.labels) + 1, "before"):
            self.die()

    def after(self, label: str, connection: Any) -> None:
        """It has happened."""
        self.labels.append(label)
        self._inside.pop(id(connection), None)
        self._journal.committed(connection)
        if self._die_at == (len(self.labels), "after"):
            if self._journal.writing:
                self._journal.dies_after_act = True  # its return value is yet to be written down
            else:
                self.die()

    def rolled_back(self, connection: Any) -> None:
        """The transaction came to nothing."""
        self._inside.pop(id(connection), None)
        self._journal.rolled_back(connection)

    @staticmethod
    def die() -> None:
        """End the process at once, as a kill does."""
        os._exit(CRASHED)


def _text(query: Any, connection: Any) -> str:
    if isinstance(query, bytes):
        return query.decode(errors="replace")
    return query.as_string(connection) if isinstance(query, sql.Composable) else str(query)


def _statement(commits: Commits, original: Callable[..., Any]) -> Callable[..., Any]:
    def execute(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        connection = self.connection
        label = commits.label_of(connection, query)
        if label is None:
            return original(self, query, *args, **kwargs)
        commits.before(label)
        value = original(self, query, *args, **kwargs)
        commits.after(label, connection)
        return value

    return execute


def _astatement(commits: Commits, original: Callable[..., Any]) -> Callable[..., Any]:
    async def execute(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        connection = self.connection
        label = commits.label_of(connection, query)
        if label is None:
            return await original(self, query, *args, **kwargs)
        commits.before(label)
        value = await original(self, query, *args, **kwargs)
        commits.after(label, connection)
        return value

    return execute


def _ends(transaction: Any, kind: Any) -> bool | None:
    """Whether leaving a block commits a transaction (True), rolls it back (False), or is only a savepoint's."""
    if not transaction._outer_transaction:
        return None
    status = transaction.connection.pgconn.transaction_status
    return kind is None and not transaction.force_rollback and status == _STATUS.INTRANS


def _exit(commits: Commits, original: Callable[..., Any]) -> Any:
    def leave(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        ends, connection = _ends(self, kind), self.connection
        if not ends:
            value = original(self, kind, error, trace)
            if ends is False:
                commits.rolled_back(connection)
            return value
        label = commits.label_of_end(connection)
        commits.before(label)
        value = original(self, kind, error, trace)
        commits.after(label, connection)
        return value

    return leave


def _aexit(commits: Commits, original: Callable[..., Any]) -> Any:
    async def leave(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        ends, connection = _ends(self, kind), self.connection
        if not ends:
            value = await original(self, kind, error, trace)
            if ends is False:
                commits.rolled_back(connection)
            return value
        label = commits.label_of_end(connection)
        commits.before(label)
        value = await original(self, kind, error, trace)
        commits.after(label, connection)
        return value

    return leave


def _commit(commits: Commits, original: Callable[..., Any]) -> Any:
    def commit(self: Any) -> None:
        if self.pgconn.transaction_status != _STATUS.INTRANS:
            original(self)
            return
        label = commits.label_of_end(self)
        commits.before(label)
        original(self)
        commits.after(label, self)

    return commit


def _acommit(commits: Commits, original: Callable[..., Any]) -> Any:
    async def commit(self: Any) -> None:
        if self.pgconn.transaction_status != _STATUS.INTRANS:
            await original(self)
            return
        label = commits.label_of_end(self)
        commits.before(label)
        await original(self)
        commits.after(label, self)

    return commit


def _rollback(commits: Commits, original: Callable[..., Any]) -> Any:
    def rollback(self: Any) -> None:
        original(self)
        commits.rolled_back(self)

    return rollback


def _arollback(commits: Commits, original: Callable[..., Any]) -> Any:
    async def rollback(self: Any) -> None:
        await original(self)
        commits.rolled_back(self)

    return rollback
