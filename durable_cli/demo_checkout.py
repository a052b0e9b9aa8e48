"""The second half of the demo's story: one order that waits for its payment while a process dies, then fans out.

`order` is parked before the first kill; `ship` pays it (twice, as webhooks do), kills a process in the middle of the
packing, and checks that every parcel was packed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
from rich.console import Console

from durable import AsyncResult
from durable.errors import DurableError
from durable.storage.session import single
from durable_cli.demo_tasks import PARCELS, Checkout, app

KEY = "order:42"
PATIENCE = 60.0


def order(console: Console) -> AsyncResult[Any]:
    """Insert the order and wait until it is parked."""
    with psycopg.connect(app.database.dsn(), autocommit=True) as connection:
        connection.execute("CREATE TABLE durable_demo.parcels (number int)")
    result = app.insert(Checkout, kwargs={"number": 42}, correlation_key=KEY)
    _wait(lambda: result.status == "awaiting_signal", "the order did not park")
    console.print(f"  {KEY} is parked: it awaits its payment, nothing runs for it\n")
    return result


def ship(console: Console, result: AsyncResult[Any], kill: Callable[[], int | None]) -> dict[str, Any]:
    """Pay the order, have a process killed while its parcels are packed, and return the figures.

    Raises DurableError when a parcel was packed twice or never.
    """
    payment = {"amount": 100}
    app.signal(KEY, "payment_confirmed", payment, dedup_key="evt-7")
    again = app.signal(KEY, "payment_confirmed", payment, dedup_key="evt-7")
    console.print(f"\n  payment_confirmed sent to {KEY}; sent again, as webhooks do: {'taken' if again else 'ignored'}")
    _wait(lambda: _packed() > 0, "no parcel was packed")
    victim = kill()
    shipped = result.get(timeout=PATIENCE)
    packed, twice = _packed(), app.run(single("executions", {"queue": "parcels"}))[0][2]
    console.print(
        f"  [bold green]{KEY} shipped, {shipped['parcels']} of {PARCELS} parcels; {packed} rows written by "
        f"{PARCELS} steps[/], {twice} of them started twice"
    )
    if (packed, shipped["parcels"]) != (PARCELS, PARCELS):
        raise DurableError(
            f"{packed} parcels packed, {shipped['parcels']} joined of {PARCELS}: this should never happen"
        )
    return {"parcels": packed, "started_twice": twice, "killed": victim, "redelivery_ignored": not again}


def _packed() -> int:
    with psycopg.connect(app.database.dsn(), autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM durable_demo.parcels").fetchone()
    return int(row[0]) if row else 0


def _wait(condition: Callable[[], bool], problem: str) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise DurableError(f"{problem} within {PATIENCE:.0f} s")
        time.sleep(0.02)
