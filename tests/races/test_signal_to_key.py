"""A signal to a correlation key whose occupant ends while it is on its way."""

from __future__ import annotations

from durable.instance import NewSignal, Payload
from durable.storage import signals
from tests.fix_rows import Rows
from tests.interleaving import Held


def to_key(key: str) -> NewSignal:
    return NewSignal(key, "go", Payload("json", b"1"))


def test_it_reaches_the_next_occupant(rows: Rows) -> None:
    (first,) = rows.insert(correlation_key="k")
    batch = [to_key("k"), to_key("nobody's"), to_key("k")]
    held = Held(rows.other(), signals.deliver(batch)).until("deliver")
    assert rows.cancel(first)
    (second,) = rows.insert(correlation_key="k")
    assert held.commit().stored == [True, None, True]
    assert rows.fetch("SELECT target_id FROM {schema}.signals") == [{"target_id": second}] * 2


def test_it_reaches_nobody_when_there_is_no_next_one(rows: Rows) -> None:
    (first,) = rows.insert(correlation_key="k")
    held = Held(rows.other(), signals.deliver([to_key("k")])).until("deliver_one")
    assert rows.cancel(first)
    assert held.commit().stored == [None]
