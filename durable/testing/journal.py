"""What the code of a crash scenario has done already, so that a second run after the crash goes on where it stood.

Only the forked children of `crash_every_commit` have a journal. It numbers the scenario's own acts: writes through the
app's Writer, and drains. An act that committed is written down with what it returned or raised; when the scenario runs
again, acts that are written down are answered, not repeated. What steps do is not written down: a step that is run
again repeats it, which is what crashing is to show.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psycopg

from durable.callers import aaccept, accept
from durable.errors import DurableError
from durable.writer import Write, Writer

T = TypeVar("T")
_IDLE = psycopg.pq.TransactionStatus.IDLE


class Entry(NamedTuple):
    """What an act of the scenario ended with: a value, or an exception in parts (class, arguments, attributes)."""

    number: int
    what: str
    value: Any
    error: tuple[type[BaseException], tuple[Any, ...], dict[str, Any]] | None


class Journal:
    """The journal of one run, in a file that outlives the process.

    die  ends the process; called after an act is written down, if `dies_after_act` was set while it ran
    """

    def __init__(self, path: Path, die: Callable[[], None]) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._die = die
        self._entries = {entry.number: entry for entry in _read(path)}
        self._number = 0
        self._busy = False
        self._uncommitted: dict[int, list[Entry]] = {}
        self.writing = False
        """Whether a write of the scenario is under way: one act with one commit."""
        self.dies_after_act = False

    def is_past(self) -> bool:
        """Whether the scenario is at a point that it had left behind before the crash."""
        return not self._busy and any(number > self._number for number in self._entries)

    def act(self, what: str, call: Callable[[], T], connection: Any = None) -> T:
        """Do one thing of the scenario's, or answer it from the journal; what happens inside of one belongs to it."""
        if self._busy:
            return call()
        entry = self._begin(what)
        if entry is not None:
            return _answer(entry)  # type: ignore[no-any-return]
        try:
            value = call()
        except Exception as error:
            self._ended(what, None, error, connection)
            raise
        finally:
            self._busy = self.writing = False
        self._ended(what, value, None, connection)
        return value

    async def aact(self, what: str, call: Callable[[], Awaitable[T]], connection: Any = None) -> T:
        """`act` for coroutines."""
        if self._busy:
            return await call()
        entry = self._begin(what)
        if entry is not None:
            return _answer(entry)  # type: ignore[no-any-return]
        try:
            value = await call()
        except Exception as error:
            self._ended(what, None, error, connection)
            raise
        finally:
            self._busy = self.writing = False
        self._ended(what, value, None, connection)
        return value

    def committed(self, connection: Any) -> None:
        """Write down what was done in a transaction of the scenario's own, which has committed."""
        for entry in self._uncommitted.pop(id(connection), ()):
            self._write_down(entry)

    def rolled_back(self, connection: Any) -> None:
        """Forget what was done in a transaction of the scenario's own that came to nothing."""
        self._uncommitted.pop(id(connection), None)

    def _begin(self, what: str) -> Entry | None:
        self._number += 1
        entry = self._entries.get(self._number)
        if entry is None:
            self._busy = True
            self.writing = what != "drain"
        elif entry.what != what:
            raise DurableError(
                f"the scenario took another way after the crash: its act {self._number} was a {entry.what}, now it is "
                f"a {what}. What it does must not depend on what it reads meanwhile"
            )
        return entry

    def _ended(self, what: str, value: Any, error: Exception | None, connection: Any) -> None:
        parts = None if error is None else (type(error), error.args, dict(error.__dict__))
        entry = Entry(self._number, what, value, parts)
        if connection is not None and connection.info.transaction_status != _IDLE:
            self._uncommitted.setdefault(id(connection), []).append(entry)
            return
        self._write_down(entry)
        if self.dies_after_act:
            self._die()

    def _write_down(self, entry: Entry) -> None:
        try:
            body = pickle.dumps(entry)
        except Exception as error:  # a class of the scenario's own, for instance: it is done again after a crash
            if entry.error is None:
                raise DurableError(f"what {entry.what} returned can't be written down: {error}") from error
            return
        os.write(self._file, len(body).to_bytes(8, "big") + body)


class JournalingWriter(Writer):
    """The writer of a scenario's app: its writes are acts."""

    def __init__(self, pool: Any, sql: Any, journal: Journal) -> None:
        super().__init__(pool, sql)
        self._journal = journal

    def write(self, write: Write[T], connection: Any = None, notify_in_transaction: bool = True) -> T:
        return self._journal.act(
            "write",
            lambda: super(JournalingWriter, self).write(write, connection, notify_in_transaction),
            None if connection is None else accept(connection).connection,
        )

    async def awrite(self, write: Write[T], connection: Any = None, notify_in_transaction: bool = True) -> T:
        return await self._journal.aact(
            "write",
            lambda: super(JournalingWriter, self).awrite(write, connection, notify_in_transaction),
            None if connection is None else (await aaccept(connection)).connection,
        )


_kept: list[Journal] = []


def keep(journal: Journal) -> None:
    """From now on this process has a journal."""
    _kept[:] = [journal]


def recorded(what: str, call: Callable[[], T]) -> T:
    """Do one thing of a test's: an act, where there is a journal."""
    return _kept[0].act(what, call) if _kept else call()


def is_past() -> bool:
    """Whether a scenario runs again at a point it had left behind: what it asserts there was true then."""
    return bool(_kept) and _kept[0].is_past()


def _answer(entry: Entry) -> Any:
    if entry.error is None:
        return entry.value
    kind, args, attributes = entry.error
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    raise error


def _read(path: Path) -> list[Entry]:
    data, entries, at = path.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "big")
        entries.append(pickle.loads(data[at + 8 : at + 8 + size]))  # noqa: S301 - our own, of a moment ago
        at += 8 + size
    return entries
