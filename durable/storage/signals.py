"""Delivering signals and reading inboxes. SQL in sql/signals.sql, where the two orders of a wakeup are explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from durable.instance import NewSignal, StoredSignal
from durable.storage.arrays import ByteaArray, Int8Array, TextArray
from durable.storage.session import Operation


@dataclass(slots=True)
class Delivery:
    """What became of a batch of signals.

    stored   per signal: True (new), False (a duplicate of its dedup key), None (no live target)
    ready    sleepers woken, per queue
    """

    stored: list[bool | None]
    ready: Counter[str] = field(default_factory=Counter)


def deliver(batch: Sequence[NewSignal]) -> Operation[Delivery]:
    """Deliver signals, each to an id or to whoever occupies its correlation key now.

    One statement stores all of them, so that it is atomic by itself; but where an occupant has ended since it was
    looked up, its successor is looked for, which is more: see `may_repeat`.
    """
    found: dict[int | str, int] = {}
    delivery = yield from _deliver(batch, found, range(len(batch)))
    while left := [n for n, stored in enumerate(delivery.stored) if stored is None and batch[n].target in found]:
        before = {batch[n].target: found[batch[n].target] for n in left}
        for target in before:
            del found[target]
        again = yield from _deliver(batch, found, left)
        for n in left:
            delivery.stored[n] = again.stored[n]
            if found.get(batch[n].target) == before[batch[n].target]:
                del found[batch[n].target]  # not seen to have ended, and not live: nothing more to learn
        delivery.ready += again.ready
    return delivery


def may_repeat(batch: Sequence[NewSignal]) -> bool:
    """Whether a delivery may store some in a second statement, and needs a transaction for that."""
    return len(batch) > 1 and any(isinstance(signal.target, str) for signal in batch)


def _deliver(batch: Sequence[NewSignal], found: dict[int | str, int], which: Sequence[int]) -> Operation[Delivery]:
    """Deliver some of a batch; `found` is filled with who occupies the keys of those."""
    keys = sorted({target for n in which if isinstance(target := batch[n].target, str)})
    if keys:
        rows = yield "occupants", {"keys": TextArray(keys)}
        found.update(rows)
    targets = [found.get(signal.target, signal.target) for signal in batch]
    addressed = [n for n in which if isinstance(targets[n], int)]
    delivery = Delivery([None] * len(batch))
    if not addressed:
        return delivery
    chosen = [batch[n] for n in addressed]
    if len(addressed) == 1:
        rows = yield "deliver_one", _scalars(targets[addressed[0]], *chosen)
    else:
        rows = yield "deliver", _columns([targets[n] for n in addressed], chosen)
    seen: set[tuple[int | str, str]] = set()
    woken: dict[int | str, str] = {}
    for n, stored, queue, was_woken in sorted(rows):
        index = addressed[n - 1]
        key = batch[index].dedup_key
        # Two of one key in one batch: the statement stored the first.
        repeated = key is not None and (targets[index], key) in seen
        delivery.stored[index] = stored and not repeated
        if key is not None:
            seen.add((targets[index], key))
        if was_woken:
            woken[targets[index]] = queue
    delivery.ready.update(woken.values())
    return delivery


def _scalars(target: int | str, signal: NewSignal) -> dict[str, Any]:
    return {
        "target": target,
        "name": signal.name,
        "dedup_key": signal.dedup_key,
        "payload_type": signal.payload.type,
        "payload": signal.payload.body,
        "trace": signal.trace,
    }


def _columns(targets: Sequence[int | str], batch: Sequence[NewSignal]) -> dict[str, Any]:
    return {
        "targets": Int8Array(targets),
        "names": TextArray([signal.name for signal in batch]),
        "dedup_keys": TextArray([signal.dedup_key for signal in batch]),
        "payload_types": TextArray([signal.payload.type for signal in batch]),
        "payloads": ByteaArray([signal.payload.body for signal in batch]),
        "traces": TextArray([signal.trace for signal in batch]),
    }


def inbox(ids: Sequence[int]) -> Operation[dict[int, list[StoredSignal]]]:
    """Return the unconsumed signals of instances, oldest first."""
    rows = yield "inbox", {"ids": Int8Array(ids)}
    found: dict[int, list[StoredSignal]] = {}
    for target, *signal in rows:
        found.setdefault(target, []).append(StoredSignal(*signal))
    return found


def unread(instance_id: int) -> Operation[list[StoredSignal]]:
    """Return the signals of a finished instance that no step was shown, oldest first; none while it is live."""
    rows = yield "unread", {"id": instance_id}
    return [StoredSignal(*row) for row in rows]
