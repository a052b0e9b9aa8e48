"""Delivering signals and reading inboxes. SQL in sql/signals.sql, where the two orders of a wakeup are explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

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

    One statement stores all of them, so that it is atomic by itself.
    """
    keys = sorted({signal.target for signal in batch if isinstance(signal.target, str)})
    found: dict[int | str, int] = {}
    if keys:
        rows = yield "occupants", {"keys": TextArray(keys)}
        found = dict(rows)
    targets = [found.get(signal.target, signal.target) for signal in batch]
    addressed = [n for n, target in enumerate(targets) if isinstance(target, int)]
    delivery = Delivery([None] * len(batch))
    if not addressed:
        return delivery
    rows = yield (
        "deliver",
        {
            "targets": Int8Array([targets[n] for n in addressed]),
            "names": TextArray([batch[n].name for n in addressed]),
            "dedup_keys": TextArray([batch[n].dedup_key for n in addressed]),
            "payload_types": TextArray([batch[n].payload.type for n in addressed]),
            "payloads": ByteaArray([batch[n].payload.body for n in addressed]),
            "traces": TextArray([batch[n].trace for n in addressed]),
        },
    )
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


def inbox(ids: Sequence[int]) -> Operation[dict[int, list[StoredSignal]]]:
    """Return the unconsumed signals of instances, oldest first."""
    rows = yield "inbox", {"ids": Int8Array(ids)}
    found: dict[int, list[StoredSignal]] = {}
    for target, *signal in rows:
        found.setdefault(target, []).append(StoredSignal(*signal))
    return found
