"""New instances in COPY's binary format: large batches go in at half of what an INSERT of arrays costs the server.

Ids and the time come from the statement before it, so that a row says what an INSERT would have made of it. A COPY
can't drop a row whose key is occupied: only rows without correlation keys go this way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from operator import attrgetter

from durable.instance import NewInstance
from durable.storage.arrays import microseconds

_BEGIN = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END = b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"
_COLUMNS = 19
_PIECE = 500
"""Rows that are written at a time: while the server takes them in, the next are made."""
_row = struct.Struct(">hiqi").pack
_int2, _int4, _int8 = struct.Struct(">ih").pack, struct.Struct(">ii").pack, struct.Struct(">iq").pack
_length = struct.Struct(">i").pack
_COMMON = attrgetter(
    "queue", "priority", "machine", "machine_version", "step", "state.type", "max_attempts", "parent_id",
    "parent_round", "concurrency_key", "rate_limit", "weight", "trace",
)  # fmt: skip


def instance_rows(
    batch: Sequence[NewInstance], ids: Sequence[int], now: int, lanes: Sequence[str | None]
) -> Iterator[bytes]:
    """Yield a batch, in pieces, as `copy_instances` takes it: id and state, then what most rows share.

    now    the database's clock, in microseconds since 2000
    lanes  where each row is parked unless it is scheduled
    """
    made: dict[object, bytes] = {}
    parts = [_BEGIN]
    for n, (new, instance_id, lane) in enumerate(zip(batch, ids, lanes, strict=True), 1):
        at, expires = now, None
        if new.at is not None:
            at = max(now, microseconds(new.at))
        elif new.delay:
            at = now + round(new.delay * 1_000_000)
        if new.expires_at is not None:
            expires = microseconds(new.expires_at)
        elif new.expires_in is not None:
            expires = now + round(new.expires_in * 1_000_000)
        common = (_COMMON(new), at, expires, lane)
        rest = made.get(common)
        if rest is None:
            rest = made[common] = _rest(new, at, expires, None if at > now else lane, at > now)
        body = new.state.body
        parts += (_row(_COLUMNS, 8, instance_id, len(body)), body, rest)
        if n % _PIECE == 0:
            yield b"".join(parts)
            parts.clear()
    parts.append(_END)
    yield b"".join(parts)


def _rest(new: NewInstance, at: int, expires: int | None, lane: str | None, scheduled: bool) -> bytes:
    fields = (
        _int8(8, at),
        _text("scheduled" if scheduled else "runnable"),
        _NULL if expires is None else _int8(8, expires),
        _text(new.queue),
        _int2(2, new.priority),
        _text(new.machine),
        _int4(4, new.machine_version),
        _text(new.step),
        _text(new.state.type),
        _NULL if new.max_attempts is None else _int4(4, new.max_attempts),
        _NULL if new.parent_id is None else _int8(8, new.parent_id),
        _NULL if new.parent_round is None else _int4(4, new.parent_round),
        _text(new.concurrency_key),
        _text(new.rate_limit),
        _int4(4, new.weight),
        _text(lane),
        _text(new.trace),
    )
    return b"".join(fields)


def _text(value: str | None) -> bytes:
    if value is None:
        return _NULL
    encoded = value.encode()
    return _length(len(encoded)) + encoded
