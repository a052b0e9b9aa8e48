"""Lists as array parameters of one fixed type, in Postgres' binary format.

psycopg chooses an array's type from its values (int2[] or int8[], unknown for all-None), which makes a new prepared
statement for each mixture, and dumps element by element. Batches go in as these classes instead: one type, one plan,
a third of the time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

from psycopg import adapt, pq

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_NULL = b"\xff\xff\xff\xff"
_length = struct.Struct(">i").pack
_moment = struct.Struct(">iq").pack


class Array:
    """A one-dimensional array parameter; the subclass is its type."""

    oid: ClassVar[int]
    element_oid: ClassVar[int]

    __slots__ = ("values",)

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def dump(self) -> bytes:
        """Return the binary form: header, then length and bytes of each element."""
        body = self.elements()
        if not self.values:
            return struct.pack(">iii", 0, 0, self.element_oid)
        return struct.pack(">iiiii", 1, 1, self.element_oid, len(self.values), 1) + body

    def elements(self) -> bytes:
        """Return every element behind its length."""
        raise TypeError(f"{type(self).__name__} has no element format")  # pragma: no cover - abstract


class _Fixed(Array):
    """Elements of one fixed size; `pack` writes it and the value."""

    pack: ClassVar[Callable[..., bytes]]
    size: ClassVar[int]

    __slots__ = ()

    def elements(self) -> bytes:
        pack, size = type(self).pack, self.size
        return b"".join([_NULL if value is None else pack(size, value) for value in self.values])


class Int8Array(_Fixed):
    """bigint[]"""

    oid, element_oid = 1016, 20
    pack, size = struct.Struct(">iq").pack, 8
    __slots__ = ()


class Int4Array(_Fixed):
    """integer[]"""

    oid, element_oid = 1007, 23
    pack, size = struct.Struct(">ii").pack, 4
    __slots__ = ()


class Float8Array(_Fixed):
    """double precision[]"""

    oid, element_oid = 1022, 701
    pack, size = struct.Struct(">id").pack, 8
    __slots__ = ()


class TimestampArray(Array):
    """timestamptz[], from aware datetimes."""

    oid, element_oid = 1185, 1184
    __slots__ = ()

    def elements(self) -> bytes:
        return b"".join([_NULL if value is None else _moment(8, microseconds(value)) for value in self.values])


def microseconds(value: datetime) -> int:
    """Return an aware datetime as Postgres counts, from 2000."""
    since = value - _EPOCH
    return (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds


class ByteaArray(Array):
    """bytea[]"""

    oid, element_oid = 1001, 17
    __slots__ = ()

    def elements(self) -> bytes:
        return b"".join([_NULL if value is None else _length(len(value)) + value for value in self.values])


class _Texts(dict[str | None, bytes]):
    """Texts with their lengths, each made once: most columns of a batch hold one value many times."""

    def __missing__(self, value: str) -> bytes:
        encoded = value.encode()
        made = self[value] = _length(len(encoded)) + encoded
        return made


class TextArray(Array):
    """text[]"""

    oid, element_oid = 1009, 25
    __slots__ = ()

    def elements(self) -> bytes:
        return b"".join(map(_Texts({None: _NULL}).__getitem__, self.values))


def _dumper(array: type[Array]) -> type[adapt.Dumper]:
    class ArrayDumper(adapt.Dumper):
        format = pq.Format.BINARY
        oid = array.oid

        def dump(self, obj: Array) -> bytes:
            return obj.dump()

    ArrayDumper.__name__ = f"{array.__name__}Dumper"
    return ArrayDumper


_DUMPERS = {
    array: _dumper(array) for array in (Int8Array, Int4Array, Float8Array, TimestampArray, ByteaArray, TextArray)
}


def register(adapters: adapt.AdaptersMap) -> None:
    """Teach a connection's or a cursor's adapters these classes."""
    for array, dumper in _DUMPERS.items():
        adapters.register_dumper(array, dumper)
