"""A schema as text that two runs of the same work agree on: no ids, times, attempts or crash counts.

An instance goes by its correlation key, or by the order in which its parent spawned it; those with neither are sorted
by what they are.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from durable.app import Durable
from durable.errors import CorruptRowError
from durable.instance import TERMINAL
from durable.storage.testing import Pictured


def draw(app: Durable, rows: Sequence[Pictured]) -> str:
    """Return the text: every instance with its status, step, state, result and error type, children below parents."""
    ids = {row.id for row in rows}
    families: dict[int | None, list[Pictured]] = defaultdict(list)
    for row in rows:
        families[row.parent_id if row.parent_id in ids else None].append(row)

    def tree(row: Pictured) -> list[str]:
        lines = _one(app, row)
        for number, child in enumerate(families[row.id], 1):
            first, *others = tree(child)
            lines += [f"  child {number}: {first}", *(f"  {line}" for line in others)]
        return lines

    roots = sorted(tree(row) for row in families[None])
    return "\n".join(line for lines in roots for line in lines)


def _one(app: Durable, row: Pictured) -> list[str]:
    version = "" if row.machine_version == 1 else f" version {row.machine_version}"
    key = "" if row.correlation_key is None else f" {row.correlation_key!r}"
    lines = [f"{row.machine}{version}{key}: {row.status} at {row.step}"]
    lines.append(f"  state {_value(app, row.state_type, row.state)}")
    if row.result_type is not None:
        lines.append(f"  result {_value(app, row.result_type, row.result or b'')}")
    if row.status in TERMINAL and row.error_type is not None:
        lines.append(f"  error {row.error_type}")
    return lines


def _value(app: Durable, kind: str, body: bytes) -> str:
    try:
        return json.dumps(app.codec.decode(kind, body, "payload"), sort_keys=True, default=repr, ensure_ascii=False)
    except CorruptRowError:
        return f"{kind} {body.hex()}"
